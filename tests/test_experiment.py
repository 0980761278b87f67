"""End to end, as a user runs it: the launcher on real images."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from experiment_cases import ROOT, launch, rows_of, silent, small
from PIL import Image

from jaxdia import data, experiment
from jaxdia.experiment import clients
from jaxdia.experiment.schema import Row
from jaxdia.experiment.summary import summarize

FIELDS = [
  "image", "client", "label", "attack", "model", "dropout_rate", "batch_size", "mse_normalized",
  "mse", "psnr", "ssim", "lpips", "mask_accuracy", "objective", "gradient_distance", "iterations",
  "seconds", "status",
]  # fmt: skip


def test_launcher_reconstructs_real_images(tmp_path):
  workdir = tmp_path / "run"
  result = launch(
    f"--workdir={workdir}",
    "--config.attack.name=ig,wiig,dia",
    "--config.attack.max_iterations=1500",  # after 1,000 an error is still near the threshold
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

  rows = rows_of(workdir)
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


@pytest.mark.slow
def test_double_precision_starts_from_the_same_point(tmp_path):
  results = {}
  for precision in ("float32", "float64"):
    config = small(max_iterations=8)
    config.precision = precision
    experiment.run(config, tmp_path / precision, say=silent)
    with np.load(tmp_path / precision / "trials" / "dia" / "00000.npz") as file:
      assert file["images"].dtype == file["masks/dropout_0"].dtype == precision
      results[precision] = file["images"], rows_of(tmp_path / precision)[0]["objective"]
  assert not jax.config.jax_enable_x64  # as it was before
  images, objectives = zip(*results.values(), strict=True)
  np.testing.assert_allclose(images[0], images[1], atol=0.01)
  np.testing.assert_allclose(objectives[0], objectives[1], rtol=1e-4)
  assert objectives[0] != objectives[1]


def test_images_of_two_channels_are_attacked_without_lpips(tmp_path):
  images = np.random.default_rng(0).uniform(size=(2, 12, 12, 2)).astype(np.float32)
  np.savez(tmp_path / "victims.npz", images=images, labels=np.array([0, 1]))
  config = small()
  config.data.source, config.data.count = f"npz:{tmp_path}/victims.npz", 2
  summary = experiment.run(config, tmp_path / "run", say=silent)["dia"]
  assert summary["finished"] == 2 and "lpips" not in summary["metrics"]


def test_rows_of_a_folder_name_the_classes(tmp_path):
  """Of more than ten, 10 and 11 do not come before 2; and a source without names has no column."""
  for name in range(12):
    folder = tmp_path / "pictures" / str(name)
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(name).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
  config = small(max_iterations=1)
  config.data.source, config.data.count, config.data.offset = f"folder:{tmp_path}/pictures", 10, 2
  experiment.run(config, tmp_path / "run", say=silent)
  found = [(row["image"], row["label"], row["label_name"]) for row in rows_of(tmp_path / "run")]
  assert found == [(n, n, str(n)) for n in range(2, 12)]
  path = tmp_path / "unnamed.npz"
  np.savez(path, images=np.zeros((2, 8, 8, 1), np.uint8) + 99, labels=np.array([0, 1]))
  config.data.source, config.data.count, config.data.offset = f"npz:{path}", 2, 0
  experiment.run(config, tmp_path / "unnamed", say=silent)
  assert all("label_name" not in row for row in rows_of(tmp_path / "unnamed"))


def test_the_best_restart_by_objective_wins(tmp_path):
  config = small(restarts=3)
  config.data.count = 1
  experiment.run(config, tmp_path, say=silent)
  row = rows_of(tmp_path)[0]
  with np.load(tmp_path / "trials" / "dia" / "00000.npz") as file:
    objectives = {int(record[0]): record[1] for record in file["records"]}
  assert set(objectives) == {0, 1, 2}
  assert row["objective"] == min(objectives.values())
  assert objectives[row["restart"]] == row["objective"]


def test_times_are_those_of_running_compiling_and_scoring(tmp_path):
  said = []
  times = experiment.run(small(), tmp_path, say=said.append)["dia"]
  assert min(times[f"{kind}_seconds"] for kind in ("run", "compile", "scoring")) > 0
  kept = json.loads((tmp_path / "trials" / "dia" / "times.json").read_text())
  assert kept == {name: times[name] for name in kept} and "scoring_seconds" in kept
  assert re.search(r"^time: .* run \+ .* compile \+ .* scoring$", said[-1])
  # Nothing is scored again.
  assert (
    experiment.run(small(), tmp_path, say=silent)["dia"]["scoring_seconds"]
    == kept["scoring_seconds"]
  )
  # What is scored again is counted, and times of older results have none of it.
  (tmp_path / "results.jsonl").unlink()
  path = tmp_path / "trials" / "dia" / "times.json"
  path.write_text(json.dumps({"run_seconds": 2.0, "compile_seconds": 3.0}))
  again = experiment.run(small(), tmp_path, say=silent)["dia"]
  assert again["run_seconds"] == 2.0 and again["compile_seconds"] >= 3.0
  assert again["scoring_seconds"] > 0


def test_batches_and_free_labels(tmp_path):
  config = small(name="ig", labels="free")
  config.data.count, config.data.batch_size = 4, 2
  summary = experiment.run(config, tmp_path, say=silent)
  rows = rows_of(tmp_path)
  assert [(row["image"], row["client"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
  assert all(row["label_accuracy"] in (0, 1) for row in rows)
  assert summary["ig"]["metrics"]["label_accuracy"]["count"] == 4


def test_recovered_labels_are_right(tmp_path):
  summary = experiment.run(small(labels="recovered"), tmp_path, say=silent)
  assert summary["dia"]["metrics"]["label_accuracy"]["mean"] == 1


def test_failed_images_are_counted_and_have_no_metrics(tmp_path, monkeypatch):
  observe = clients.observe

  def observe_sick(key, *args, **kwargs):
    import dataclasses

    import jax

    observation, secret = observe(key, *args, **kwargs)
    if int(secret.labels[0]) == 2:  # the second digit
      sick = jax.tree.map(lambda x: x * np.nan, observation.gradient)
      observation = dataclasses.replace(observation, gradient=sick)
    return observation, secret

  monkeypatch.setattr(clients, "observe", observe_sick)
  summary = experiment.run(small(), tmp_path, say=silent)["dia"]
  assert (summary["attempted"], summary["finished"], summary["failed"]) == (3, 2, 1)
  assert summary["metrics"]["mse_normalized"]["count"] == 2
  row = rows_of(tmp_path)[1]
  assert row["status"] == "failed" and row["mse_normalized"] is None and row["objective"] is None


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
  config = small(name="dia,closed_form")
  config.data.count, config.data.mask_seeds, config.engine.chunk = 3, 2, 1
  config.engine.lanes = 2
  config.attack.tolerance = 0.02  # so that trials end in any order
  experiment.run(config, tmp_path, say=silent)
  rows = rows_of(tmp_path)
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
  config = small(max_iterations=2)
  config.data.source, config.data.count = f"folder:{tmp_path / 'images'}", 2
  experiment.run(config, tmp_path / "run", say=silent)
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
