"""Whether dropout was on, by what it leaves in the gradients of dense layers."""

import math

import numpy as np

from jaxdia.audit.schema import Finding
from jaxdia.client import Observation
from jaxdia.closed_form import find_chain
from jaxdia.core.errors import InputError
from jaxdia.gradients import layer_gradient
from jaxdia.models import DropoutModel

# Rows below this share of the largest are rounding, and so is a smaller angle between two.
_ROUNDING, _ANGLE = 1e-5, 1e-3
# Where no mark of dropout is seen, the chance of that must have been below e to minus this.
_MOST_SURPRISE = 15
# Of fewer images two rows may be nearly parallel by chance.
_LEAST_IMAGES = 3


def mode_finding(training: bool, reason: str) -> Finding:
  """Returns what is said of a mode that is not the stated one.

  Args:
    training: whether dropout was on.
    reason: what tells it.
  """
  mode = "training mode" if training else "evaluation mode"
  return Finding(
    name=mode,
    effect="mended",
    text=f"{reason}: the gradient was computed in {mode}. The audit goes on"
    f" with{'' if training else 'out'} dropout.",
  )


def find_mode(
  model: DropoutModel, observation: Observation, rounding: float
) -> tuple[bool | None, str]:
  """Tells from the gradients of dense layers whether dropout was on.

  What all images dropped has a row of zeros there, and what all but one dropped has rows that are
  parallel: of none of either, where some must have been, dropout was off. A unit that a ReLU
  silences, or a pixel that is black, is zero without dropout too, and so may a few be of which
  another function gets a number far below 0.

  Args:
    model: the network.
    observation: of an update of one step, without noise.
    rounding: share of the gradient that rounding changed.

  Returns:
    Whether dropout was on, None if nothing tells; and what tells it, for a person.
  """
  try:
    chain = find_chain(model.network) if model.rates else None
  except InputError:  # of a network that cannot be computed in float64
    chain = None
  if chain is None:
    return None, ""
  size = observation.batch_size
  zeros, told, marks, expected, surprise = 0, 0.0, 0, 0.0, 0.0
  for i, (layer, source) in enumerate(zip(chain.layers, chain.inputs, strict=True)):
    kernel = layer_gradient(observation.gradient, layer.path).get("kernel")
    if source.site is None or kernel is None:
      continue
    rows, rate = np.asarray(kernel, np.float64), float(model.rates[source.site])
    sizes = np.linalg.norm(rows, axis=1)
    here = layer.inputs * rate**size
    if i > 0 and not chain.links[i - 1].silent:
      zeros, told = zeros + int(np.sum(sizes == 0)), told + here
    small = sizes <= max(_ROUNDING, 3 * rounding) * sizes.max()
    marks += int(np.sum(small))
    expected, surprise = expected + here, surprise + here
    if size >= _LEAST_IMAGES:
      marks += _parallel(rows[~small] / sizes[~small, None], rounding)
      alone = layer.inputs * (1 - rate) * rate ** (size - 1)  # of each image
      expected, surprise = expected + size * alone, surprise + size * (alone - math.log1p(alone))
  if zeros and 2 * zeros >= told:
    return True, "units are zero as dropout leaves them"
  if marks or surprise < _MOST_SURPRISE:
    return None, ""
  return False, (
    f"no unit is zero in all images or in all but one, where dropout would have left about"
    f" {expected:.0f} so"
  )


def _parallel(rows: np.ndarray, rounding: float) -> int:
  """Returns how many rows of size 1 are parallel to another."""
  angle = max(_ANGLE, 3 * rounding)
  near = 1 - np.abs(rows @ rows.T) <= angle**2 / 2
  return int(np.sum(near.sum(axis=1) > 1))
