"""Runs a study, cell after cell."""

import json
import os
import pathlib
import time
from collections.abc import Callable

import ml_collections
import pandas as pd

from jaxdia import experiment, reporting
from jaxdia.errors import InputError
from jaxdia.files import first_line, write_atomically, write_json, write_json_lines
from jaxdia.manifest import manifest
from jaxdia.study.plan import Cell, estimate, plan
from jaxdia.victims import load_victims
from jaxdia.workdir import digest

# Columns of the table that a study ends with; the CSV has more.
_SHOWN = (
  *("cell", "attack", "finished", "attempted", "mse_median", "mse_best", "mse_worst"),
  *("ssim_median", "ssim_best", "success_ssim_0.6", "masks_right", "iterations"),
)


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, str]:
  """Runs what is left of a study.

  In the work directory are afterwards `study.json`, `results.jsonl` and `results.csv` with all
  rows, `table.md` and `table.csv` with a line for each cell and attack, and
  `cells/`, a work directory of each experiment. The same call goes on where it was
  interrupted, and tries again what failed.

  Args:
    config: of `study_config`.
    workdir: made if needed; refused if it belongs to another study.
    say: called with what a person should read.

  Returns:
    {cell name: reason} of those that failed.

  Raises:
    InputError: see `plan`; or the work directory cannot be used.
  """
  cells, workdir = plan(config), pathlib.Path(workdir)
  study = _Study(config, cells, workdir)
  costs = [estimate(cell) for cell in cells]
  progress = reporting.StudyProgress([cell.name for cell in cells], costs)
  try:
    for number, cell in enumerate(cells):
      start = time.monotonic()
      progress.start(number)
      try:
        if cell.settings is None:
          raise InputError(cell.reason)
        if not study.is_done(cell):
          experiment.run(
            cell.config,
            study.folder(cell),
            say=lambda text: None,
            on_share=progress.update,
          )
          study.note(cell, "done", None, time.monotonic() - start)
      except Exception as error:
        # A study goes on without a cell that fails, whatever it is; the reason is kept and shown.
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        study.note(cell, "failed", kind + first_line(error), time.monotonic() - start)
        progress.say(f"{cell.name} failed: {kind}{first_line(error)}")
      progress.finish(number)
  finally:
    progress.close()
  table = study.write()
  shown = table[[name for name in _SHOWN if name in table]]
  say("\n" + shown.to_string(index=False, float_format="{:.3g}".format, na_rep="-"))
  say(f"\nnumbers: {workdir / 'table.csv'}, {workdir / 'results.csv'}")
  return study.failures()


class _Study:
  """The files of a study."""

  def __init__(self, config, cells, workdir):
    self._cells: list[Cell] = cells
    self._workdir: pathlib.Path = workdir
    definition = {
      "title": config.title,
      "question": config.question,
      "base": json.loads(config.base.to_json_best_effort()),
    }
    definition["base"].pop("engine", None)  # which changes no result
    cells_json = [
      {"name": cell.name, "overrides": cell.overrides, "status": "pending", "reason": None}
      | {"seconds": None}
      for cell in cells
    ]
    self._json = definition | {"manifest": manifest(), "cells": cells_json}
    path = workdir / "study.json"
    if path.exists():
      self._go_on(path, definition)
    elif (workdir / "config.json").exists():
      raise InputError(
        f"the work directory {workdir} holds an experiment. Choose another --workdir."
      )
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      write_json(path, self._json)
    except OSError as error:
      raise InputError(
        f"cannot write in the work directory {workdir} ({error}). Choose another --workdir."
      ) from error

  def _go_on(self, path, definition):
    try:
      there = json.loads(path.read_text())
      same = {name: there[name] for name in definition} == definition
      cells = [(cell["name"], cell["overrides"]) for cell in there["cells"]]
      _ = [(cell["status"], cell["reason"], float(cell["seconds"] or 0)) for cell in there["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise InputError(f"{path} is damaged ({error!r}). Choose another --workdir.") from error
    here = json.loads(json.dumps([(c["name"], c["overrides"]) for c in self._json["cells"]]))
    if not same or [list(cell) for cell in cells] != here:
      raise InputError(
        f"the work directory {path.parent} holds another study ({there['title']!r}, of"
        f" {len(cells)} cells). Choose another --workdir, or delete that one."
      )
    self._json = there

  def folder(self, cell: Cell) -> pathlib.Path:
    """Returns where the experiment of a cell is written."""
    return self._workdir / "cells" / cell.name

  def _entry(self, cell):
    return self._json["cells"][self._cells.index(cell)]

  def is_done(self, cell: Cell) -> bool:
    """Returns whether a cell was finished before, with the images that there are now."""
    if self._entry(cell)["status"] != "done":
      return False
    try:
      config = reporting.read_experiment(self.folder(cell)).config
      return config["data"].get("sha256") == digest(load_victims(cell.settings.data))
    except InputError:
      return False  # its experiment goes on from what is left, or says what is wrong

  def note(self, cell: Cell, status: str, reason: str | None, seconds: float) -> None:
    """Keeps how a cell ended."""
    before = self._entry(cell)["seconds"] or 0.0
    self._entry(cell).update(status=status, reason=reason, seconds=round(before + seconds, 1))
    write_json(self._workdir / "study.json", self._json)
    self.write()

  def failures(self) -> dict[str, str]:
    """Returns the reasons of the cells that failed."""
    return {c["name"]: c["reason"] for c in self._json["cells"] if c["status"] == "failed"}

  def write(self) -> pd.DataFrame:
    """Writes the results of all cells, and returns a table of them."""
    rows, lines = [], []
    for cell in self._cells:
      if self._entry(cell)["status"] != "done":
        continue
      try:
        found = reporting.read_experiment(self.folder(cell))
      except InputError:
        continue  # it is run again when its turn comes
      more = {"cell": cell.name} | cell.overrides
      rows += [row | more for row in found.rows]
      lines += [
        reporting.line(more | {"attack": name}, summary) for name, summary in found.summary.items()
      ]
    write_json_lines(self._workdir / "results.jsonl", rows)
    table = pd.DataFrame(lines)
    for name, frame in (("results", pd.json_normalize(rows)), ("table", table)):
      text = frame.to_csv(index=False)
      write_atomically(self._workdir / f"{name}.csv", lambda f, t=text: f.write(t.encode()))
    text = reporting.markdown(table)
    write_atomically(self._workdir / "table.md", lambda file: file.write(text.encode()))
    return table
