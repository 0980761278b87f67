"""Runs a study, group after group of cells."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import msgspec
import pandas as pd

from jaxdia import evaluation, experiment
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import write_atomically, write_json, write_json_lines
from jaxdia.core.machine import forget_programs
from jaxdia.experiment import Experiment
from jaxdia.experiment.clients import digest, load_images
from jaxdia.experiment.lock import Lock, cannot_write
from jaxdia.experiment.manifest import add_session, manifest
from jaxdia.experiment.network import source_digest
from jaxdia.experiment.progress import ProgressReport
from jaxdia.experiment.schema import StudyCell, StudyFile
from jaxdia.experiment.store import differences
from jaxdia.experiment.table import markdown
from jaxdia.report import Cell as Read
from jaxdia.report import read_experiment
from jaxdia.study.cost import estimate
from jaxdia.study.groups import Group, group
from jaxdia.study.plan import Cell, plan


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, str]:
  """Runs what is left of a study.

  In the work directory are afterwards `study.json`, `sessions.jsonl`, `results.jsonl` and
  `results.csv` with all rows, `table.md` and `table.csv` with a line for each cell and attack,
  and `cells/`, a work directory of each experiment. The same call goes on where it was
  interrupted, and tries again what failed.

  Args:
    config: of `study_config`.
    workdir: made if needed; refused if it belongs to another study, or if another process is
      in it.
    say: called with what a person should read.

  Returns:
    {cell name: reason} of those that failed.

  Raises:
    InputError: see `plan`; or the work directory cannot be used.
  """
  cells, workdir = plan(config), pathlib.Path(workdir)
  study = _Study(config, cells, workdir)
  with contextlib.closing(study):
    study.begin()
    return _run(study, cells, say)


def _run(study: "_Study", cells: Sequence[Cell], say: Callable[[str], None]) -> dict[str, str]:
  groups = group(cells)
  costs = [sum(estimate(cells[n], one.attack) for n in one.cells) for one in groups]
  progress = ProgressReport([one.describe(cells) for one in groups], costs)
  try:
    for number, cell in enumerate(cells):
      if cell.settings is None:
        study.fail(number, InputError(cell.reason), progress.say)
    for number, one in enumerate(groups):
      progress.start(number)
      progress.finish(number, study.run_group(one, progress))
      forget_programs()
  finally:
    progress.close()
  if not study.failures():
    shutil.rmtree(study.workdir / "checkpoint", ignore_errors=True)
  table = study.write()
  names = ["cell", "attack", *(column.key for _, column in evaluation.columns("study"))]
  shown = table[[name for name in names if name in table]].dropna(axis="columns", how="all")
  say("\n" + shown.to_string(index=False, float_format="{:.3g}".format, na_rep="-"))
  say(f"\nnumbers: {study.workdir / 'table.csv'}, {study.workdir / 'results.csv'}")
  return study.failures()


class _Study:
  """The files of a study, and those of its experiments that are open."""

  def __init__(self, config: ml_collections.ConfigDict, cells: list[Cell], workdir: pathlib.Path):
    """Looks whether the work directory is free or this study's; nothing is written."""
    self.workdir = workdir
    self._cells = cells
    self._lock = Lock(workdir)
    # By number of the cell: those that run, and what was read of those that are done.
    self._open: dict[int, Experiment] = {}
    self._read: dict[int, Read] = {}
    self._failed: set[int] = set()  # in this call
    of_cells: Any = config.base
    base = json.loads(of_cells.to_json_best_effort())
    # Of the engine, what changes results by rounding.
    base["engine"] = {name: base["engine"].get(name) for name in ("lanes", "matching", "convolve")}
    pending = [
      StudyCell(name=cell.name, overrides=cell.overrides, status="pending") for cell in cells
    ]
    self._new = StudyFile(
      title=config.title, question=config.question, base=base, manifest=manifest(), cells=pending
    )
    self._file = self._check()

  def begin(self) -> None:
    """Takes the work directory for this process.

    Raises:
      InputError: another process has it, or it cannot be written.
    """
    self._lock.acquire()
    try:
      self._file = self._check()  # it may have become another's meanwhile
      add_session(self.workdir)
      self._write_file()
    except OSError as error:
      raise cannot_write(self.workdir, error) from error

  def close(self) -> None:
    """Gives the work directory back to others, and those of the cells."""
    for opened in self._open.values():
      opened.close()
    self._lock.release()

  def _check(self) -> StudyFile:
    """Returns what is to be in study.json: what is there, or what a new study begins with."""
    path = self.workdir / "study.json"
    if not path.exists():
      if (self.workdir / "config.json").exists():
        raise InputError(
          f"the work directory {self.workdir} holds an experiment. Choose another --workdir."
        )
      return self._new
    try:
      there = msgspec.json.decode(path.read_bytes(), type=StudyFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
      raise InputError(f"{path} is damaged ({error}). Choose another --workdir.") from error
    if differing := [name for name, _, _ in differences(_identity(there), _identity(self._new))]:
      raise InputError(
        f"the work directory {self.workdir} holds another study ({there.title!r}, of"
        f" {len(there.cells)} cells): its {differing[0]} differs. Choose another --workdir, or"
        " delete that one."
      )
    return there

  def _write_file(self) -> None:
    write_json(self.workdir / "study.json", msgspec.to_builtins(self._file))

  def _folder(self, number) -> pathlib.Path:
    return self.workdir / "cells" / self._cells[number].name

  def _is_done(self, number) -> bool:
    """Returns whether a cell was finished before, with the images that there are now."""
    settings = self._cells[number].settings
    if self._file.cells[number].status != "done" or settings is None:
      return False
    if number in self._read:
      return True
    try:
      found = read_experiment(self._folder(number))
      if found.config.data.get("sha256") != digest(load_images(settings.data)):
        return False
      if found.config.model.get("sha256") != source_digest(settings.model):
        return False
    except InputError:
      return False  # its experiment goes on from what is left, or says what is wrong
    self._read[number] = found
    return True

  def run_group(self, one: Group, progress: ProgressReport) -> bool:
    """Runs what is left of an attack in the cells that share its program.

    Args:
      one: the group.
      progress: told how far it is.

    Returns:
      Whether anything was left.
    """
    if all(number in self._failed or self._is_done(number) for number in one.cells):
      return False
    settings = self._cells[one.cells[0]].settings
    assert settings is not None  # or it would be in no group
    with jax.enable_x64(settings.precision == "float64"):
      for number in one.cells:
        if number not in self._failed:
          self._attempt(number, self._enter, progress.say)
      experiments = {number: self._open[number] for number in one.cells if number in self._open}
      if not experiments:
        return False
      # Of these cells alone, in which trials are known by the numbers of their cells.
      names = [self._cells[number].name for number in one.cells]
      file = hashlib.sha256("\n".join([one.attack, *names]).encode()).hexdigest()[:16]
      errors = experiment.run_attack(
        one.attack,
        experiments,
        checkpoint_path=self.workdir / "checkpoint" / f"{file}.npz",
        progress=progress,
        say=progress.say,
      )
      for number, error in errors.items():
        self.fail(number, error, progress.say)
      for number in experiments:
        if number in self._open and self._open[number].complete:
          self._attempt(number, self._finish, progress.say)
    return True

  def _attempt(self, number, function, say) -> None:
    try:
      function(number)
    except Exception as error:
      if not self._is_done(number):  # else it was only to fill lanes
        self.fail(number, error, say)

  def _enter(self, number: int) -> None:
    """Opens a cell; one that is done only so that the lanes are those before an interruption."""
    if number in self._open:
      return
    settings = self._cells[number].settings
    assert settings is not None
    alike = (one.clients for one in self._open.values() if one.clients.settings == settings.clients)
    opened = Experiment(settings, self._folder(number), next(alike, None))
    if not self._is_done(number):
      opened.begin()
    self._open[number] = opened

  def _finish(self, number: int) -> None:
    opened = self._open.pop(number)
    with contextlib.closing(opened):
      if not self._is_done(number):
        opened.finish(lambda text: None)
        self._note(number, "done", None, opened.seconds)

  def fail(self, number: int, error: Exception, say: Callable[[str], None]) -> None:
    """Keeps why a cell failed; the study goes on without it, whatever it is.

    Args:
      number: of the cell.
      error: that it raised.
      say: called with what a person should read.
    """
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    reason = kind + first_line(error)
    opened = self._open.pop(number, None)
    if opened:
      opened.close()
    self._failed.add(number)
    before = self._file.cells[number].seconds or 0.0
    self._note(number, "failed", reason, opened.seconds if opened else before)
    say(f"{self._cells[number].name} failed: {reason}")

  def _note(self, number, status, reason, seconds) -> None:
    """Keeps how a cell ended."""
    cell = self._file.cells[number]
    self._file.cells[number] = msgspec.structs.replace(
      cell, status=status, reason=reason, seconds=round(seconds, 1)
    )
    self._read.pop(number, None)
    self._write_file()
    self.write()

  def failures(self) -> dict[str, str]:
    """Returns the reasons of the cells that failed."""
    return {c.name: c.reason or "" for c in self._file.cells if c.status == "failed"}

  def write(self) -> pd.DataFrame:
    """Writes the results of all cells, and returns a table of them."""
    rows, lines = [], []
    for number, cell in enumerate(self._cells):
      if not self._is_done(number):
        continue  # or it is run again when its turn comes
      found, more = self._read[number], {"cell": cell.name} | cell.overrides
      rows += [row.to_json() | more for row in found.rows]
      lines += [
        more | {"attack": name} | summary.columns() for name, summary in found.summary.items()
      ]
    write_json_lines(self.workdir / "results.jsonl", rows)
    table = pd.DataFrame(lines)
    for name, frame in (("results", pd.json_normalize(rows)), ("table", table)):
      text = frame.to_csv(index=False)
      write_atomically(self.workdir / f"{name}.csv", lambda f, t=text: f.write(t.encode()))
    text = markdown(list(table), table.itertuples(index=False))
    write_atomically(self.workdir / "table.md", lambda file: file.write(text.encode()))
    return table


def _identity(file: StudyFile) -> Any:
  """Returns what tells a study from another one, as it is in study.json."""
  cells = [{"name": cell.name, "overrides": cell.overrides} for cell in file.cells]
  about = {"title": file.title, "question": file.question, "base": file.base, "cells": cells}
  return json.loads(json.dumps(about))
