"""What a study asks: a grid of experiments, each a cell."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from jaxdia.core.errors import InputError, first_line
from jaxdia.experiment.config import ExperimentSettings, validate

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

  A value that a field cannot take makes a cell that cannot be run, and says why.

  Args:
    config: of `study_config`.

  Raises:
    InputError: the config is none of a study, a field does not exist, or no cell can be run.
  """
  fields = {"title", "question", "base", "grid", "variants"}
  if fields != set(config) or not isinstance(config.base, ml_collections.ConfigDict):
    raise InputError(
      f"the config has the fields {sorted(config)}; expected a study, with base, grid and"
      " variants. Take one of configs/studies/, or run this one with launch/attack.py."
    )
  variants: Any = config.variants
  values = [[(field, value) for value in choices] for field, choices in _pairs(config.grid, "grid")]
  combinations = [
    dict([*_pairs(variant, "variant"), *chosen])
    for variant in variants
    for chosen in itertools.product(*values)
  ]
  cells = [_cell(i, config.base, overrides) for i, overrides in enumerate(combinations)]
  if not any(cell.settings for cell in cells):
    reason = cells[0].reason if cells else "its grid is empty"
    raise InputError(f"none of the {len(cells)} cells of the study can be run: {reason}")
  return cells


def _pairs(pairs, what) -> list[tuple[str, Any]]:
  """Returns pairs of a field and what it is set to, or refuses them."""
  pairs = list(pairs)
  for pair in pairs:
    if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
      example = '("model.dropout_rate", (0.25, 0.5))' if what == "grid" else '("seed", 1)'
      raise InputError(f"the study has the {what} {pairs!r}; expected pairs such as {example}.")
    if what == "grid" and (isinstance(pair[1], str) or not np.iterable(pair[1])):
      raise InputError(f"the grid gives {pair[0]!r} {pair[1]!r}; expected a sequence of values.")
  return [tuple(pair) for pair in pairs]


def _cell(number, base, overrides) -> Cell:
  words = [f"{field.rpartition('.')[2]}={value}" for field, value in overrides.items()]
  words = [re.sub(r"[^\w.=+-]+", "-", word).strip("-").replace("=-", "=") for word in words]
  name = f"{number:03d}" + (f"_{'_'.join(words)}"[:80] if words else "")
  config = ml_collections.ConfigDict(base.to_dict())  # without the types of placeholders
  try:
    json.dumps(overrides, allow_nan=False)
    for field, value in overrides.items():
      *groups, last = field.split(".")
      target = config
      for group in groups:
        if not isinstance(target, ml_collections.ConfigDict) or group not in target:
          raise KeyError(field)
        target = target[group]
      if not isinstance(target, ml_collections.ConfigDict):
        raise KeyError(field)
      target[last] = value
    return Cell(name, overrides, config, validate(config), None)
  except KeyError as error:
    raise InputError(
      f"the study sets the field {error}, but its config has no such group."
    ) from None
  except (InputError, TypeError, ValueError) as error:
    # As text, what JSON or a table may have no form for.
    overrides = {
      field: value if isinstance(value, (str, int)) else str(value)
      for field, value in overrides.items()
    }
    return Cell(name, overrides, config, None, first_line(error))
