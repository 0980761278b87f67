"""Which image is which: by squared error, without ever holding all differences at once."""

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from jaxdia.core.types import Array, Images

# Costs more than any image that was found.
_NEVER = 1e9


def assign(
  reconstructions: Images, originals: Images, found: Bool[Array, " batch"] | None = None
) -> Integer[np.ndarray, " batch"]:
  """Finds which reconstruction stands for which original.

  A gradient does not tell the order of a batch. The assignment is the one of
  least total squared error (Hungarian method).

  Args:
    reconstructions: f[B, H, W, C].
    originals: f[B, H, W, C].
    found: b[B], which reconstructions there are; the others go to the originals that
      are left over.

  Returns:
    i[B]: `reconstructions[result[i]]` is matched to `originals[i]`.
  """
  cost = _squared_distances(originals, reconstructions) / originals[0].size
  cost = np.nan_to_num(cost, nan=_NEVER, posinf=_NEVER)
  if found is not None:
    cost = np.where(found, cost, _NEVER)
  return linear_sum_assignment(cost)[1]


def identified(
  reconstructions: Images, originals: Images, pool: Float[Array, "pool height width channels"]
) -> Bool[np.ndarray, " batch"]:
  """Returns whether the nearest image of a pool, by squared error of pixels, is the original.

  The share of which it holds is the image identification precision (IIP) of Yin
  et al. 2021.

  Args:
    reconstructions: f[B, H, W, C].
    originals: f[B, H, W, C], in the same order; each is in the pool.
    pool: f[P, H, W, C].

  Returns:
    b[B].
  """
  # At once, since to convert the pool takes as long as to compare it.
  both = np.concatenate([reconstructions, originals])
  nearest = np.argmin(_squared_distances(both, pool), axis=1).reshape(2, -1)
  return np.array([i == j or np.array_equal(pool[i], pool[j]) for i, j in nearest.T])


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns f64[A, B], between each of f[A, H, W, C] and each of f[B, H, W, C]."""
  a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
  return cdist(a, b, "sqeuclidean")
