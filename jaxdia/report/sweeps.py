"""What changes with a setting that a study sweeps: the lines of its curves."""

from typing import Any, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float

from jaxdia.experiment.schema import Row
from jaxdia.report.results import CellResults, StudyResults
from jaxdia.report.words import is_number, text

# Metrics of which curves are drawn.
DRAWN = ("mse_normalized", "ssim")

# More lines than these cannot be told apart.
_MAX_LINES = 8
# Which attacks a cell runs is seen from its lines.
_NO_AXES = ("seed", "attack.name", "data.offset")


class Line(NamedTuple):
  """One attack over the values of one setting.

  Attributes:
    attack: its name.
    rest: the other swept settings, as text; empty if there are none or they are pooled.
    x: values of the setting, ascending.
    points: by metric f[len(x), 3]: minimum, median and maximum over the images; NaN where
      no image has the metric.
  """

  attack: str
  rest: str
  x: list[float]
  points: dict[str, Float[np.ndarray, "x 3"]]


class Sweep(NamedTuple):
  """The curves over one setting.

  Attributes:
    setting: such as "model.dropout_rate".
    lines: at most eight, or one an attack.
    pooled: whether lines pool the images of cells that differ in other settings too.
  """

  setting: str
  lines: list[Line]
  pooled: bool


def find_sweeps(study: StudyResults) -> list[Sweep]:
  """Returns the curves over each numeric setting that differs between the cells.

  A seed is no axis: the images of cells that differ in their seed alone are pooled.

  Args:
    study: of which cells may be missing.
  """
  names = dict.fromkeys(name for cell in study.done for name in cell.entry.overrides)
  swept = [n for n in names if n not in _NO_AXES and len(_values(study, n)) > 1]
  numeric = [
    n for n in swept if all(map(is_number, _values(study, n).values())) and _varies(study, n)
  ]
  sweeps = (_sweep(study, name, [n for n in swept if n != name]) for name in numeric)
  return [sweep for sweep in sweeps if sweep.lines]


def _sweep(study: StudyResults, name: str, others: list[str]) -> Sweep:
  lines = _lines(study, name, others)
  if len(lines) > _MAX_LINES or (others and not lines):
    return Sweep(name, _lines(study, name, []), True)
  return Sweep(name, lines, False)


def _lines(study: StudyResults, name: str, others: list[str]) -> list[Line]:
  """Returns a line for each attack and value of the other settings that has two points."""
  rows: dict[tuple[str, str], dict[float, list[Row]]] = {}
  for cell in study.done:
    for attack in cell.summary:
      x = setting(cell, name, attack)
      if is_number(x):
        rest = ", ".join(f"{other}={text(setting(cell, other, attack))}" for other in others)
        line = rows.setdefault((attack, rest), {})
        line.setdefault(x, []).extend(cell.rows_of(attack))
  return [
    Line(attack, rest, sorted(line), {m: _points(line, m) for m in DRAWN})
    for (attack, rest), line in rows.items()
    if len(line) > 1
  ]


def _points(line: dict[float, list[Row]], metric: str) -> np.ndarray:
  points = []
  for x in sorted(line):
    values = [value for row in line[x] if (value := row.score(metric)) is not None]
    points.append([f(values) if values else np.nan for f in (np.min, np.median, np.max)])
  return np.asarray(points, np.float64)


def setting(cell: CellResults, name: str, attack: str) -> Any:
  """Returns the value of a setting in a cell, also where the cell does not override it.

  Args:
    cell: that is done.
    name: with dots, as on the command line; `attack.NAME` is of the given attack.
    attack: one of the cell.
  """
  if name in cell.entry.overrides:
    return cell.entry.overrides[name]
  path = name.split(".")
  if name == "attack.restarts":
    path = ["restarts"]
  elif path[0] == "attack":
    path = ["attacks", attack, *path[1:]]
  value: Any = msgspec.structs.asdict(cell.config)
  for key in path:
    value = value.get(key) if isinstance(value, dict) else None
  return value


def _varies(study: StudyResults, name: str) -> bool:
  """Returns whether a setting has several values for one attack on one network."""
  values: dict[Any, set[str]] = {}
  for cell in study.done:
    for attack in cell.summary:
      key = cell.config.model.get("name"), attack
      values.setdefault(key, set()).add(text(setting(cell, name, attack)))
  return any(len(found) > 1 for found in values.values())


def _values(study: StudyResults, name: str) -> dict[str, Any]:
  """Returns the values of a setting, by their text."""
  values = [setting(cell, name, attack) for cell in study.done for attack in cell.summary]
  return {text(value): value for value in values if value is not None}
