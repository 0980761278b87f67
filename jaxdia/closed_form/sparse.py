"""Finding the samples of a batch by the zeros that dropout left.

The kernel gradient of a dense layer is a sum over the batch, `Σ_b x_bᵀ δ_b`. Its
column for unit j, seen in the B dimensions that the gradient spans, is a point; and
where sample b dropped unit j, δ_bj is exactly 0 and the point lies on the hyperplane
that belongs to b. So the samples are the hyperplanes on which far more points lie
than on any other: a sparse factorisation (dictionary learning; with ReLU in place of
dropout: SPEAR, Dimitrov et al. 2024, and SPEAR++, arXiv 2510.24200).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.closed_form.noise import CLEAN
from jaxdia.closed_form.serial import batched_map
from jaxdia.core.types import Array, Number, Scalar

_STEPS = 110
_SHRINK = 0.9
# From one value to the next, in order of size, near-zeros and the rest differ by this factor.
LEAST_GAP = 8.0
# A plane is worth a try from here on: what comes of it is checked against the gradient.
_CANDIDATE_GAP = 3.0
# Where rounding changed a larger share of a gradient, as in half precision, no gap is left between
# zeros and the rest, and nothing is exact.
MOST_ROUNDING = 1e-4


class Zeros(NamedTuple):
  """Which entries of a vector are zero up to noise.

  Attributes:
    zero: b[n].
    gap: f[], least of the other entries by the largest of these, in size.
  """

  zero: Bool[Array, "*planes n"]
  gap: Float[Array, "*planes"]


def search(
  points: Float[Array, "n rank"],
  counts: Float[Array, " n"],
  padding: Float[Array, " rank"],
  starts: Float[Array, "k rank"],
  scale: float = 1.0,
) -> Float[Array, "k rank"]:
  """Looks for hyperplanes through the origin on which many points lie.

  Iteratively reweighted least squares on Σ log((q·r)² + ε²), where ε shrinks from the
  size of a typical q·r: the first steps see the cloud as a whole, the last only the
  points on the plane. A slow start finds far more planes than a fast one (a first ε
  half as large, shrunk by 0.8 a step, finds 13 of 64 where this finds 42).

  Args:
    points: f64[n, rank], of unit length, or zero if they tell nothing.
    counts: f64[n], 1 for points that count, otherwise 0.
    padding: f64[rank], 1 for dimensions that are not used, otherwise 0.
    starts: f64[k, rank], unit vectors.
    scale: of the first ε, relative to a typical q·r.

  Returns:
    f64[k, rank], unit normals; many may be of the same plane, or of none.
  """
  return _search(points, counts, padding, starts, scale)


@jax.jit
def _search(points, counts, padding, starts, scale):
  rank = points.shape[1] - jnp.sum(padding)

  def one(q):
    def step(_, carry):
      q, epsilon = carry
      weights = counts / ((points @ q) ** 2 + epsilon**2)
      matrix = (points.T * weights[None]) @ points
      return _least_eigenvector(matrix, padding, q, 2), epsilon * _SHRINK

    return jax.lax.fori_loop(0, _STEPS, step, (q, scale / jnp.sqrt(rank)))[0]

  return batched_map(one, starts)


def normal(
  points: Float[Array, "n rank"],
  chosen: Float[Array, " n"] | Bool[Array, " n"],
  padding: Float[Array, " rank"],
) -> Float[Array, " rank"]:
  """Returns the unit normal of the hyperplane nearest to the chosen points.

  Args:
    points: f64[n, rank].
    chosen: f64[n] or b[n].
    padding: f64[rank], 1 for dimensions that are not used.

  Returns:
    f64[rank].
  """
  matrix = (points.T * chosen[None].astype(points.dtype)) @ points
  start = (1 - padding) * jnp.cos(
    1.0 + jnp.arange(len(padding), dtype=padding.dtype)
  )  # any that is not special
  return _least_eigenvector(matrix, padding, start, 4)


def _least_eigenvector(matrix, padding, start, steps):
  # Inverse iteration, not eigh: it is cheaper, and one chain of LAPACK calls (see `serial`).
  trace = jnp.trace(matrix)
  size = jnp.where(trace > 0, trace, 1.0)  # of no points, any vector will do
  factor = jax.scipy.linalg.cho_factor(
    matrix + jnp.diag(padding * (1 + size) + 1e-13 * size + 1e-300)
  )
  vector = start
  for _ in range(steps):
    vector = jax.scipy.linalg.cho_solve(factor, vector)
    vector /= jnp.linalg.norm(vector)
  return vector


def split_zeros(
  values: Float[Array, " n"],
  counts: Float[Array, " n"] | Bool[Array, " n"],
  least: int | Number,
  most: int | Number,
  rounding: Number = 0.0,
) -> Zeros:
  """Splits entries into zeros and others at the widest gap in the order of their sizes.

  In a gradient of half precision zeros may not be so much smaller than the least of the others that
  a gap would show. Then the split is the one that makes the entries likeliest as draws from two
  normal distributions, and what stands for the gap is how much wider the one is than the other.

  Args:
    values: f64[n].
    counts: f64[n] or b[n], which entries are looked at; the others are no zeros.
    least: f[], the least number of zeros.
    most: f[], the largest number.
    rounding: f[], share of the gradient that rounding changed.

  Returns:
    The zeros; with a gap of less than 1 if no number of them is in these bounds.
  """
  sizes = jnp.where(counts > 0, jnp.abs(values), jnp.inf)
  order = jnp.sort(sizes)
  noisy = rounding > CLEAN
  floor = jnp.where(noisy, rounding, 1e-14) * jnp.max(jnp.where(counts > 0, sizes, 0)) + 1e-300
  logs = jnp.log(jnp.maximum(order, floor))
  number = jnp.arange(1.0, len(order))  # of zeros, if the gap is after so many
  allowed = (number >= least) & (number <= most)
  gaps = jnp.where(jnp.isfinite(logs[1:]), logs[1:] - logs[:-1], 0)
  gaps = jnp.where(allowed, gaps, -1)
  best = jnp.argmax(gaps)
  squares = jnp.where(jnp.isfinite(order), jnp.maximum(order, floor) ** 2, 0)
  below = jnp.cumsum(squares)[:-1]
  others = jnp.maximum(jnp.sum(counts > 0, dtype=number.dtype) - number, 1)
  widths = jnp.log(below / number), jnp.log((jnp.sum(squares) - below) / others + floor**2)
  likelihoods = -(number * widths[0] + others * widths[1])
  likeliest = jnp.argmax(jnp.where(allowed & jnp.isfinite(logs[1:]), likelihoods, -jnp.inf))
  wider = jnp.where(allowed[likeliest], (widths[1] - widths[0])[likeliest] / 2, -1)
  fuzzy = noisy & (gaps[best] < jnp.log(LEAST_GAP))
  split, gap = (jnp.where(fuzzy, a, b) for a, b in ((likeliest, best), (wider, gaps[best])))
  return Zeros(sizes <= order[split], jnp.exp(gap))


@jax.jit
def examine(
  points: Float[Array, "n rank"],
  counts: Float[Array, " n"],
  padding: Float[Array, " rank"],
  normals: Float[Array, "k rank"],
  rate: Number,
  silent: Number,
  rounding: Number,
  noise: Float[Array, " rank"],
) -> Zeros:
  """Sharpens hyperplanes, and says which points lie on them.

  Args:
    points: f64[n, rank].
    counts: f64[n].
    padding: f64[rank].
    normals: f64[k, rank].
    rate: f[], of dropout: the share of points that lies on the plane of a sample.
    silent: f[], see `bounds`.
    rounding: f[], see `split_zeros`, of a plane that lies in no dimension with more noise.
    noise: f64[rank], standard deviation of the points in each dimension.

  Returns:
    `Zeros` with leading axis k. The gap is less than 1 if no more points lie on the plane
    than any rank - 1 points span.
  """
  rank = points.shape[1] - jnp.sum(padding)
  # Any rank - 1 points have a hyperplane, so fewer than a few more are no sign of one.
  least, most = bounds(jnp.sum(counts), rank + 2, rate, silent)

  def split(q):
    sizes = points @ q
    # Relative to the largest, as rounding is.
    own = jnp.linalg.norm(q * noise) / jnp.maximum(jnp.max(jnp.abs(sizes)), 1e-300)
    return split_zeros(sizes, counts, least, most, jnp.maximum(rounding, own))

  def one(q):
    zeros = split(q)
    for _ in range(2):
      zeros = split(normal(points, zeros.zero, padding))
    return zeros

  return batched_map(one, normals)


def bounds(
  count: int | Number, floor: Number, rate: Number, silent: Number = 0.0
) -> tuple[Scalar, Scalar]:
  """Returns how many of `count` entries may be zero by dropout of a rate, at least and at most.

  Args:
    count: f[], entries.
    floor: f[], it is no fewer.
    rate: f[], of dropout.
    silent: f[], the share of those kept that may be zero of itself, as behind a ReLU.
  """
  most = rate + (1 - rate) * silent
  spread = 6 * jnp.sqrt(count * rate * (1 - rate)) + 2
  return jnp.maximum(count * rate - spread, floor), count * most + spread


def distinct(zeros: Zeros) -> Integer[np.ndarray, " m"]:
  """Returns indices of planes that may be of a sample, each once, the clearest first.

  Args:
    zeros: with leading axis k.

  Returns:
    i[m].
  """
  zero, gap = np.asarray(zeros.zero), np.asarray(zeros.gap)
  kept: list[int] = []
  for i in np.argsort(-gap):
    if not gap[i] >= _CANDIDATE_GAP:
      break
    if all(np.mean(zero[i] != zero[j]) > 0.02 for j in kept):
      kept.append(int(i))
  return np.asarray(kept, int)
