"""What a study asks: a grid of experiments, each a cell, and what they may cost."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pandas as pd

from jaxdia import reporting
from jaxdia.attacks import PRESETS, create_attack
from jaxdia.client import Observation
from jaxdia.config import DataSettings, ExperimentSettings, validate
from jaxdia.engine import matrix_product_rate
from jaxdia.errors import InputError
from jaxdia.files import first_line
from jaxdia.victims import create_model, load_victims

# Of the rate of a large matrix product, what an iteration of an attack reaches, with convolutions
# and without (README, "How fast it is").
_EFFICIENCY = {True: 0.05, False: 0.25}
_product_rate = functools.cache(matrix_product_rate)  # measured once

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
  if not fields <= set(config) or not isinstance(config.base, ml_collections.ConfigDict):
    raise InputError(
      f"the config has the fields {sorted(config)}; expected a study, with base, grid and"
      " variants. Take one of configs/studies/, or run this one with launch/attack.py."
    )
  values = [[(field, value) for value in choices] for field, choices in _pairs(config.grid, "grid")]
  combinations = [
    dict([*_pairs(variant, "variant"), *chosen])
    for variant in config.variants
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


def estimate(cell: Cell, attack: str | None = None) -> float:
  """Returns about how many seconds a cell takes if no trial ends early.

  Counted are the operations of an iteration, at a share of the rate that this machine
  reaches in a matrix product. Compilation and closed forms come on top.

  Args:
    cell: of `plan`.
    attack: one of its attacks; all together if None.
  """
  settings = cell.settings
  if settings is None:
    return 0.0
  d = settings.data
  trials = d.count // d.batch_size * d.mask_seeds * settings.restarts
  attacks = settings.attacks.values() if attack is None else [settings.attacks[attack]]
  searches = [a for a in attacks if a.closed_form != "only"]
  try:
    one = dataclasses.replace(d, count=1, mask_seeds=1)
    each, rate = _cost(json.dumps(settings.model), one) if searches else (0.0, 1.0)
  except InputError:  # the cell will say so when it is run
    return 0.0
  return each * trials * sum(a.max_iterations for a in searches) / rate


@functools.lru_cache
def _cost(model_json: str, data: DataSettings) -> tuple[float, float]:
  """Returns operations of an iteration of DIA, counted without compiling, and those a second."""
  model = create_model(json.loads(model_json), load_victims(data))
  params = jax.eval_shape(model.init, jax.random.key(0))
  size, channels = data.batch_size, model.image_shape[-1]
  statistics = jax.ShapeDtypeStruct((channels,), jnp.float32)
  labels = jax.ShapeDtypeStruct((size,), jnp.int32)
  observation = Observation(params, params, labels, statistics, statistics, size)
  attack = create_attack(model, PRESETS["dia"])
  state = jax.eval_shape(attack.init, jax.random.key(0), observation)
  analysis = jax.jit(attack.step).lower(observation, state).cost_analysis() or {}
  efficiency = _EFFICIENCY[bool(model.convolutions)]
  rate = efficiency * _product_rate() * len(jax.local_devices())
  return float(analysis.get("flops", 0.0)), rate


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
