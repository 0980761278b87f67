"""What the cells of a study may cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import pandas as pd

from jaxdia.attacks import dia
from jaxdia.client import Observation
from jaxdia.core.machine import matrix_product_rate
from jaxdia.experiment.progress import duration
from jaxdia.models import DropoutModel
from jaxdia.study.groups import attack_of, group
from jaxdia.study.plan import Cell, plan

# Of the rate of a large matrix product, what an iteration of an attack reaches, with convolutions
# that are no products and without (docs/speed.md).
_EFFICIENCY = {True: 0.05, False: 0.25}
_product_rate = functools.cache(matrix_product_rate)  # measured once


def estimate(cell: Cell, attack: str | None = None) -> float:
  """Returns about how many seconds a cell takes if no trial ends early.

  Counted are the operations of an iteration, of all local steps, at a share of the rate that this
  machine reaches in a matrix product. Compilation and closed forms come on top.

  Args:
    cell: of `plan`.
    attack: one of its attacks; all together if None.
  """
  settings = cell.settings
  if settings is None:
    return 0.0
  names = settings.attacks if attack is None else [attack]
  attacks = [found for name in names if (found := attack_of(settings, name))]
  iterations = sum(one.max_iterations for one in attacks)
  if not iterations:
    return 0.0
  model = attacks[0].model
  at_one_rate = dataclasses.replace(model, rates=dict.fromkeys(model.rates, 0.5))
  native = {layer.path for layer in model.convolutions} - model.as_products()
  efficiency = _EFFICIENCY[bool(native)]
  rate = efficiency * _product_rate() * len(jax.local_devices())
  d = settings.data
  trials = d.gradients * settings.restarts
  local = settings.local.update
  steps = local.draws * _operations(at_one_rate, local.images_a_step(d.batch_size))
  return steps * trials * iterations / rate


@functools.lru_cache
def _operations(model: DropoutModel, size: int) -> float:
  """Returns the operations of an iteration of DIA on a batch, counted without compiling."""
  params = jax.eval_shape(model.init, jax.random.key(0))
  numbers = jax.ShapeDtypeStruct((1,), jnp.float32)
  labels = jax.ShapeDtypeStruct((size,), jnp.int32)
  observation = Observation(params, params, labels, numbers, numbers, size)
  attack = dia(model)
  state = jax.eval_shape(attack.init, jax.random.key(0), observation)
  analysis = jax.jit(attack.step).lower(observation, state).cost_analysis() or {}
  return float(analysis.get("flops", 0.0))


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
        "trials": d.gradients * cell.settings.restarts,
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
