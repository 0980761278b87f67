"""The work directory of a study, and its cells that are open."""

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import msgspec
import pandas as pd

from jaxdia import experiment
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import write_atomically, write_json, write_json_lines
from jaxdia.experiment import Experiment
from jaxdia.experiment.clients import digest, load_images
from jaxdia.experiment.cluster import Cluster
from jaxdia.experiment.lock import Lock, cannot_write
from jaxdia.experiment.manifest import add_session, manifest
from jaxdia.experiment.network import source_digest
from jaxdia.experiment.parts import Done, Part
from jaxdia.experiment.progress import ProgressReport
from jaxdia.experiment.schema import StudyCell, StudyFile, decode
from jaxdia.experiment.spread import Tally, Work, cut, fix_lanes, take
from jaxdia.experiment.store import differences
from jaxdia.experiment.table import markdown
from jaxdia.report import CellResults, read_experiment
from jaxdia.study.groups import Group
from jaxdia.study.plan import Cell

# The results of all cells are written again after so many times as long as that takes.
_SELDOM = 20


class Study:
  """The files of a study, and those of its experiments that are open."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    cells: list[Cell],
    workdir: pathlib.Path,
    cluster: Cluster | None,
  ):
    """Looks whether the work directory is free or this study's; nothing is written."""
    self.workdir = workdir
    self._cluster = cluster
    self._cells = cells
    self._lock = Lock(workdir)
    # By number of the cell: those that run, and what was read of those that are done.
    self._open: dict[int, Experiment] = {}
    self._read: dict[int, CellResults] = {}
    self._failed: set[int] = set()  # in this call
    self._written = self._write_seconds = 0.0  # when the results of all cells were, and how long
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
      there = decode(path.read_bytes(), StudyFile)
    except (OSError, msgspec.DecodeError) as error:
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

  def refuse(self, say: Callable[[str], None]) -> None:
    """Notes the cells that cannot be run.

    Args:
      say: called with what a person should read.
    """
    for number, cell in enumerate(self._cells):
      if cell.settings is None:
        self.fail(number, InputError(cell.reason), say)

  def work_of(self, number: int, attack: str, seconds: float) -> Work:
    """Returns what there is to do of an attack of a cell.

    Args:
      number: of the cell.
      attack: its name.
      seconds: that all of it is estimated to take.
    """
    settings = self._cells[number].settings
    assert settings is not None  # or it would be in no group
    count = settings.data.gradients
    return Work(count, count if self._is_done(number) else 0, (seconds + 1) / count)

  def run_group(self, one: Group, progress: ProgressReport) -> bool:
    """Runs what is left of an attack in the cells that share its program.

    Args:
      one: the group.
      progress: told how far it is.

    Returns:
      Whether anything was left.
    """
    if not self._left(one):
      return False
    with self._precision(one):
      # All of the group, so that the lanes are those before an interruption.
      experiments = self._open_cells([n for n in one.cells if n not in self._failed], progress.say)
      if not experiments:
        return False
      errors = experiment.run_attack(
        one.attack,
        experiments,
        checkpoint_path=self.workdir / "checkpoint" / f"{self._file_name(one)}.npz",
        on_progress=progress.update,
        note=progress.note,
        say=progress.say,
      )
      for number, error in errors.items():
        self.fail(number, error, progress.say)
      self._finish_complete(list(experiments), progress.say)
    return True

  def cut_group(self, one: Group, tally: Tally) -> Iterator[Part]:
    """Yields what is left of an attack in the cells that share its program, in parts.

    Args:
      one: the group.
      tally: told what was finished before.
    """
    assert self._cluster is not None
    say = tally.say
    with self._precision(one):
      experiments = self._open_cells(self._left(one), say)
      self._finish_complete(list(experiments), say)  # but for what is made of all results
      for number, opened in experiments.items():
        count = len(opened.runs[one.attack].unfinished)
        tally.skip(number, one.attack, opened.settings.data.gradients - count)
      left = {n: e for n, e in experiments.items() if not e.runs[one.attack].is_finished}
      if not left:
        return
      settings = {n: cell.settings for n in one.cells if (cell := self._cells[n]).settings}
      lanes, errors = fix_lanes(one.attack, left, settings, self._cluster, say)
      for number, error in errors.items():
        self.fail(number, error, say)
      parts = cut(one.attack, left, lanes, self._cluster)
    for part in parts:
      if all(number in self._open for number in part.settings):
        yield part

  def take(self, part: Part, done: Done, say: Callable[[str], None]) -> None:
    """Keeps what a cluster did.

    Args:
      part: what was to be done.
      done: what came of it.
      say: called with what a person should read.
    """
    first = next(iter(part.settings.values()))
    with jax.enable_x64(first.precision == "float64"):
      for number, error in take(self._open, part, done, say).items():
        self.fail(number, error, say)
      self._finish_complete(list(part.settings), say)

  def _left(self, one: Group) -> list[int]:
    return [n for n in one.cells if n not in self._failed and not self._is_done(n)]

  def _precision(self, one: Group) -> contextlib.AbstractContextManager:
    settings = self._cells[one.cells[0]].settings
    assert settings is not None  # or it would be in no group
    return jax.enable_x64(settings.precision == "float64")

  def _file_name(self, one: Group) -> str:
    # Of these cells alone, in which trials are known by the numbers of their cells.
    names = [self._cells[number].name for number in one.cells]
    return hashlib.sha256("\n".join([one.attack, *names]).encode()).hexdigest()[:16]

  def _open_cells(self, numbers: Sequence[int], say) -> dict[int, Experiment]:
    """Opens cells, and returns those that could be opened."""
    for number in numbers:
      self._attempt(number, self._enter, say)
    return {number: self._open[number] for number in numbers if number in self._open}

  def _finish_complete(self, numbers: Sequence[int], say) -> None:
    for number in numbers:
      if number in self._open and self._open[number].complete:
        self._attempt(number, self._finish, say)

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
    devices = self._cluster and self._cluster.devices
    opened = Experiment(settings, self._folder(number), next(alike, None), devices=devices)
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
    # Anew each time, the results of all cells would take longer and longer; `run` ends with them.
    if time.monotonic() - self._written > _SELDOM * self._write_seconds:
      self.write()

  def failures(self) -> dict[str, str]:
    """Returns the reasons of the cells that failed."""
    return {c.name: c.reason or "" for c in self._file.cells if c.status == "failed"}

  def write(self) -> pd.DataFrame:
    """Writes the results of all cells, and returns a table of them."""
    began = time.monotonic()
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
    self._written = time.monotonic()
    self._write_seconds = self._written - began
    return table


def _identity(file: StudyFile) -> Any:
  """Returns what tells a study from another one, as it is in study.json."""
  cells = [{"name": cell.name, "overrides": cell.overrides} for cell in file.cells]
  about = {"title": file.title, "question": file.question, "base": file.base, "cells": cells}
  return json.loads(json.dumps(about))
