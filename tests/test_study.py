"""Studies: grids of experiments, killed, resumed, and with cells that fail."""

import importlib.util
import json
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from jaxdia import experiment, report, study
from jaxdia.core.errors import InputError
from jaxdia.experiment.config import config_for

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config():
  base = config_for("mlp", "mnist", hidden_sizes=(48, 48), use_bias=False)
  base.data.count = 2
  base.engine.lanes = 1
  base.engine.checkpoint_seconds = 0
  base.attack.name = "dia"
  base.attack.max_iterations = 400
  variants = {variants}
  grid = (("model.dropout_rate", (0.25, 0.5)), ("data.batch_size", (1, 2)))
  return study_config("Tiny", "Does it run?", base, grid=grid, variants=variants)
"""


def _config(path, variants=((),)):
  path.write_text(CONFIG.format(variants=repr(variants)))
  return path


def _launch(config, *arguments, popen=False):
  command = [sys.executable, "launch/evaluate.py", f"--config={config}", *map(str, arguments)]
  if popen:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _rows(workdir):
  rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
  return [
    {k: v for k, v in row.items() if not k.startswith(("seconds", "session"))} for row in rows
  ]


@pytest.mark.slow
def test_a_study_killed_at_three_moments_ends_with_the_table_of_one_left_alone(tmp_path):
  config = _config(tmp_path / "config.py")
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  result = _launch(config, f"--workdir={alone}")
  assert result.returncode == 0, result.stderr
  assert "2/2 dia in 2 cells ended after" in result.stderr and "left" in result.stderr
  kills = 0
  # Some time after the first trace of a cell, of a checkpoint, and of a finished trial.
  for trace in ("cells/000*/config.json", "checkpoint/*.npz", "cells/003*/trials/*/*.npz"):
    process = _launch(config, f"--workdir={killed}", popen=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
      if any(killed.glob(trace)):
        break
      time.sleep(0.01)
    time.sleep(random.uniform(0, 1))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
  assert kills >= 2  # the last may have been quicker
  done = json.loads((killed / "study.json").read_text())["cells"]
  finished = [cell["name"] for cell in done if cell["status"] == "done"]
  files = [*killed.glob("cells/*/trials/*/*.npz")]
  files += [killed / "cells" / name / "summary.json" for name in finished]
  times = {path: path.stat().st_mtime_ns for path in files}
  result = _launch(config, f"--workdir={killed}")
  assert result.returncode == 0, result.stderr
  assert _rows(killed) == _rows(alone) and len(_rows(alone)) == 8
  assert times == {path: path.stat().st_mtime_ns for path in files}  # nothing was repeated
  tables = [pd.read_csv(workdir / "table.csv") for workdir in (alone, killed)]
  pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables))


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path):
  variants = ((), (("data.source", "npz:missing.npz"),), (("data.batch_size", 3),))
  path = _config(tmp_path / "config.py", variants)
  text = path.read_text().replace('("data.batch_size", (1, 2))', '("data.count", (2,))')
  path.write_text(text.replace("max_iterations = 400", "max_iterations = 5"))
  result = _launch(path, f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 3, result.stderr
  cells = json.loads((tmp_path / "run" / "study.json").read_text())["cells"]
  assert [cell["status"] for cell in cells] == ["done"] * 2 + ["failed"] * 4
  assert "missing.npz" in cells[2]["reason"] and "cannot be cut into batches" in cells[4]["reason"]
  assert result.stderr.count("failed: 00") == 4
  assert {row["cell"] for row in _rows(tmp_path / "run")} == {cells[0]["name"], cells[1]["name"]}
  table = pd.read_csv(tmp_path / "run" / "table.csv")
  assert len(table) == 2 and set(table["attempted"]) == {2}
  text = (tmp_path / "run" / "table.md").read_text().splitlines()
  assert len(text) == 4 and text[0].startswith("| cell |")


def _scalars(path):
  """Reads {tag: number of values} from an event file, whose records have a length in front."""
  from tensorboardX.proto.event_pb2 import Event

  data, at, tags = path.read_bytes(), 0, {}
  while at < len(data):
    (size,) = struct.unpack_from("<Q", data, at)
    for value in Event.FromString(data[at + 12 : at + 12 + size]).summary.value:
      tags.setdefault(value.tag, []).append(value.simple_value)
    at += 16 + size
  return tags


def test_a_study_as_files_for_a_repository_and_as_scalars(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["launch/evaluate.py", "--workdir", "/somebody/s/runs"])
  grid = [("model.dropout_rate", (0.1, 0.4)), ("seed", (0, 1))]
  work, docs = tmp_path / "work", tmp_path / "docs"
  study.run(_study(grid=grid), work, say=lambda text: None)
  page = report.publish(work, docs, "rates")
  text = page.read_text()
  assert text.startswith("# T\n\nQ?\n\n    python launch/") and "| DIA | 1/1 |" in text
  assert "somebody" not in text and "    python launch/evaluate.py --workdir=runs/rates\n" in text
  for name in ("rates_dropout_rate_mse_normalized.png", "rates_dropout_rate_ssim.png"):
    assert name in text and (docs / name).read_bytes().startswith(b"\x89PNG")
  assert len(pd.read_csv(docs / "rates.csv")) == 4
  folder = report.write_scalars(work)
  (events,) = sorted(folder.glob("000*/dia/events.*"))
  tags = _scalars(events)
  (cell,) = [c.name for c in study.plan(_study(grid=grid))][:1]
  summary = json.loads((work / "cells" / cell / "summary.json").read_text())
  np.testing.assert_allclose(tags["mean/ssim"], summary["dia"]["metrics"]["ssim"]["mean"], 1e-5)
  assert len(tags["ssim/image_0"]) == 3  # three iterations, all recorded
  with pytest.raises(InputError, match="holds no study"):
    report.publish(work / "cells" / cell, docs, "other")


def test_results_load_into_pandas_with_one_line(tmp_path):
  study.run(_study(grid=[("seed", (0, 1))]), tmp_path, say=lambda text: None)
  rows = pd.read_json(tmp_path / "results.jsonl", lines=True)
  flat = pd.read_csv(tmp_path / "results.csv")
  assert len(rows) == len(flat) == 2
  np.testing.assert_allclose(rows["ssim"], flat["ssim"])
  assert {"mask_accuracy_by_site.dropout_0", "cell", "seed"} <= set(flat)


def test_a_dry_run_prints_the_cells_and_writes_nothing(tmp_path):
  config = _config(tmp_path / "config.py")
  result = _launch(config, "--dry_run", f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 0, result.stderr
  assert "4 cells, about" in result.stdout
  assert "003_dropout_rate=0.5_batch_size=2" in result.stdout
  assert not (tmp_path / "run").exists()


def _shipped(name, *arguments):
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / "studies" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.py")))
def test_all_cells_of_the_shipped_studies_can_be_run(path):
  cells = study.plan(_shipped(path.stem))
  assert len(cells) > 2 and all(cell.settings for cell in cells)
  assert f"--config=configs/studies/{path.name} --workdir=runs/{path.stem}\n" in path.read_text()


@pytest.mark.parametrize("name", ["architectures", "closed_forms"])
def test_the_larger_version_of_a_study_takes_its_size_from_the_base(name):
  config = _shipped(name, "full")
  config.base.data.source, config.base.data.count = "tfds:mnist/test", 128
  assert all(cell.settings.data.count == 128 for cell in study.plan(config))
  assert not all(cell.settings.data.count == 128 for cell in study.plan(_shipped(name)))
  with pytest.raises(InputError, match="size of the study: 'huge'"):
    _shipped(name, "huge")


def _study(**fields):
  base = config_for("mlp", "mnist", hidden_sizes=(16,))
  base.data.count = 1
  base.attack.max_iterations = 3
  return study.study_config("T", "Q?", base, **fields)


def test_cells_are_variants_times_grid():
  variants = ((("attack.name", "ig"),), (("attack.name", "dia"), ("seed", 3)))
  config = _study(grid=[("model.dropout_rate", (0.1, 0.2))], variants=variants)
  cells = study.plan(config)
  assert [cell.overrides for cell in cells] == [
    {"attack.name": "ig", "model.dropout_rate": 0.1},
    {"attack.name": "ig", "model.dropout_rate": 0.2},
    {"attack.name": "dia", "seed": 3, "model.dropout_rate": 0.1},
    {"attack.name": "dia", "seed": 3, "model.dropout_rate": 0.2},
  ]
  assert cells[2].settings.seed == 3 and cells[1].settings.model.dropout_rate == 0.2


def test_an_estimate_grows_with_the_work():
  small, large = study.plan(_study(grid=[("data.count", (1, 4))]))
  assert 0 < study.estimate(small) < study.estimate(large)
  np.testing.assert_allclose(4 * study.estimate(small), study.estimate(large), rtol=1e-6)
  (closed,) = study.plan(_study(variants=((("attack.name", "closed_form"),),)))
  assert study.estimate(closed) == 0


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"grid": [("modle.dropout_rate", (0.1,))]}, "'modle.dropout_rate', but its config has no"),
    ({"grid": [("seed.x", (1,))]}, "'seed.x', but its config has no"),
    ({"variants": (("model.name", "mlp"),)}, "expected pairs such as"),
    ({"variants": (((1, 2),),)}, "expected pairs such as"),
    ({"grid": [("data.count", (float("inf"),))]}, "none of the 1 cells"),
    ({"grid": [("model.dropout_rate", ("high",))]}, "none of the 1 cells"),
    ({"grid": [("model.dropout_rate", ())]}, "none of the 0 cells"),
    ({"grid": [("data.batch_size", (3,))]}, "none of the 1 cells"),
    ({"grid": [("attack.lr", (1,))]}, "lr"),
  ],
)
def test_a_wrong_study_is_refused_at_once(tmp_path, fields, message):
  with pytest.raises(InputError, match=message):
    study.run(_study(**fields), tmp_path / "run", say=lambda text: None)
  assert not (tmp_path / "run").exists()


def test_a_damaged_cell_is_repaired_and_changed_images_are_refused(tmp_path):
  path = tmp_path / "victims.npz"
  images = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype(np.float32)
  np.savez(path, images=images, labels=np.array([0, 1]))
  config = _study(grid=[("seed", (0, 1))])
  config.base.data.source = f"npz:{path}"
  work = tmp_path / "work"
  assert study.run(config, work, say=lambda text: None) == {}
  table = (work / "table.csv").read_text()
  first, second = (work / "cells" / cell.name for cell in study.plan(config))
  (first / "results.jsonl").write_text('{"half')
  (second / "summary.json").unlink()
  assert study.run(config, work, say=lambda text: None) == {}
  assert (work / "table.csv").read_text() == table
  np.savez(path, images=images[::-1], labels=np.array([0, 1]))
  reasons = study.run(config, work, say=lambda text: None)
  assert len(reasons) == 2 and all("another experiment" in r for r in reasons.values())


def test_another_study_is_not_overwritten(tmp_path):
  study.run(_study(), tmp_path, say=lambda text: None)
  with pytest.raises(InputError, match="holds another study"):
    study.run(_study(grid=[("seed", (1,))]), tmp_path, say=lambda text: None)
  with pytest.raises(InputError, match="holds a study"):
    experiment.run(_study().base, tmp_path, say=lambda text: None)
  experiment.run(_study().base, tmp_path / "experiment", say=lambda text: None)
  with pytest.raises(InputError, match="holds an experiment"):
    study.run(_study(), tmp_path / "experiment", say=lambda text: None)
  with pytest.raises(InputError, match="expected a study"):
    study.run(config_for("mlp", "mnist"), tmp_path / "other", say=lambda text: None)
