"""Singular values and vectors of gradients of low rank, faster than by computing all of them.

They are those that LAPACK finds, to the last digits: where subspace iteration does not reach these,
as of gradients with much noise, LAPACK is asked.
"""

import numpy as np
from jaxtyping import Float

# Of subspace iteration: dimensions besides those that are looked for, iterations at most, and how
# much of the first singular value may be left outside.
_MORE = 8
_ITERATIONS = 12
_EXACT = 4e-15


def leading(
  matrix: Float[np.ndarray, "m n"], rank: int
) -> tuple[Float[np.ndarray, "m k"], Float[np.ndarray, " k"], Float[np.ndarray, "k n"]]:
  """Returns the first singular vectors and values, so many or more.

  Args:
    matrix: f64[m, n].
    rank: how many.

  Returns:
    f64[m, k], f64[k] and f64[k, n].
  """
  found = _iterate(matrix, rank)
  return np.linalg.svd(matrix, full_matrices=False) if found is None else found


def values_of(matrix: Float[np.ndarray, "m n"], rank: int) -> Float[np.ndarray, " values"]:
  """Returns all singular values, in descending order.

  Args:
    matrix: f64[m, n].
    rank: after so many they may fall to those of rounding or noise.
  """
  found = _iterate(matrix, rank)
  if found is None:
    return np.linalg.svd(matrix, compute_uv=False)
  left, values, right = found
  # Without the large ones squares lose nothing that matters of the others.
  rest = matrix - (left[:, :rank] * values[:rank]) @ right[:rank]
  squares = np.linalg.eigvalsh(rest @ rest.T if len(rest) < rest.shape[1] else rest.T @ rest)
  others = np.sqrt(np.maximum(squares[::-1], 0))[: len(squares) - rank]
  return np.concatenate([values[:rank], np.minimum(others, values[rank - 1])])


def _iterate(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
  """Returns the first singular vectors and values; None if their space is not found soon."""
  tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
  count = rank + _MORE
  if rank < 1 or 4 * count > tall.shape[1]:
    return None
  basis = tall @ np.random.default_rng(0).standard_normal((tall.shape[1], count))
  for _ in range(_ITERATIONS):
    basis, _ = np.linalg.qr(basis)
    small, values, right = np.linalg.svd(basis.T @ tall, full_matrices=False)
    image = tall @ right.T
    outside = image - basis @ (basis.T @ image)
    if np.linalg.norm(outside[:, :rank]) <= _EXACT * values[0]:
      left = basis @ small
      return (left, values, right) if tall is matrix else (right.T, values, left.T)
    basis = image
  return None
