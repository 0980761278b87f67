"""Part of `robustness.py`: work directories on a disk that is full."""

import builtins
import contextlib
import errno
import io
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from unittest import mock

import jax
from robustness_runs import ROOT, RUNS, Check, differences, leftovers

from jaxdia import audit, command_line, experiment, study
from jaxdia.experiment.config import config_for
from jaxdia.experiment.text import default_config, run_text
from jaxdia.report import write_audit_report, write_report
from jaxdia.report.text import write_text_report

# Shares of the bytes of a whole run that a real disk has.
_SHARES = (0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
_MOUNTED_BYTES = 256 * 2**20
# An npz is written in some dozen pieces, of which the first, a header, and the second are tried.
_COUNTED = 2


def run(folder: pathlib.Path, seed: int, number: int) -> Iterator[Check]:
  """Runs each program once for each of its writes, which fails as all after it do.

  Args:
    folder: that `set_up` has filled.
    seed: not used, as all writes are tried.
    number: not used.

  Yields:
    A check for each write, and for some sizes of a real disk.
  """
  del seed, number
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
  # What the launchers choose; it is chosen once in a process.
  devices = {"JAX_NUM_CPU_DEVICES": str(jax.local_device_count())}
  with mock.patch.dict(os.environ, devices):
    for name, program in _programs(folder).items():
      yield from _each_write(name, program, folder / "full" / name.replace(" ", "_"))
    yield from _on_a_small_disk(folder)


class FullDisk:
  """Lets the system refuse to write in a folder, as if its disk was full, from some write on.

  The write at which the disk becomes full still writes half of what it was given, as it does on a
  real disk.

  Attributes:
    writes: how many there were: files and folders made, the first `_COUNTED` times that bytes were
      written to each file, and files synced. Later bytes of a file are refused with the last that
      are counted.
  """

  def __init__(self, folder: pathlib.Path, first: int | None):
    """Refuses nothing yet.

    Args:
      folder: in which writes are counted.
      first: number of the first write that fails, from 0; None if none does.
    """
    self._folder, self._first = str(folder), first
    self.writes = 0

  def _count(self) -> bool:
    """Counts a write, and returns whether the disk is full."""
    self.writes += 1
    return self._first is not None and self.writes > self._first

  def _check(self, path: object) -> None:
    if self._is_here(path) and self._count():
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

  def _is_here(self, path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._folder)

  def _open(self, path, mode="r", *arguments, **more):
    if not self._is_here(path) or not set(mode) & set("wax+"):
      return self._real_open(path, mode, *arguments, **more)
    if not os.path.exists(path):
      self._check(path)
    disk = self

    class File(io.FileIO):
      pieces = 0

      def write(self, data):
        self.pieces += 1
        if self.pieces > _COUNTED:
          disk.writes -= 1
        if not disk._count():
          return super().write(data)
        if disk.writes == disk._first + 1 and self.pieces <= _COUNTED:  # there is room for half
          disk.writes += 1
          return super().write(memoryview(data)[: max(1, len(data) // 2)])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = io.BufferedWriter(File(path, mode.replace("b", "")), 2**22)
    return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

  @contextlib.contextmanager
  def __call__(self) -> Iterator[None]:
    """Stands between this process and the system."""
    self._real_open, fsync, mkdir, low_open = builtins.open, os.fsync, os.mkdir, os.open

    def checked_fsync(number):
      self._check(os.readlink(f"/proc/self/fd/{number}"))
      fsync(number)

    def checked_mkdir(path, *arguments, **more):
      if not os.path.exists(path):
        self._check(path)
      mkdir(path, *arguments, **more)

    def checked_low_open(path, flags, *arguments, **more):
      if flags & os.O_CREAT and not os.path.exists(path):
        self._check(path)
      return low_open(path, flags, *arguments, **more)

    with (
      mock.patch.object(builtins, "open", self._open),
      mock.patch.object(io, "open", self._open),
      mock.patch.object(os, "fsync", checked_fsync),
      mock.patch.object(os, "mkdir", checked_mkdir),
      mock.patch.object(os, "open", checked_low_open),
    ):
      yield


def _programs(folder: pathlib.Path) -> dict[str, Callable[[pathlib.Path], int | None]]:
  """Returns what is run, each with a work directory."""

  def silent(text):
    del text

  config = config_for("mlp", "mnist", hidden_sizes=(64, 64), use_bias=False)
  config.data.count, config.engine.lanes, config.engine.checkpoint_seconds = 1, 1, 0.0
  config.attack.name, config.attack.max_iterations = "dia,closed_form", 20

  def run_study(workdir):
    base = config.copy_and_resolve_references()
    base.attack.name = "dia"
    grid = [("model.dropout_rate", (0.25, 0.5))]
    failed = study.run(study.study_config("Full", "Full?", base, grid=grid), workdir, say=silent)
    return 3 if failed else 0

  audited = audit.default_config()
  audited.model.name, audited.model.dropout_rate = "mlp", 0.5
  audited.model.hidden_sizes = (64, 64)
  audited.image_shape, audited.num_classes, audited.batch_size = (28, 28, 1), 10, 2
  audited.seconds, audited.statistics = 0.0, "mnist"
  audited.before = str(folder / "before.npz")
  audited.gradient = f"{folder}/gradient_0.npz,{folder}/gradient_1.npz"

  def run_audit(workdir):
    audit.run(audited, workdir, say=silent)
    write_audit_report(workdir)

  text = default_config()
  text.data.count, text.data.batch_size, text.data.length = 2, 1, 6
  text.data.vocabulary, text.attack.name = 300, "tokens"
  text.model.update({"width": 64, "depth": 1, "num_heads": 2, "mlp_size": 64, "num_classes": 2})

  def read_text(workdir):
    run_text(text, workdir, say=silent)
    write_text_report(workdir)

  def run_and_report(workdir):
    short = config.copy_and_resolve_references()
    short.attack.name = "closed_form"
    experiment.run(short, workdir, say=silent)
    write_report(workdir)

  return {
    "attack": lambda workdir: experiment.run(config, workdir, say=silent) and None,
    "study": run_study,
    "audit with its report": run_audit,
    "text with its report": read_text,
    "attack with its report": run_and_report,
  }


def _guarded(program: Callable, workdir: pathlib.Path) -> tuple[int, str]:
  """Runs a program as a launcher does; returns its exit code and what it said as an error."""
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    try:
      code = command_line._guarded(lambda: program(workdir))
    except Exception as error:
      return 1, f"{type(error).__name__}: {error}"
  return code, said.getvalue()


def _each_write(name: str, program: Callable, folder: pathlib.Path) -> Iterator[Check]:
  what = f"{name}, from a write on"
  alone = folder / "alone"
  counted = FullDisk(alone, None)
  with counted():
    code, said = _guarded(program, alone)
  if code:
    yield Check(what, "on an empty disk", [f"it ended with {code}: {said}"])
    return
  for first in range(counted.writes):
    workdir = folder / f"{first:04d}"
    with FullDisk(workdir, first)():
      code, said = _guarded(program, workdir)
    faults = refusal_faults(code, said) if code in (1, 2) else []
    code, said = _guarded(program, workdir)
    if code:
      faults.append(f"with space it ended with {code}: {said.strip()}")
    else:
      faults += differences(alone, workdir) + leftovers(workdir)
    yield Check(what, f"write {first}", faults)
    shutil.rmtree(workdir, ignore_errors=True)


def refusal_faults(code: int, said: str) -> list[str]:
  """Returns what is wrong with how a program ended that could not go on.

  Args:
    code: its exit code.
    said: on standard error.
  """
  lines = said.strip().splitlines() or [""]
  errors = [line for line in lines if line.startswith("error: ")]
  if code != 2 or "Traceback" in said or lines[-1:] != errors:
    return [f"it ended with {code} and said {' / '.join(lines[-3:])!r}"]
  return []


def _on_a_small_disk(folder: pathlib.Path) -> Iterator[Check]:
  """Runs the launchers on a file system in memory, at first of too few bytes."""
  kind, alone, place = RUNS["attack: closed form and hybrid"], folder / "whole", folder / "small"
  what = "attack, on a small file system"
  subprocess.run(kind.command(folder, alone), cwd=ROOT, check=True, capture_output=True)
  size = sum(path.stat().st_size for path in alone.rglob("*") if path.is_file())
  place.mkdir()
  for share in _SHARES:
    case = f"{share:.0%} of the {size / 2**20:.1f} MiB of a whole run"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", str(place)]
    try:
      mounted = subprocess.run(mount, capture_output=True, text=True)
      if mounted.returncode:
        yield Check(what, case, skipped=f"no right to mount ({mounted.stderr.strip()})")
        return
    except FileNotFoundError:
      yield Check(what, case, skipped="there is no mount")
      return
    try:
      command = kind.command(folder, place / "run")
      ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
      faults = refusal_faults(ended.returncode, ended.stderr)
      grow = ["mount", "-o", f"remount,size={_MOUNTED_BYTES}", str(place)]
      subprocess.run(grow, check=True)
      ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
      if ended.returncode:
        faults.append(f"with space it ended with {ended.returncode}: {ended.stderr.strip()}")
      else:
        faults += differences(alone, place / "run") + leftovers(place / "run")
    finally:
      subprocess.run(["umount", str(place)], check=True)
    yield Check(what, case, faults)
