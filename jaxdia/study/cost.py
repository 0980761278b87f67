"""What the cells of a study may cost."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import pandas as pd

from jaxdia.attacks import PRESETS, create_attack
from jaxdia.client import Observation
from jaxdia.config import DataSettings
from jaxdia.core.errors import InputError
from jaxdia.engine import matrix_product_rate
from jaxdia.experiment.progress import duration
from jaxdia.study.groups import group
from jaxdia.study.plan import Cell, plan
from jaxdia.victims import create_model, load_victims

# Of the rate of a large matrix product, what an iteration of an attack reaches, with convolutions
# and without (README, "How fast it is").
_EFFICIENCY = {True: 0.05, False: 0.25}
_product_rate = functools.cache(matrix_product_rate)  # measured once


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
    network = settings.model | {"dropout_rate": 0.5 if settings.model["dropout_rate"] else 0.0}
    each, rate = _cost(json.dumps(network), one) if searches else (0.0, 1.0)
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
        "about": duration(seconds),
      }
    )
  table = pd.DataFrame(lines).fillna("").to_string(index=False)
  shared = [one.describe(cells) for one in group(cells) if len(one.cells) > 1]
  return (
    f"{config.title}: {len(cells)} cells, about {duration(total)} if no trial"
    f" ends early, compilation and closed forms apart\n\n{table}"
    + (f"\n\nin the same lanes: {'; '.join(shared)}" if shared else "")
  )
