"""Updates of which an optimiser left only the signs, as Adam's first step does."""

import numpy as np

from jaxdia.audit.schema import Finding
from jaxdia.client import Observation
from jaxdia.core.trees import leaves_by_path
from jaxdia.core.types import Gradient
from jaxdia.models import DropoutModel

# Sizes of the entries of Adam's first update differ by less than this share, or rounding, but no
# more than the second.
_EQUAL, _MOST_ROUNDING = 0.02, 0.3
# This share of the entries must be so: of those of a small gradient Adam leaves less.
_LEAST_SHARE = 0.8
_LEAST_ENTRIES = 20
# Entries below this share of the largest are none.
_NOTHING = 1e-3


def find_signs(
  model: DropoutModel, observation: Observation, rounding: float
) -> tuple[Finding, Gradient] | None:
  """Finds updates of which Adam, Lion, or a sign left only the signs, besides weight decay.

  Args:
    model: the network.
    observation: of an update.
    rounding: share of the gradient that rounding changed.
  """
  del model
  leaves, params = leaves_by_path(observation.gradient), leaves_by_path(observation.params)
  path = max(leaves, key=lambda path: leaves[path].size)
  update, weights = (np.asarray(x[path], np.float64).ravel() for x in (leaves, params))
  seen = np.abs(update) > _NOTHING * np.max(np.abs(update))
  if np.sum(seen) < _LEAST_ENTRIES:
    return None
  update, weights = update[seen], weights[seen]
  decay, step = 0.0, float(np.median(np.abs(update)))
  for _ in range(2):  # what all share besides one step is decay
    rest = update - step * np.sign(update)
    decay = float(rest @ weights / max(weights @ weights, 1e-300))
    step = float(np.median(np.abs(update - decay * weights)))
  sizes = np.abs(update - decay * weights)
  tolerance = min(max(_EQUAL, 3 * rounding), _MOST_ROUNDING) * step
  if np.sum(np.abs(sizes - step) <= tolerance) < _LEAST_SHARE * np.sum(sizes > tolerance):
    return None
  text = (
    f"nearly all entries that changed did so by the same amount ({step:.2e}): this is the first"
    " step of Adam, AdamW or Lion, or the sign of a gradient, and not the gradient. It tells the"
    " signs alone. Audit what went into the optimiser instead, if you have it."
  )
  return Finding(name="adam", effect="stops", text=text, value=step), observation.gradient
