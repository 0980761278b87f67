"""What the parts of `robustness.py` share: checks, small runs, and how their results compare."""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
# Half-written files, and the notice of who works in a folder.
_LEFTOVERS = ("**/.*", "**/*.tmp", "**/lock.json")
# What an interruption may change, as may the folder: times, which call made it, and the command.
_OF_A_CALL = re.compile(r"seconds|^(session|manifest|command|started|dates?)$")
_FILES_OF_A_CALL = (
  "lock",
  "manifest.json",
  "sessions.jsonl",
  "report.html",
  "table.md",
  "times.json",
)
_RECORD_COLUMNS_OF_A_CALL = 2  # seconds and session, the last of a trial's record

STUDY = """
from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config():
  base = config_for("mlp", "mnist", hidden_sizes=(64, 64), use_bias=False)
  base.data.count = 2
  base.attack.name = "dia,closed_form"
  base.attack.max_iterations = 10_000
  base.attack.tolerance = 0.0
  base.engine.lanes = 1
  base.engine.checkpoint_seconds = 0.0
  return study_config("Kills", "What is left?", base, grid=[("model.dropout_rate", (0.25, 0.5))])
"""


@dataclasses.dataclass(frozen=True)
class Check:
  """One thing that was tried.

  Attributes:
    what: the row of the table that it is counted in.
    case: which one it was.
    faults: what was not as it must be, each in a line.
    skipped: why it could not be tried; empty if it was.
    note: how it went; the row counts each.
  """

  what: str
  case: str
  faults: Sequence[str] = ()
  skipped: str = ""
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
  """A kind of run that is interrupted: what is typed, and what must not be lost.

  Attributes:
    launcher: file of launch/.
    arguments: besides --workdir, given the folder that `set_up` has filled.
    finished: of a work directory, what is finished in it, as texts that never change again.
  """

  launcher: str
  arguments: Callable[[pathlib.Path], list[str]]
  finished: Callable[[pathlib.Path], set[str]]

  def command(self, folder: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """Returns what is typed.

    Args:
      folder: that `set_up` has filled.
      workdir: of the run.
    """
    program = str(ROOT / "launch" / self.launcher)
    return [sys.executable, program, *self.arguments(folder), f"--workdir={workdir}"]


def _finished_images(workdir: pathlib.Path) -> set[str]:
  """Returns the rows that are whole, times included, and what is in the files of trials."""
  found = set()
  for path in workdir.rglob("results.jsonl"):
    if path.parent == workdir and (workdir / "cells").exists():
      continue  # a study's, which is made from those of its cells
    where = path.parent.relative_to(workdir)
    found |= {f"{where}: {line}" for line in path.read_text().splitlines() if line.endswith("}")}
  for path in workdir.rglob("trials/*/*.npz"):
    if not path.name.startswith("."):
      found.add(f"{path.relative_to(workdir)}: {hashlib.sha256(path.read_bytes()).hexdigest()}")
  return found


def _finished_updates(workdir: pathlib.Path) -> set[str]:
  path = workdir / "audit.json"
  return set(map(json.dumps, json.loads(path.read_text())["updates"])) if path.exists() else set()


_SMALL = ["--config=configs/mlp.py:mnist", "--config.model.use_bias=False"]
_SMALL += ["--config.engine.lanes=1", "--config.engine.checkpoint_seconds=0"]
# Another kind of run is another line here, and its rows in the tables come of themselves.
RUNS = {
  "attack: search": Run(
    "attack.py",
    lambda folder: [
      *_SMALL,
      *("--config.attack.name=dia", "--config.attack.tolerance=0.0", "--config.data.count=4"),
      *("--config.model.hidden_sizes=(128,128)", "--config.attack.max_iterations=15000"),
    ],
    _finished_images,
  ),
  "attack: closed form and hybrid": Run(
    "attack.py",
    lambda folder: [
      *_SMALL,
      *("--config.attack.name=closed_form,hybrid", "--config.model.dropout_rate=0.5"),
      *("--config.model.hidden_sizes=(128,128)", "--config.data.count=4"),
      "--config.attack.max_iterations=1000",
    ],
    _finished_images,
  ),
  "attack on a cluster": Run(
    "attack.py",
    lambda folder: [
      *_SMALL,
      *("--config.attack.name=dia", "--config.attack.tolerance=0.0", "--config.data.count=8"),
      *("--config.model.hidden_sizes=(128,128)", "--config.attack.max_iterations=5000"),
      "--cluster=local:2",
    ],
    _finished_images,
  ),
  "study": Run("evaluate.py", lambda folder: [f"--config={folder}/study.py"], _finished_images),
  "audit": Run(
    "audit.py",
    lambda folder: [
      *("--config=configs/audit.py", "--config.model.hidden_sizes=(64,64)"),
      *("--config.seconds=0", "--config.batch_size=2", "--config.statistics=mnist"),
      f"--config.before={folder}/before.npz",
      "--config.gradient=" + ",".join(f"{folder}/gradient_{i}.npz" for i in range(_UPDATES)),
    ],
    _finished_updates,
  ),
}
_UPDATES = 4


def set_up(folder: pathlib.Path) -> None:
  """Lets all programs keep what they compile in a folder, and writes what the runs read there.

  Args:
    folder: an empty one.
  """
  # One cache for all runs, so that they begin soon after they are started.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  (folder / "study.py").write_text(STUDY)
  # In a process of its own: this one must stay free of a backend, as it is forked.
  subprocess.run([sys.executable, __file__, folder], check=True, cwd=ROOT)


def _write_updates(folder: pathlib.Path) -> None:
  """Writes the weights of an MLP and the gradients of some clients."""
  import jax

  from jaxdia import data, models
  from jaxdia.client import observe
  from jaxdia.models.entries import arrays_of

  victims = data.load("samples:mnist", 2 * _UPDATES)
  images = data.normalize(victims.images, victims.statistics)
  model = models.create("mlp", images.shape[1:], 10, dropout_rate=0.5, hidden_sizes=(64, 64))
  params = model.init(jax.random.key(0))
  trees = {"before": params}
  for i in range(_UPDATES):
    mine = slice(2 * i, 2 * i + 2)
    observation, _ = observe(
      jax.random.key(i), model, params, images[mine], victims.labels[mine],
      statistics=victims.statistics,
    )  # fmt: skip
    trees[f"gradient_{i}"] = observation.gradient
  for name, tree in trees.items():
    arrays = arrays_of(model.network.entries(), tree)
    np.savez(folder / f"{name}.npz", **{key: np.asarray(value) for key, value in arrays.items()})


def finish(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
  """Lets a program end that leads a group of processes; returns its exit code, and what it said.

  Args:
    process: with its output in a pipe.
    seconds: after which it, and what it has started, is killed; the code is -1 then.
  """
  try:
    said, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return -1, f"it took more than {seconds} s"
  return process.returncode, said.decode(errors="replace")


def leftovers(workdir: pathlib.Path) -> list[str]:
  """Returns the files of a work directory that should not outlast a run.

  Args:
    workdir: in which nobody works.
  """
  found = {path for pattern in _LEFTOVERS for path in workdir.glob(pattern) if path.is_file()}
  return [f"{path.relative_to(workdir)} was left" for path in sorted(found)]


def differences(alone: pathlib.Path, other: pathlib.Path) -> list[str]:
  """Returns in what two finished runs differ, but for what an interruption may change.

  Args:
    alone: work directory of the one that was not interrupted.
    other: of the other.
  """
  mine, theirs = _files(alone), _files(other)
  faults = [f"{name} is missing" for name in sorted(mine - theirs) if "times.json" not in name]
  faults += [f"{name} should not be there" for name in sorted(theirs - mine)]
  for name in sorted(mine & theirs):
    if pathlib.Path(name).name not in _FILES_OF_A_CALL:
      a, b = _content(alone / name), _content(other / name)
      if a != b:
        faults.append(f"{name} differs")
  return faults


def repeated_rows(workdir: pathlib.Path) -> list[str]:
  """Returns which images have more than one row of an attack in results.jsonl.

  Args:
    workdir: of a run that has ended.
  """
  faults = []
  for path in workdir.rglob("results.jsonl"):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [tuple(row.get(k) for k in ("cell", "attack", "mask_seed", "image")) for row in rows]
    twice = {key for key in keys if keys.count(key) > 1}
    faults += [f"{path.relative_to(workdir)} has {key} twice" for key in sorted(twice, key=str)]
  return faults


def _files(folder: pathlib.Path) -> set[str]:
  return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _content(path: pathlib.Path) -> Any:
  """Returns what a file holds, in a form in which equal is equal to the bit."""
  if path.suffix == ".json":
    return _timeless(json.loads(path.read_text()))
  if path.suffix == ".jsonl":
    return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
  if path.suffix == ".csv":
    return [_timeless(row) for row in csv.DictReader(path.read_text().splitlines())]
  if path.suffix == ".npz":
    with np.load(path) as file:
      arrays = {name: file[name] for name in file.files if not _OF_A_CALL.search(name)}
    if "records" in arrays:
      arrays["records"] = arrays["records"][:, :-_RECORD_COLUMNS_OF_A_CALL]
    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
  return path.read_bytes()


def _timeless(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _timeless(v) for k, v in value.items() if not _OF_A_CALL.search(k)}
  return [_timeless(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
  _write_updates(pathlib.Path(sys.argv[1]))
