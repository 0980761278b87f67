"""All samples of a batch, in rounds: find planes, complete samples, take them out.

What is taken out of the gradient lowers its rank, and leaves the zeros of the others
as many as they were: so every round is easier than the one before (deflation).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Loss
from jaxdia.closed_form import chain as chains
from jaxdia.closed_form import spaces as planes
from jaxdia.closed_form import sparse
from jaxdia.closed_form.found import OF_ROUNDING, tolerance_of
from jaxdia.closed_form.structure import Chain, activate
from jaxdia.core.types import Gradient, Key, Params
from jaxdia.models import DropoutModel

# A sample whose residual is larger is not believed, and not taken out. Those with a small one are
# taken out first: what is wrong with the others may show when less is in their way.
_GOOD, _BELIEVED = 1e-4, 0.02
# After so many rounds without a sample the search ends. Each has four times the starts of the one
# before, and a fourth of its first epsilon: they keep to where they start, and do not all end
# in one place where points crowd without lying on a plane (as for two images of one class).
_EMPTY_ROUNDS = 3
# A column that all samples dropped is rounding; in size, relative to the usual one.
_EMPTY_COLUMN = 1e-4
# In a layer too narrow to have a singular value beyond the batch size, rounding is less than this
# share of the largest.
_NO_DIMENSION = 1e-6
# Rounding of float32 is less than this share of the largest.
_MOST_ROUNDING = 1e-7


class Copies(NamedTuple):
  """An image that is in the batch more than once.

  Attributes:
    inputs: f64[inputs (+ 1)], of the first layer.
    residual: f[], how far its inputs of the second layer are from what the gradient allows.
    number: how often it is there.
  """

  inputs: np.ndarray
  residual: float
  number: int


class Batch(NamedTuple):
  """What was found of a batch.

  Attributes:
    samples: with leading axis k, at most the batch size.
    noise: f[], first singular value beyond the batch size by the last that counts, the most of
      all layers: 1e-8 or so for an exact gradient, 1 for one that has not the rank of the batch.
    rank: the least number of dimensions that the gradient of a layer has: fewer than images if
      some coincide, or leave next to nothing.
    rounds: how often was searched.
    copies: what is left if it is one image several times.
  """

  samples: chains.Sample | None
  noise: float
  rank: int
  rounds: int
  copies: Copies | None = None


def solve(
  key: Key,
  model: DropoutModel,
  chain: Chain,
  params: Params,
  gradient: Gradient,
  batch_size: int,
  most_noise: float,
  loss: Loss,
  rounding: float,
) -> Batch:
  """Recovers the samples of a batch from the gradients of a chain of dense layers.

  Args:
    key: random key, of the starts of the search.
    model: the network.
    chain: its dense layers, at least two.
    params: its parameters, f64.
    gradient: that the client sent.
    batch_size: of the client.
    most_noise: with more than this no sample is looked for.
    loss: of the client.
    rounding: share of the gradient that rounding changed, at least a unit of the type that the
      client computed in.

  Returns:
    The samples that fit the gradient.
  """
  links = chains.links_of(chain)
  rate = model.rates.get(links.sites[0])
  zeros = (rate or 0.0, chains.may_be_silent(links.silent[0]), rounding)
  # The gradient of the logits has no more rank than classes but one, so it is used only where the
  # inputs of the last layer are shown by no other.
  spanning = chain.layers if len(chain.layers) == 2 else chain.layers[:-1]
  matrices = [np.asarray(x.weights) for x in planes.layers_of(spanning, gradient)]
  # Each by itself: an image that is there twice has one dimension before dropout, and two after it.
  found_ranks = [_rank(matrix, batch_size, most_noise) for matrix in matrices]
  ranks, noises = zip(*found_ranks, strict=True)
  rank, noise = min(ranks), max(noises)
  found, empty, rounds, copies = [], 0, 0, None
  while noise <= most_noise and min(ranks) > 0 and empty < _EMPTY_ROUNDS:
    spaces = tuple(
      planes.span(matrix, n, batch_size) for matrix, n in zip(matrices, ranks, strict=True)
    )
    if ranks[0] == 1 < ranks[1]:
      copies = _find_copies(key, model, links, params, spaces, zeros, noise, ranks[1])
      break
    known = _candidates(jax.random.fold_in(key, rounds), spaces, zeros, ranks[0], 4**empty)
    rounds += 1
    samples = None
    if known is not None:
      samples = chains.complete(model, links, params, spaces, known, batch_size, loss, rounding)
      samples = jax.tree.map(np.asarray, samples)
      samples = _distinct(samples, max(_BELIEVED, 2 * float(tolerance_of(rounding))))
    if samples is None:
      empty += 1
      continue
    empty = 0
    for k, space in enumerate(spaces):
      for inputs, delta in zip(samples.inputs[k], samples.deltas[k], strict=True):
        # Scaled so that the rank becomes exactly one less.
        scale = float(planes.share(inputs, delta, space))
        matrices[k] = matrices[k] - np.outer(inputs, delta) / scale
    found.append(samples)
    ranks = [n - len(samples.label) for n in ranks]
  samples = jax.tree.map(lambda *x: np.concatenate(x), *found) if found else None
  return Batch(samples, noise, rank, rounds, copies)


def _rank(matrix: np.ndarray, most: int, most_noise: float) -> tuple[int, float]:
  """Returns the numerical rank of a matrix, or `most` if it is higher, and `Batch.noise`.

  The first singular value beyond the batch size is rounding (or noise). A larger one counts if that
  is less than the share `most_noise` of it, with more than which nothing is looked for: so an image
  that hardly stands out hides no other.
  """
  # Units that are off in all images make a layer narrower.
  values = np.linalg.svd(matrix[matrix.any(axis=1)][:, matrix.any(axis=0)], compute_uv=False)
  if len(values) <= most:
    return int(np.sum(values > _NO_DIMENSION * np.max(values, initial=0))), 0.0
  rest = values[most]
  rank = int(np.sum(rest < most_noise * values[:most]))
  # Of an exact gradient samples may be lost in rounding; of another, the first to be left out is
  # about as large as the last that is not.
  least = values[rank - 1] if 0 < rest < _MOST_ROUNDING * values[0] else values[most - 1]
  return rank, float(rest / max(least, 1e-300))


def _candidates(key, spaces, zeros_of, left, effort):
  """Returns what candidate samples kept after the first layer, and their vectors there."""
  first, second = spaces[0], spaces[1]
  if left > 1:
    zero = _find_planes(key, first.right.T, first.padding, zeros_of, left, effort)
    return None if zero is None else _see(first, second, zero, zeros_of)
  filled = _filled(first.right.T, zeros_of[-1])
  return _see(first, second, ~filled[None], zeros_of)


def _filled(points, rounding):
  """Returns which of the points are more than rounding."""
  sizes = np.linalg.norm(points, axis=1)
  return sizes > max(_EMPTY_COLUMN, OF_ROUNDING * rounding) * np.max(sizes)


def _find_planes(key, points, padding, zeros_of, most, effort):
  """Returns on which hyperplanes many points lie, b[planes, points]; None if there are none."""
  rate, silent, rounding = zeros_of
  if not (rate or silent):
    return None
  filled = _filled(points, rounding)
  counts, dimensions = filled.astype(float), points.shape[1]
  points = points / np.where(filled, np.linalg.norm(points, axis=1), 1)[:, None] * counts[:, None]
  starts = jax.random.normal(key, (effort, max(64, 4 * dimensions), dimensions))
  starts = starts.astype(jnp.float64) * (1 - padding)[None, None]
  starts /= jnp.linalg.norm(starts, axis=-1, keepdims=True)
  normals = np.concatenate(
    [sparse.search(points, counts, padding, some, 1 / effort) for some in starts]
  )
  # Of the columns that are not empty a sample dropped fewer, as it dropped all of the empty ones.
  share = max(rate * counts.size - np.sum(counts == 0), 1.0) / np.sum(counts)
  zeros = sparse.examine(points, counts, padding, normals, share, silent, rounding)
  chosen = sparse.distinct(zeros)[:most]
  return np.asarray(zeros.zero)[chosen] | (counts == 0) if len(chosen) else None


def _find_copies(key, model, links, params, spaces, zeros_of, noise, number) -> Copies | None:
  """Finds the one image that is left, with several masks."""
  first, second = spaces[:2]
  layers = planes.layers_of(links.layers[:2], params)
  if layers[0].biased:
    return Copies(first.left[:, 0] / first.left[-1, 0], noise, number)
  if links.straight:
    return None  # an image of any size has such inputs of the second layer
  width = links.layers[0].outputs
  # Between any two copies there is a plane too, of what both kept.
  zero = _find_planes(key, second.left[:width], second.padding, zeros_of, number**2, 1)
  if zero is None:
    return None
  found = [_of_zeros(model, links, params, first, second, one) for one in zero]
  inputs, residual = min(found, key=lambda pair: pair[1])
  return Copies(np.asarray(inputs), float(residual), number)


@functools.partial(jax.jit, static_argnums=1)
def _of_zeros(model, links, params, first, second, zero):
  layers = planes.layers_of(links.layers[:2], params)

  def activation(outputs):
    def function(z):
      return activate(model, params, links.layers[0], links.layers[1], z)

    return jax.jvp(function, (outputs,), (jnp.ones_like(outputs),))

  points = second.left[: len(zero)]
  kept = 1 - zero.astype(points.dtype)
  h = kept * (points @ sparse.normal(points, zero, second.padding))
  inputs = planes.first_inputs(first, layers[0], activation, kept, h, links.straight) @ first.left.T
  after = kept * activation(inputs @ layers[0].weights)[0]
  after = jnp.append(after, 1.0) if layers[1].biased else after
  left = after - second.left @ (after @ second.left)
  return inputs, jnp.linalg.norm(left) / jnp.linalg.norm(after)


def _see(first, second, zero, zeros_of):
  # In sizes of which there are few, as each is compiled anew.
  size = next(n for n in (1, 4, 16, 64, 256, len(zero)) if n >= len(zero))
  missing = size - len(zero)
  zero = np.pad(zero, ((0, missing), (0, 0)), mode="edge")
  if not any(zeros_of[:2]):
    kept = np.ones(zero.shape)
    return kept[:1], first.right[:1], second.left[: zero.shape[1], 0][None]
  return _refine(first, second, zero, *zeros_of)


@jax.jit
def _refine(first, second, zero, rate, silent, rounding):
  off = jnp.zeros(zero.shape[1], bool)  # none is known to be
  return jax.lax.map(
    lambda one: chains.refine(first, second, one, off, rate, silent, rounding), zero, batch_size=64
  )


def _distinct(samples, believed):
  """Returns the samples that are believed, each once; None if there is none."""
  kept: list[int] = []
  masks = samples.kept[0]
  limit = _GOOD if np.min(samples.residual) < _GOOD else believed
  for i in np.argsort(samples.residual):
    if not samples.residual[i] < limit:
      break
    same = [j for j in kept if np.mean(masks[i] != masks[j]) < 0.02]
    if not any(np.allclose(samples.inputs[0][i], samples.inputs[0][j], rtol=1e-2) for j in same):
      kept.append(int(i))
  return jax.tree.map(lambda x: x[np.asarray(kept)], samples) if kept else None
