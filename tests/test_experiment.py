"""End to end, as a user runs it: the launcher on real images."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdia import data, experiment, victims
from jaxdia.config import config_for, default_config, validate
from jaxdia.core.errors import InputError
from jaxdia.experiment.schema import Row
from jaxdia.experiment.summary import summarize

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = [
  "image", "client", "label", "attack", "model", "dropout_rate", "batch_size", "mse_normalized",
  "mse", "psnr", "ssim", "lpips", "mask_accuracy", "objective", "gradient_distance", "iterations",
  "seconds", "status",
]  # fmt: skip


def _launch(*arguments, config="configs/mlp.py:mnist", popen=False):
  # A device for each core, as a user has; the tests' eight are for those of the engine.
  command = [sys.executable, "launch/attack.py", f"--config={config}", *arguments]
  if popen:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _small(**attack):
  """A config that runs in seconds: three MNIST digits and a narrow MLP."""
  config = config_for("mlp", "mnist", hidden_sizes=(64, 64), use_bias=False)
  config.data.count = 3
  config.engine.lanes = 1
  config.attack.max_iterations = 60
  config.attack.update(attack)
  return config


def _rows(workdir):
  return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def _timeless(rows):
  return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def _silent(text):
  del text


def test_launcher_reconstructs_real_images(tmp_path):
  workdir = tmp_path / "run"
  result = _launch(
    f"--workdir={workdir}",
    "--config.attack.name=ig,wiig,dia",
    "--config.attack.max_iterations=1000",
    "--config.model.hidden_sizes=(256,256)",
    "--config.model.dropout_rate=0.5",
    "--config.data.count=2",
  )
  assert result.returncode == 0, result.stderr
  assert "unknown: 784 pixels + 512 mask entries (masks searched, labels given)" in result.stdout
  assert "268,800 gradient entries" in result.stdout
  assert "dia: 2 trials done" in result.stderr  # plain lines: there is no terminal
  table = result.stdout[result.stdout.index("MSE (median)") :]
  assert [line.split()[0] for line in table.splitlines()[1:4]] == ["IG", "WIIG", "DIA"]
  assert str(workdir / "grid.png") in table

  rows = _rows(workdir)
  assert [(r["attack"], r["image"]) for r in rows] == [
    (attack, victim) for attack in ("ig", "wiig", "dia") for victim in (0, 1)
  ]
  assert all(set(FIELDS) <= set(row) for row in rows)
  errors = {
    a: [r["mse_normalized"] for r in rows if r["attack"] == a] for a in ("ig", "wiig", "dia")
  }
  assert min(errors["ig"]) > 0.1 and max(errors["wiig"]) < 1e-3 and max(errors["dia"]) < 1e-3
  assert [row["mask_accuracy"] for row in rows[:4]] == [None] * 4
  assert min(row["mask_accuracy"] for row in rows[4:]) > 0.99

  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["dia"]["attempted"] == summary["dia"]["finished"] == 2
  assert summary["dia"]["failed"] == 0
  statistics = summary["dia"]["metrics"]["mse_normalized"]
  np.testing.assert_allclose(statistics["mean"], np.mean(errors["dia"]))
  np.testing.assert_allclose(statistics["max"], np.max(errors["dia"]))
  assert set(statistics) == {"mean", "std", "median", "min", "max", "count", "ci95"}
  low, high = statistics["ci95"]
  assert statistics["min"] <= low <= statistics["mean"] <= high <= statistics["max"]

  # The files hold what the numbers say.
  victims = data.load("samples:mnist", 2)
  with np.load(workdir / "reconstructions.npz") as file:
    np.testing.assert_array_equal(file["originals"], victims.images)
    np.testing.assert_array_equal(file["labels"], victims.labels)
    pixel_errors = np.mean(np.square(file["dia"] - victims.images), axis=(1, 2, 3))
  np.testing.assert_allclose(pixel_errors, [r["mse"] for r in rows[4:]], rtol=1e-4)
  with Image.open(workdir / "grid.png") as image:
    assert image.width > 200 and image.height > 400
  assert json.loads((workdir / "config.json").read_text())["data"]["source"] == "samples:mnist"
  leftovers = [p.name for p in workdir.rglob(".*")]
  assert not leftovers and not list((workdir / "checkpoint").glob("*"))


def test_killed_and_started_again_it_ends_with_the_same_numbers(tmp_path):
  arguments = [
    "--config.attack.max_iterations=1500",
    "--config.model.hidden_sizes=(128,128)",
    "--config.data.count=4",
    "--config.engine.lanes=2",
    "--config.engine.checkpoint_seconds=0",
  ]
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  assert _launch(f"--workdir={alone}", *arguments).returncode == 0
  kills = 0
  checkpoint, first = killed / "checkpoint" / "dia.npz", killed / "trials" / "dia" / "00000.npz"
  for wanted in (checkpoint, first):  # in the first trials, and between the first and the last
    process = _launch(f"--workdir={killed}", *arguments, popen=True)
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.02)
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
  assert kills == 2
  assert not (killed / "summary.json").exists()
  result = _launch(f"--workdir={killed}", *arguments)
  assert result.returncode == 0, result.stderr
  assert _timeless(_rows(alone)) == _timeless(_rows(killed))
  for name in ("originals", "dia"):
    with np.load(alone / "reconstructions.npz") as a, np.load(killed / "reconstructions.npz") as b:
      np.testing.assert_array_equal(a[name], b[name])


def test_a_finished_run_is_shown_again_without_computing(tmp_path, monkeypatch):
  first = experiment.run(_small(), tmp_path, say=_silent)
  monkeypatch.setattr(sys.modules["jaxdia.engine.loop"], "create_program", None)
  lines = []
  second = experiment.run(_small(), tmp_path, say=lines.append)
  assert second == first  # the times too
  assert any("3 of 3 trials were finished before" in line for line in lines)


def test_speed_settings_do_not_make_another_experiment(tmp_path):
  experiment.run(_small(), tmp_path, say=_silent)
  config = _small()
  config.engine.lanes = 3
  config.engine.chunk = 5
  config.engine.matching = "formed"
  experiment.run(config, tmp_path, say=_silent)


@pytest.mark.slow
def test_double_precision_starts_from_the_same_point(tmp_path):
  results = {}
  for precision in ("float32", "float64"):
    config = _small(max_iterations=8)
    config.precision = precision
    experiment.run(config, tmp_path / precision, say=_silent)
    with np.load(tmp_path / precision / "trials" / "dia" / "00000.npz") as file:
      assert file["images"].dtype == file["masks/dropout_0"].dtype == precision
      results[precision] = file["images"], _rows(tmp_path / precision)[0]["objective"]
  assert not jax.config.jax_enable_x64  # as it was before
  images, objectives = zip(*results.values(), strict=True)
  np.testing.assert_allclose(images[0], images[1], atol=0.01)
  np.testing.assert_allclose(objectives[0], objectives[1], rtol=1e-4)
  assert objectives[0] != objectives[1]


@pytest.mark.parametrize("variable, devices", [(None, os.cpu_count()), ("1", 1), ("3", 3)])
def test_cpu_cores_are_devices_unless_the_environment_says_otherwise(variable, devices, tmp_path):
  environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  if variable is not None:
    environment["JAX_NUM_CPU_DEVICES"] = variable
  program = "import jax; from jaxdia.command_line import _share_cpu; _share_cpu()"
  program += "; print(jax.local_device_count())"
  output = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True
  ).stdout
  assert int(output) == min(devices, 8)


def test_a_work_directory_of_another_experiment_is_refused(tmp_path):
  experiment.run(_small(), tmp_path, say=_silent)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(InputError, match="attacks.dia.max_iterations is 60, this one's is 70"):
    experiment.run(_small(max_iterations=70), tmp_path, say=_silent)
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_data_file_that_changed_is_another_experiment(tmp_path):
  victims = data.load("samples:mnist", 4)
  config = _small()
  config.data.source, config.data.count = f"npz:{tmp_path}/victims.npz", 2
  labels = victims.labels
  np.savez(tmp_path / "victims.npz", images=victims.images[:2], labels=labels[:2])
  experiment.run(config, tmp_path / "run", say=_silent)
  np.savez(tmp_path / "victims.npz", images=victims.images[2:], labels=np.array([7, 2]))
  with pytest.raises(InputError, match="holds another experiment: its data.sha256"):
    experiment.run(config, tmp_path / "run", say=_silent)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", b"{", b"{}"])
def test_a_work_directory_with_an_odd_config_is_refused(content, tmp_path):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(InputError, match="work directory"):
    experiment.run(_small(), tmp_path, say=_silent)


def test_a_work_directory_where_trials_is_a_file_is_refused(tmp_path):
  (tmp_path / "trials").write_text("")
  with pytest.raises(InputError, match="cannot write in the work directory"):
    experiment.run(_small(), tmp_path, say=_silent)


def test_images_of_two_channels_are_attacked_without_lpips(tmp_path):
  images = np.random.default_rng(0).uniform(size=(2, 12, 12, 2)).astype(np.float32)
  np.savez(tmp_path / "victims.npz", images=images, labels=np.array([0, 1]))
  config = _small()
  config.data.source, config.data.count = f"npz:{tmp_path}/victims.npz", 2
  summary = experiment.run(config, tmp_path / "run", say=_silent)["dia"]
  assert summary["finished"] == 2 and "lpips" not in summary["metrics"]


def test_the_best_restart_by_objective_wins(tmp_path):
  config = _small(restarts=3)
  config.data.count = 1
  experiment.run(config, tmp_path, say=_silent)
  row = _rows(tmp_path)[0]
  with np.load(tmp_path / "trials" / "dia" / "00000.npz") as file:
    objectives = {int(record[0]): record[1] for record in file["records"]}
  assert set(objectives) == {0, 1, 2}
  assert row["objective"] == min(objectives.values())
  assert objectives[row["restart"]] == row["objective"]


def test_batches_and_free_labels(tmp_path):
  config = _small(name="ig", labels="free")
  config.data.count, config.data.batch_size = 4, 2
  summary = experiment.run(config, tmp_path, say=_silent)
  rows = _rows(tmp_path)
  assert [(row["image"], row["client"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
  assert all(row["label_accuracy"] in (0, 1) for row in rows)
  assert summary["ig"]["metrics"]["label_accuracy"]["count"] == 4


def test_recovered_labels_are_right(tmp_path):
  summary = experiment.run(_small(labels="recovered"), tmp_path, say=_silent)
  assert summary["dia"]["metrics"]["label_accuracy"]["mean"] == 1


def test_failed_images_are_counted_and_have_no_metrics(tmp_path, monkeypatch):
  observe = victims.observe

  def observe_sick(key, *args, **kwargs):
    import dataclasses

    import jax

    observation, secret = observe(key, *args, **kwargs)
    if int(secret.labels[0]) == 2:  # the second digit
      sick = jax.tree.map(lambda x: x * np.nan, observation.gradient)
      observation = dataclasses.replace(observation, gradient=sick)
    return observation, secret

  monkeypatch.setattr(victims, "observe", observe_sick)
  summary = experiment.run(_small(), tmp_path, say=_silent)["dia"]
  assert (summary["attempted"], summary["finished"], summary["failed"]) == (3, 2, 1)
  assert summary["metrics"]["mse_normalized"]["count"] == 2
  row = _rows(tmp_path)[1]
  assert row["status"] == "failed" and row["mse_normalized"] is None and row["objective"] is None


def test_a_damaged_checkpoint_names_its_file_and_keeps_finished_results(tmp_path):
  config = _small()
  experiment.run(config, tmp_path, say=_silent)
  rows = _rows(tmp_path)
  (tmp_path / "trials" / "dia" / "00002.npz").unlink()  # as if killed before the last trial
  checkpoint = tmp_path / "checkpoint" / "dia.npz"
  checkpoint.parent.mkdir(exist_ok=True)
  checkpoint.write_bytes(b"PK\x03\x04 damaged")
  with pytest.raises(InputError, match=f"{checkpoint} is damaged"):
    experiment.run(config, tmp_path, say=_silent)
  assert _rows(tmp_path) == rows[:2]
  checkpoint.unlink()
  experiment.run(config, tmp_path, say=_silent)
  assert _timeless(_rows(tmp_path)) == _timeless(rows)


def test_a_damaged_finished_result_names_its_file(tmp_path):
  experiment.run(_small(), tmp_path, say=_silent)
  path = tmp_path / "trials" / "dia" / "00001.npz"
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(InputError, match=f"{path} is damaged.*all others are kept"):
    experiment.run(_small(), tmp_path, say=_silent)


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "configs").glob("*.py")))
def test_every_config_is_valid(file):
  namespace = {}
  exec((ROOT / "configs" / file).read_text(), namespace)
  config = namespace["get_config"]()
  settings = validate(config)
  for attack in settings.attacks.values():
    paper = (0.1, 1e-5, 1e-4, 800, 4000, 1e-5)
    assert paper == (
      attack.learning_rate, attack.tv_weight, attack.mask_weight, attack.plateau_patience,
      attack.patience, attack.tolerance,
    )  # fmt: skip
  assert attack.max_iterations == (2000 if file == "quickstart.py" else 20_000)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"attack.name": "dai"}, "Unknown attack 'dai'. Did you mean 'dia'"),
    ({"attack.name": "ig,ig"}, "expected each attack once"),
    ({"attack.restarts": 0}, "config.attack.restarts is 0"),
    ({"attack.labels": "gven"}, "attack.labels: 'gven'. Did you mean 'given'"),
    ({"model.name": "mpl"}, "Unknown model 'mpl'"),
    ({"model.dropout_rate": 1.0}, r"dropout_rate is 1.0; expected a number in \[0, 1\)"),
    ({"model.dropout_rate": -0.1}, "dropout_rate is -0.1"),
    ({"data.source": "sample:mnist"}, "Unknown data source"),
    ({"data.count": 0}, "config.data.count is 0"),
    ({"data.count": 30}, "has 20 images"),
    ({"data.batch_size": 2}, "cannot be cut into batches"),
    ({"data.source": "npz:/no/such"}, "/no/such is no file"),
    ({"engine.lanes": 0}, "config.engine.lanes is 0"),
    ({"engine.chunk": 0}, "config.engine.chunk is 0"),
    ({"engine.matching": "fast"}, "config.engine.matching: 'fast'. Choose one of: auto"),
    ({"precision": "bfloat16"}, "config.precision: 'bfloat16'. Did you mean 'float"),
    ({"engine.checkpoint_seconds": -1.0}, "checkpoint_seconds is -1.0"),
    ({"engine.checkpoint_seconds": float("nan")}, "checkpoint_seconds is nan"),
    ({"attack.max_iterations": 10**10}, "max_iterations is 10000000000"),
    ({"seed": -1}, "config.seed is -1"),
  ],
)
def test_bad_settings_write_nothing(change, message, tmp_path):
  config = _small()
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=message):
    experiment.run(config, tmp_path / "run", say=_silent)
  assert not (tmp_path / "run").exists()


def test_unknown_fields_of_a_config_object_are_refused():
  for group in ("data", "attack", "engine"):
    config = default_config()
    config[group] = config[group].to_dict() | {"mispelt": 1}
    with pytest.raises(InputError, match="'mispelt'"):
      validate(config)
  with pytest.raises(InputError, match="'atack'. Did you mean 'attack'"):
    validate(default_config().to_dict() | {"atack": {}})


@pytest.mark.parametrize("workdir", ["/dev/null/run", "/proc/run"])
def test_a_work_directory_that_cannot_be_written_is_refused(workdir):
  with pytest.raises(InputError, match=f"work directory {workdir}"):
    experiment.run(_small(), workdir, say=_silent)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config.atack.name=ig"], "no field 'atack'. Did you mean \"attack\""),
    (["--config.attack.max_iterations=many"], "--config.attack.max_iterations=many"),
    (["--config.attack.name=dai"], "Unknown attack 'dai'"),
    (["--config.model.hidden_sizes=(3,0)"], "expected positive integers"),
    (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
    (["extra"], "unknown arguments ['extra']"),
    (["--config=configs/mlp.py:mnits"], "'mnits'. Did you mean 'mnist'"),
    (["--config=configs/none.py"], "configs/none.py"),
  ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(arguments, message, tmp_path):
  workdir = tmp_path / "run"
  result = _launch(f"--workdir={workdir}", *arguments)
  assert result.returncode == 2
  assert message in result.stderr and result.stderr.startswith("error: ")
  assert len(result.stderr.strip().splitlines()) == 1
  assert not workdir.exists()


def test_a_terminal_gets_a_progress_bar(tmp_path):
  import fcntl
  import pty
  import struct
  import termios

  main, terminal = pty.openpty()
  fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
  process = subprocess.Popen(
    [
      sys.executable, "launch/attack.py", "--config=configs/mlp.py:mnist",
      f"--workdir={tmp_path}/run", "--config.attack.max_iterations=50",
      "--config.data.count=2", "--config.model.hidden_sizes=(32,)",
    ],
    cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal,
  )  # fmt: skip
  os.close(terminal)
  shown = b""
  while True:
    try:
      chunk = os.read(main, 4096)
    except OSError:  # the other end was closed
      break
    if not chunk:
      break
    shown += chunk
  assert process.wait() == 0
  assert "100%|████████████████████| dia: 2 trials done" in shown.decode()


def test_recordings_stand_in_the_order_of_the_originals(tmp_path):
  config = _small(name="dia,closed_form")
  config.data.count, config.data.mask_seeds, config.engine.chunk = 3, 2, 1
  config.engine.lanes = 2
  config.attack.tolerance = 0.02  # so that trials end in any order
  experiment.run(config, tmp_path, say=_silent)
  rows = _rows(tmp_path)
  assert [(r["image"], r["mask_seed"]) for r in rows[:6]] == [
    (v, s) for s in range(2) for v in range(3)
  ]
  assert len({row["iterations"] for row in rows[:6]}) > 1
  with (
    np.load(tmp_path / "reconstructions.npz") as found,
    np.load(tmp_path / "recordings.npz") as recorded,
  ):
    assert found["dia"].shape[0] == 6 and recorded["dia"].shape[0] == 4
    # The last recorded image of a trial that ended early is a few steps older than its best.
    last = recorded["dia"][:, -1] / 255
    errors = [[np.abs(a - b).mean() for b in found["dia"][:3]] for a in last[:3]]
    assert np.argmin(errors, axis=1).tolist() == [0, 1, 2]
  for row in rows:
    if row["attack"] == "closed_form":
      assert row["iterations_to_ssim_0.9"] == 0
      assert row["seconds_to_ssim_0.9"] == row["seconds"]
    reached = row["iterations_to_ssim_0.6"]
    assert (reached is not None) == (row["ssim"] >= 0.6)


def test_images_of_a_source_that_cannot_be_used_are_no_pool(tmp_path):
  folder = tmp_path / "images" / "cat"
  folder.mkdir(parents=True)
  for i, size in enumerate([(28, 28), (28, 28), (32, 28)]):
    pixels = np.random.default_rng(i).integers(0, 255, size, np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  (tmp_path / "images" / "dog").mkdir()
  Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "images" / "dog" / "0.png")
  config = _small(max_iterations=2)
  config.data.source, config.data.count = f"folder:{tmp_path / 'images'}", 2
  experiment.run(config, tmp_path / "run", say=_silent)
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["dia"]["pool"] == 2


def test_an_interval_takes_an_image_under_several_masks_as_one():
  rows = [
    Row(image=v, client=v, mask_seed=s, attack="dia", scores={"ssim": 0.2 + 0.1 * v})
    for v in range(3)
    for s in range(8)
  ]
  one = summarize([row for row in rows if not row.mask_seed], 3)
  many = summarize(rows, 24)
  np.testing.assert_allclose(many.metrics["ssim"].ci95, one.metrics["ssim"].ci95, rtol=1e-9)
