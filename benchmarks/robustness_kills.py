"""Part of `robustness.py`: runs that are killed, and go on."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator

import numpy as np
from robustness_runs import ROOT, RUNS, Check, Run, differences, finish, leftovers, repeated_rows

_LIMIT_SECONDS = 300
_MOST_IN_A_ROW = 3


def run(folder: pathlib.Path, seed: int, number: int) -> Iterator[Check]:
  """Kills runs at moments drawn over the length of an uninterrupted one, and lets them end.

  Args:
    folder: that `set_up` has filled.
    seed: of the moments.
    number: of kills.

  Yields:
    A check for each kill. What is wrong with a run that was let finish is a fault of its last.
  """
  rng = np.random.default_rng(seed)
  lengths = {}
  for name, kind in RUNS.items():
    alone = _workdir(folder, name, "alone")
    for _ in range(2):  # the first one compiles
      subprocess.run(["rm", "-rf", alone], check=True)
      start = time.monotonic()
      code, text = _finish(kind, folder, alone)
      lengths[name] = time.monotonic() - start
    if code:
      yield Check(name, "without a kill", [f"it ended with {code}: {text}"])
      return
  done, rounds = dict.fromkeys(RUNS, 0), 0
  while sum(done.values()) < number:
    name = min(done, key=lambda kind: done[kind])  # the kind that was killed least
    left = number - sum(done.values())
    workdir = _workdir(folder, name, str(rounds))
    checks = list(_round(name, folder, workdir, lengths[name], rng, min(_MOST_IN_A_ROW, left)))
    done[name] += len(checks)
    rounds += 1
    yield from checks


def _round(
  name: str,
  folder: pathlib.Path,
  workdir: pathlib.Path,
  length: float,
  rng: np.random.Generator,
  most: int,
) -> Iterator[Check]:
  """Kills a run some times, and lets it finish; one that ends before its kill has finished."""
  kind, kept, kills = RUNS[name], set(), []
  for _ in range(most):
    moment = rng.uniform(0, length)
    process = _start(kind, folder, workdir)
    try:
      process.communicate(timeout=moment)
      break
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)  # and what it has started itself
      process.communicate()
    faults = [f"the kill lost {one[:160]}" for one in kept - kind.finished(workdir)]
    kept |= kind.finished(workdir)
    at_work = (workdir / "lock.json").exists()
    kills.append((f"{moment:.2f} s after its start, {workdir.name}", faults, at_work))
  code, text = _finish(kind, folder, workdir)
  faults = [f"it ended with {code}: {text}"] if code else []
  if not code:
    faults += differences(_workdir(folder, name, "alone"), workdir)
    faults += leftovers(workdir) + repeated_rows(workdir)
    faults += [f"it lost {one[:160]}" for one in kept - kind.finished(workdir)]
  for i, (case, found, at_work) in enumerate(kills):
    last = i == len(kills) - 1
    what = f"{name}, killed {'at work' if at_work else 'as it started or ended'}"
    yield Check(what, case, [*found, *(faults if last else ())])
  if faults and not kills:
    yield Check(f"{name}, not killed", workdir.name, faults)


def _workdir(folder: pathlib.Path, name: str, which: str) -> pathlib.Path:
  return folder / name.replace(" ", "_").replace(":", "") / which


def _start(kind: Run, folder: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    kind.command(folder, workdir),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )


def _finish(kind: Run, folder: pathlib.Path, workdir: pathlib.Path) -> tuple[int, str]:
  """Lets a run end; returns its exit code and the last line that it said."""
  code, text = finish(_start(kind, folder, workdir), _LIMIT_SECONDS)
  return code, (text.strip().splitlines() or [""])[-1]
