"""What the values of a gradient themselves tell of their rounding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.core.types import Gradient

# Types of fewer bits than float32.
_HALVES = (jnp.bfloat16, np.float16)


class RoundingLevel(NamedTuple):
  """The type that all values of a gradient fit into.

  Attributes:
    dtype: its name; None if it has no fewer bits than float32.
    level: share of the gradient that rounding to it may have changed; 0 for None.
  """

  dtype: str | None
  level: float


def find_rounding(gradient: Gradient) -> RoundingLevel:
  """Finds values that all have fewer bits than float32.

  Args:
    gradient: with concrete values; None where a layer is frozen.
  """
  leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(gradient)]
  found = [RoundingLevel(None, 0.0)]
  for kind in _HALVES:
    with np.errstate(over="ignore"):
      # Of most gradients the first leaf tells that they do not fit.
      fits = all(np.array_equal(x, x.astype(kind).astype(np.float32)) for x in leaves)
    if fits:
      # Of the smallest values of float16 more is rounded away than of others.
      units = [np.spacing(np.abs(x[x != 0].astype(kind))).astype(np.float64) for x in leaves]
      size = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
      error = np.sqrt(sum(np.sum(np.square(unit)) for unit in units) / 12)
      level = max(float(jnp.finfo(kind).eps) / 2, float(error / size) if size else 0.0)
      found.append(RoundingLevel(np.dtype(kind).name, level))
  return max(found, key=lambda rounding: rounding.level)  # few bits may fit into both
