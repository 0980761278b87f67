"""Which tokens belong to one sequence: what attention tells of it, under dropout too.

Scores are softmaxed over the tokens of a sequence. So the derivative of the loss by the query of
token i lies, in each head, in the span of `key_j - key_i` for the tokens j of its own sequence,
whatever masks there are behind. With all rows known, least squares on the gradients of the
kernels gives these derivatives. First each is written with as few tokens as possible, which says
who goes with whom; then the sequences are put together, and that each derivative lies in the
span of its own sequence proves them, as long as a sequence is shorter than a head is wide.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy.optimize import linear_sum_assignment

# Of the reweighted least squares that find few tokens.
_REWEIGHTINGS = 30
_LEAST_WEIGHT = 1e-6
_RIDGE = 1e-12
# Sweeps of the assignment, which settles in few.
_MOST_SWEEPS = 20


class Sentences(NamedTuple):
  """Rows by sequence.

  Attributes:
    sequence: i[n], the sequence that each row belongs to.
    outside: f64[n], share of each derivative that lies outside of the span of its sequence's
      keys; NaN for rows that attend to none but themselves.
  """

  sequence: Integer[np.ndarray, " n"]
  outside: Float[np.ndarray, " n"]


def find_sentences(
  keys: Float[np.ndarray, "n heads width"],
  derivatives: Float[np.ndarray, "n heads width"],
  positions: Integer[np.ndarray, " n"],
  count: int,
  causal: bool,
) -> Sentences:
  """Puts rows together to sequences.

  Args:
    keys: f64[n, H, d] of all rows.
    derivatives: f64[n, H, d] of the loss by their queries.
    positions: i[n] of the rows, at most `count` of one.
    count: sequences of the batch.
    causal: whether a token attends to those before it alone.
  """
  affinity = np.zeros((len(keys), len(keys)))
  for i in range(len(keys)):
    others = _seen(positions, i, causal)
    if len(others) and derivatives[i].any():
      affinity[i, others] = _few(keys[others] - keys[i], derivatives[i])
  sequence = assign(affinity + affinity.T, positions, count)
  outside = np.full(len(keys), np.nan)
  for i in range(len(keys)):
    others = _seen(positions, i, causal)
    others = others[sequence[others] == sequence[i]]
    if len(others) and derivatives[i].any():
      outside[i] = _outside(keys[others] - keys[i], derivatives[i])
  return Sentences(sequence, outside)


def _seen(positions: np.ndarray, i: int, causal: bool) -> np.ndarray:
  """Returns which rows row i may attend to, but for itself."""
  return np.flatnonzero(positions < positions[i] if causal else positions != positions[i])


def _few(directions: np.ndarray, derivative: np.ndarray) -> np.ndarray:
  """Returns how much of each row is in a derivative that is written with few of them, f64[m].

  Reweighted least squares; the heads share the rows.
  """
  directions = directions.transpose(1, 2, 0)  # f[H, d, m]
  derivative = derivative / np.linalg.norm(derivative)
  share, least = np.ones(directions.shape[-1]), 1.0
  eye = np.eye(directions.shape[1])
  for _ in range(_REWEIGHTINGS):
    weighted = directions * (share + least)
    gram = weighted @ directions.transpose(0, 2, 1)
    gram += _RIDGE * np.trace(gram, axis1=1, axis2=2)[:, None, None] * eye
    solved = np.linalg.solve(gram, derivative[..., None])
    coefficients = (weighted.transpose(0, 2, 1) @ solved)[..., 0]  # f[H, m]
    share = np.linalg.norm(coefficients, axis=0)
    share = share / max(share.max(), 1e-300)
    least = max(0.6 * least, _LEAST_WEIGHT)
  return share


def assign(
  affinity: Float[np.ndarray, "n n"],
  positions: Integer[np.ndarray, " n"],
  count: int,
  start: Integer[np.ndarray, " n"] | None = None,
) -> Integer[np.ndarray, " n"]:
  """Returns sequences in which each position stands once, and like goes with like.

  Args:
    affinity: f64[n, n], symmetric.
    positions: i[n], at most `count` of one.
    count: sequences that there are.
    start: a first guess.

  Returns:
    i[n], the sequence of each.
  """
  sequence = np.full(len(affinity), -1) if start is None else start.copy()
  order = sorted(set(positions.tolist()), key=lambda p: (-np.sum(positions == p), p))
  for sweep in range(_MOST_SWEEPS):
    before = sequence.copy()
    for position in order:
      here = np.flatnonzero(positions == position)
      others = positions != position
      gain = np.stack(
        [affinity[np.ix_(here, np.flatnonzero(others & (sequence == s)))].sum(axis=1)
         for s in range(count)], axis=1
      )  # fmt: skip
      rows, columns = linear_sum_assignment(-gain)
      sequence[here[rows]] = columns
    if sweep and np.array_equal(before, sequence):
      break
  return sequence


def _outside(directions: np.ndarray, derivative: np.ndarray) -> float:
  """Returns the share of a derivative that lies outside of the span of directions, in any head."""
  left = 0.0
  for head in range(directions.shape[1]):
    basis = directions[:, head].T
    solved = np.linalg.lstsq(basis, derivative[head], rcond=None)[0]
    left += np.sum((derivative[head] - basis @ solved) ** 2)
  return float(np.sqrt(left) / np.linalg.norm(derivative))
