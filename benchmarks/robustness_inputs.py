"""Part of `robustness.py`: files and settings that are not as they should be."""

import dataclasses
import hashlib
import importlib
import multiprocessing
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence

import numpy as np
from robustness_cases import KINDS, Case, Originals
from robustness_runs import ROOT, RUNS, Check

_LIMIT_SECONDS = 120
_MOST_BYTES = 2 * 2**30
# More than any of them may take, so that the machine is safe.
_MOST_ADDRESSES = 14 * 2**30
# Of so many cases one is a process of its own, from the command line on. The others are forked from
# a process that has imported all, which saves seconds a case.
_SAMPLED = 11
_PRELOADED = ("audit", "command_line", "experiment.text", "report.text", "report", "study")


def run(folder: pathlib.Path, seed: int, number: int) -> Iterator[Check]:
  """Gives malformed files and settings to the commands.

  Args:
    folder: that `set_up` has filled.
    seed: of the mutations.
    number: of cases.

  Yields:
    A check for each.
  """
  originals = _originals(folder)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([f"jaxdia.{name}" for name in _PRELOADED])
  weights = np.array([kind.weight for kind in KINDS.values()], float)
  bounds = np.round(np.cumsum(weights) / weights.sum() * number).astype(int)
  index = 0
  for (name, kind), end in zip(KINDS.items(), bounds, strict=True):
    for i in range(end - index):
      # Plain seeded mutations of real files: a case is known by two numbers, and what to change in
      # a zip with right sums or in a JSON value must be said by hand in any library.
      rng = np.random.default_rng([seed, index])
      place = folder / "cases" / str(index)
      place.mkdir(parents=True)
      case = kind.make(originals, place, rng, i)
      alone = index % _SAMPLED == 0
      faults, how = _try(case, place, None if alone else context)
      what = f"{name}{', a process of its own' if alone else ''}"
      yield Check(what, case.name, faults, note=how)
      if not faults:
        shutil.rmtree(place, ignore_errors=True)
      index += 1


def _originals(folder: pathlib.Path) -> Originals:
  """Makes what the mutations begin with: finished and interrupted work directories."""
  originals = Originals(folder)
  for name, arguments in originals.commands().items():
    command = [sys.executable, *arguments, f"--workdir={folder / name}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  for number in range(2):  # as if it was interrupted twice, once with a checkpoint
    kind, workdir = RUNS["attack: search"], folder / "interrupted"
    command = [*kind.command(folder, workdir), "--config.attack.max_iterations=3000"]
    command += ["--config.engine.chunk=50"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wanted = ("checkpoint/dia.npz", "trials/dia/00000.npz")[number]
    while not (workdir / wanted).exists() and process.poll() is None:
      pass
    process.kill()
    process.communicate()
  originals.interrupted = command[1:]
  return originals


@dataclasses.dataclass(frozen=True)
class _Ended:
  """How a command ended: exit code (None if it hung), what it said, and its most memory."""

  code: int | None
  said: str
  peak: int


def _try(case: Case, place: pathlib.Path, context) -> tuple[list[str], str]:
  """Runs a case, and returns what was wrong with how it ended, and how it ended."""
  before = _digests(case.workdir)
  kept = case.finished(case.workdir) if before else set()
  ended = _alone(case) if context is None else _forked(case, place, context)
  lines = ended.said.strip().splitlines() or [""]
  errors = [line for line in lines if line.startswith("error: ")]
  what = f"exit code {ended.code}: {' / '.join(lines[-4:])!r}"
  faults = []
  if ended.code is None:
    faults.append(f"it took more than {_LIMIT_SECONDS} s")
  elif ended.code == 0 or (ended.code == 3 and case.may_fail):
    if not case.may_be_valid:
      faults.append(f"it was taken as valid, {what}")
  elif ended.code != 2 or lines[-1:] != errors or (len(lines) > 1 and not before):
    faults.append(what)
  if "Traceback" in ended.said and not faults:
    faults.append(what)
  if any(not c.isprintable() for line in errors for c in line):
    faults.append(f"the line has control characters: {errors}")
  if ended.peak > _MOST_BYTES:
    faults.append(f"it took {ended.peak / 2**30:.1f} GiB")
  if ended.code == 2 and not before and case.workdir.exists():
    faults.append(f"it left {sorted(map(str, case.workdir.rglob('*')))}")
  if before:
    faults += [f"it lost {one[:160]}" for one in kept - case.finished(case.workdir)]
    faults += [f"it left {p.name}" for p in case.workdir.rglob(".*.tmp")]
  return faults, {0: "valid", 2: "refused", 3: "said of a cell"}.get(ended.code or 0, "")


def _digests(folder: pathlib.Path) -> dict[str, str]:
  files = (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else ()
  return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _alone(case: Case) -> _Ended:
  command = [sys.executable, f"launch/{case.command}.py", *case.arguments]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  _limit(process.pid)
  try:
    _, said = process.communicate(timeout=_LIMIT_SECONDS)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    return _Ended(None, "", 0)
  return _Ended(process.returncode, said.decode(errors="replace"), 0)


def _forked(case: Case, place: pathlib.Path, context) -> _Ended:
  arguments = (case.command, list(case.arguments), str(place))
  process = context.Process(target=_run_forked, args=arguments)
  process.start()
  process.join(_LIMIT_SECONDS)
  if process.is_alive():
    process.kill()
    process.join()
    return _Ended(None, "", 0)
  said = (place / "stderr").read_bytes().decode(errors="replace")
  peak = int((place / "peak").read_text() or 0) if (place / "peak").exists() else 0
  return _Ended(process.exitcode, said, peak)


def _limit(process: int) -> None:
  """Lets a process, or with 0 this one, fail before the machine is out of memory."""
  resource.prlimit(process, resource.RLIMIT_AS, (_MOST_ADDRESSES, _MOST_ADDRESSES))
  resource.prlimit(process, resource.RLIMIT_CORE, (0, 0))


def _run_forked(command: str, arguments: Sequence[str], place: str) -> None:
  """Is the process of a command, but for its imports."""
  os.chdir(ROOT)
  for number, name in ((1, "stdout"), (2, "stderr")):
    file = os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, number)
  _limit(0)
  sys.argv = [f"launch/{command}.py", *arguments]
  code = 1
  try:
    importlib.import_module(f"jaxdia.commands.{command}").run()
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pathlib.Path(place, "peak").write_text(str(peak))
    os._exit(code or 0)
