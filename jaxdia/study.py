"""A study: the same question asked of a grid of experiments, one of which is a cell."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pandas as pd

from jaxdia import experiment, reporting
from jaxdia.attacks import PRESETS, create_attack
from jaxdia.client import Observation
from jaxdia.config import ExperimentSettings, validate
from jaxdia.errors import InputError
from jaxdia.files import first_line, write_atomically, write_json, write_json_lines
from jaxdia.manifest import manifest
from jaxdia.victims import create_model, load_victims

# Of the rate of a large matrix product, what an iteration of an attack reaches, with convolutions
# and without (README, "How fast it is").
_EFFICIENCY = {True: 0.05, False: 0.25}

# ((field, value), ...): fields of the config that a cell sets, such as ("model.dropout_rate", 0.5)
Overrides = tuple[tuple[str, Any], ...]


class Cell(NamedTuple):
  """One experiment of a study.

  Attributes:
    name: of its folder.
    overrides: what it changes.
    config: of the experiment.
    settings: validated; None if the config cannot be run.
    reason: why not.
  """

  name: str
  overrides: dict[str, Any]
  config: ml_collections.ConfigDict
  settings: ExperimentSettings | None
  reason: str | None


def study_config(
  title: str,
  question: str,
  base: ml_collections.ConfigDict,
  *,
  grid: Sequence[tuple[str, Sequence[Any]]] = (),
  variants: Sequence[Overrides] = ((),),
) -> ml_collections.ConfigDict:
  """Returns the config of a study, as the files in `configs/studies/` make it.

  Its cells are the variants times the grid: each sets the fields of one variant, and one
  value of each field of the grid, in a copy of the base.

  Args:
    title: what it is called.
    question: that it answers, for a reader who is no expert.
    base: config of an experiment.
    grid: fields, such as "model.dropout_rate", with their values.
    variants: alternatives that set several fields at once.
  """
  return ml_collections.ConfigDict(
    {
      "title": title,
      "question": question,
      "base": base,
      "grid": tuple((field, tuple(values)) for field, values in grid),
      "variants": tuple(tuple(map(tuple, variant)) for variant in variants),
    }
  )


def plan(config: ml_collections.ConfigDict) -> list[Cell]:
  """Returns the cells of a study.

  Args:
    config: of `study_config`.

  Raises:
    InputError: the config is none of a study, a field does not exist, or no cell can be run.
  """
  if not {"title", "question", "base", "grid", "variants"} <= set(config):
    raise InputError(
      f"the config has the fields {sorted(config)}; expected a study, with base, grid and"
      " variants. Take one of configs/studies/, or run this one with launch/attack.py."
    )
  values = [[(field, value) for value in choices] for field, choices in config.grid]
  combinations = [
    dict([*variant, *chosen])
    for variant in config.variants
    for chosen in itertools.product(*values)
  ]
  cells = [_cell(i, config.base, overrides) for i, overrides in enumerate(combinations)]
  if not any(cell.settings for cell in cells):
    reason = cells[0].reason if cells else "its grid is empty"
    raise InputError(f"none of the {len(cells)} cells of the study can be run: {reason}")
  return cells


def _cell(number, base, overrides) -> Cell:
  config = ml_collections.ConfigDict(base.to_dict())  # without the types of placeholders
  for field, value in overrides.items():
    group, _, name = field.rpartition(".")
    target = config
    for part in group.split(".") if group else ():
      if part not in target:
        raise InputError(f"the study sets the field {field!r}, but its config has no {group!r}.")
      target = target[part]
    target[name] = value
  words = [f"{field.rpartition('.')[2]}={value}" for field, value in overrides.items()]
  words = [re.sub(r"[^\w.=+-]+", "-", word).strip("-").replace("=-", "=") for word in words]
  text = "_".join(words)
  name = f"{number:03d}" + (f"_{text}"[:80] if text else "")
  try:
    return Cell(name, overrides, config, validate(config), None)
  except InputError as error:
    return Cell(name, overrides, config, None, str(error))


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
  say("\n" + table.to_string(index=False))
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
    self._json["command"] = self._json["manifest"]["command"]
    path = workdir / "study.json"
    if path.exists():
      self._go_on(path, definition)
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
    """Returns whether a cell was finished before."""
    return self._entry(cell)["status"] == "done" and (self.folder(cell) / "summary.json").exists()

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
      if not self.is_done(cell):
        continue
      text = (self.folder(cell) / "results.jsonl").read_text()
      more = {"cell": cell.name} | cell.overrides
      rows += [json.loads(line) | more for line in text.splitlines()]
      summaries = json.loads((self.folder(cell) / "summary.json").read_text())
      lines += [
        reporting.line(more | {"attack": name}, summary)
        for name, summary in summaries.items()
        if name != "floors"
      ]
    write_json_lines(self._workdir / "results.jsonl", rows)
    table = pd.DataFrame(lines)
    for name, frame in (("results", pd.json_normalize(rows)), ("table", table)):
      text = frame.to_csv(index=False)
      write_atomically(self._workdir / f"{name}.csv", lambda f, t=text: f.write(t.encode()))
    text = reporting.markdown(table)
    write_atomically(self._workdir / "table.md", lambda file: file.write(text.encode()))
    return table


def estimate(cell: Cell) -> float:
  """Returns about how many seconds a cell takes if no trial ends early.

  Counted are the operations of an iteration, at a share of the rate that this machine
  reaches in a matrix product. Compilation and closed forms come on top.

  Args:
    cell: of `plan`.
  """
  settings = cell.settings
  if settings is None:
    return 0.0
  d = settings.data
  trials = d.count // d.batch_size * d.mask_seeds * settings.restarts
  searches = [a for a in settings.attacks.values() if a.closed_form != "only"]
  try:
    each, rate = _cost(settings) if searches else (0.0, 1.0)
  except InputError:  # the cell will say so when it is run
    return 0.0
  return each * trials * sum(attack.max_iterations for attack in searches) / rate


def _cost(settings: ExperimentSettings) -> tuple[float, float]:
  """Returns operations of an iteration of DIA, counted without compiling, and those a second."""
  model = create_model(settings, load_victims(dataclasses.replace(settings.data, count=1)))
  params = jax.eval_shape(model.init, jax.random.key(0))
  size, channels = settings.data.batch_size, model.image_shape[-1]
  statistics = jax.ShapeDtypeStruct((channels,), jnp.float32)
  labels = jax.ShapeDtypeStruct((size,), jnp.int32)
  observation = Observation(params, params, labels, statistics, statistics, size)
  attack = create_attack(model, PRESETS["dia"])
  state = jax.eval_shape(attack.init, jax.random.key(0), observation)
  analysis = jax.jit(attack.step).lower(observation, state).cost_analysis() or {}
  efficiency = _EFFICIENCY[bool(model.convolutions)]
  return float(analysis.get("flops", 0.0)), efficiency * _product_rate()


@functools.lru_cache
def _product_rate() -> float:
  """Returns operations a second of a matrix product."""
  size = 1024
  matrix = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(matrix).block_until_ready()
  seconds = []
  for _ in range(3):
    start = time.monotonic()
    product(matrix).block_until_ready()
    seconds.append(time.monotonic() - start)
  return 2 * size**3 * len(jax.local_devices()) / float(np.min(seconds))


def describe(config: ml_collections.ConfigDict) -> str:
  """Returns the cells of a study and what they may cost, for a person to read.

  Args:
    config: of `study_config`.

  Raises:
    InputError: see `plan`.
  """
  cells = plan(config)
  lines, total = [], 0.0
  for cell in cells:
    if cell.settings is None:
      lines.append({"cell": cell.name, "cannot be run": cell.reason})
      continue
    d, seconds = cell.settings.data, estimate(cell)
    total += seconds
    lines.append(
      {
        "cell": cell.name,
        "attacks": ",".join(cell.settings.attacks),
        "images": d.count * d.mask_seeds,
        "trials": d.count // d.batch_size * d.mask_seeds * cell.settings.restarts,
        "about": reporting.duration(seconds),
      }
    )
  table = pd.DataFrame(lines).fillna("").to_string(index=False)
  return (
    f"{config.title}: {len(cells)} cells, about {reporting.duration(total)} if no trial"
    f" ends early, compilation and closed forms apart\n\n{table}"
  )
