"""Entries of a gradient that were not sent, filled in by its rank.

A client that sends the largest entries of its gradient alone leaves zeros that are none. The kernel
gradient of a dense layer has the rank B of its batch, so B (m + n - B) numbers make up all of its
m n entries, and a half of these, or a tenth, may be enough to tell the rest (low-rank matrix
completion, by alternating least squares).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Of the entries up to so much larger than the smallest there are more sizes than this; in a
# gradient of equal steps there is one.
_NEAR, _SIZES = 1.2, 10
# If nothing was left out, so many entries would be smaller than the smallest, at least.
_EXPECTED = 50
# Weight of an entry that was left out, which is small, and so taken for 0 where nothing else tells.
_WEIGHT = 1e-8
_MOST_STEPS = 300
# The search ends where a step makes what is left of the entries less by no more than this share,
# or where it is rounding.
_STALLED, _ROUNDING = 1e-3, 1e-7
# A row is known if errors of its entries grow by no more than 1 / sqrt of this.
_LEAST_EIGENVALUE = 1e-3


class Completed(NamedTuple):
  """A matrix of low rank that was sent in part.

  Attributes:
    matrix: f64[m, n], whole.
    rows: f64[m], 1 for those of which enough was sent, otherwise 0.
    columns: f64[n], likewise.
    share: of the entries that were sent, what the rank leaves unexplained.
    pruned: whether entries were filled in.
  """

  matrix: Float[np.ndarray, "m n"]
  rows: Float[np.ndarray, " m"]
  columns: Float[np.ndarray, " n"]
  share: float
  pruned: bool = True


def is_pruned(matrix: Float[np.ndarray, "m n"]) -> bool:
  """Returns whether small entries of a gradient were left out, as what is left shows.

  Args:
    matrix: f64[m, n].
  """
  sizes = np.abs(matrix[matrix != 0])
  if not 0 < sizes.size < matrix.size:
    return False
  smallest = sizes.min()
  if len(np.unique(sizes[sizes < _NEAR * smallest])) <= _SIZES:
    return False
  # Near 0 entries are as dense as elsewhere, or denser.
  return sizes.size * smallest > _EXPECTED * np.sqrt(np.mean(sizes**2))


def complete(matrix: Float[np.ndarray, "m n"], rank: int) -> Completed:
  """Fills in what was left out of a matrix.

  Args:
    matrix: f64[m, n], 0 where nothing was sent.
    rank: of the whole matrix.
  """
  sent = (matrix != 0).astype(float)
  size = np.linalg.norm(matrix)
  right = np.linalg.svd(matrix, full_matrices=False)[2][:rank].T
  left, before = right[:0], np.inf
  for _ in range(_MOST_STEPS):
    left = _solve(matrix, sent, right)
    right = _solve(matrix.T, sent.T, np.linalg.qr(left)[0])
    left = np.linalg.qr(left)[0]
    share = float(np.linalg.norm(sent * (left @ right.T - matrix)) / size)
    if share < _ROUNDING or share > (1 - _STALLED) * before:
      break
    before = share
  whole = left @ right.T
  columns = _is_known(sent.T, left)
  rows = _is_known(sent * columns, np.linalg.qr(right)[0])
  return Completed(whole, rows, columns, share)


def _solve(matrix, sent, basis):
  """Returns the rows of the factor that goes with a basis f64[n, rank]."""
  rank = basis.shape[1]
  gram = _grams((1 - _WEIGHT) * sent + _WEIGHT, basis)
  gram += 1e-14 * np.eye(rank)
  return np.linalg.solve(gram, (matrix @ basis)[..., None])[..., 0]


def _grams(weights, basis):
  products = np.einsum("ja,jb->jab", basis, basis).reshape(len(basis), -1)
  return (weights @ products).reshape(len(weights), basis.shape[1], basis.shape[1])


def _is_known(sent, basis):
  return (np.linalg.eigvalsh(_grams(sent, basis))[:, 0] > _LEAST_EIGENVALUE).astype(float)
