"""All samples of a batch, in rounds: find planes, complete samples, take them out.

What is taken out of the gradient lowers its rank, and leaves the zeros of the others
as many as they were: so every round is easier than the one before (deflation).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.client import Loss
from jaxdia.closed_form import chain as chains
from jaxdia.closed_form import spaces as planes
from jaxdia.closed_form import sparse
from jaxdia.closed_form.found import MOST_ALLOWED, OF_ROUNDING, tolerance_of
from jaxdia.closed_form.missing import Completed, complete, is_pruned
from jaxdia.closed_form.noise import Spectrum, find_levels, spectrum
from jaxdia.closed_form.parts import NO_LABEL
from jaxdia.closed_form.serial import batched_map
from jaxdia.closed_form.structure import LayerChain, activate
from jaxdia.core.random import draw
from jaxdia.core.types import Gradient, Key, Params
from jaxdia.models import DropoutModel

# A sample whose residual is larger is not believed, and not taken out. Those with a small one are
# taken out first: what is wrong with the others may show when less is in their way.
_GOOD, _BELIEVED = 1e-4, 0.02
# Of a pruned gradient nothing is taken out, and pixels that were not sent are missed by the others.
_PRUNED = 0.3
# After so many rounds without a sample the search ends. Each has four times the starts of the one
# before, and a fourth of its first epsilon: they keep to where they start, and do not all end
# in one place where points crowd without lying on a plane (as for two images of one class).
_EMPTY_ROUNDS = 3
# A column that all samples dropped is rounding; in size, relative to the usual one.
_EMPTY_COLUMN = 1e-4
# In a layer too narrow to have a singular value beyond the batch size, rounding is less than this
# share of the largest.
_NO_DIMENSION = 1e-6
# No singular value of noise is larger than its standard deviation times the sum of the roots of the
# two dimensions, were its entries alike; of rounding, whose entries are not, than so many times.
_OF_EDGE = 4


class Copies(NamedTuple):
  """An image that is in the batch more than once.

  Attributes:
    inputs: f64[inputs (+ 1)], of the first layer.
    residual: f[], how far its inputs of the second layer are from what the gradient allows.
    number: how often it is there.
  """

  inputs: Float[np.ndarray, " inputs"]
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
    level: how noisy the gradient is, in the layer where it is most.
    pruned: whether a part of the gradient was not sent.
    told: f64[inputs (+ 1)] of the first layer, 1 for those that the gradient tells; of others too
      little was sent.
    copies: what is left if it is one image several times.
  """

  samples: chains.Sample | None
  noise: float
  rank: int
  rounds: int
  level: float
  pruned: bool
  told: Float[np.ndarray, " inputs"]
  copies: Copies | None = None


def solve(
  key: Key,
  model: DropoutModel,
  chain: LayerChain,
  params: Params,
  gradient: Gradient,
  batch_size: int,
  most_noise: float,
  loss: Loss,
  rounding: float,
  noise: float | None = None,
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
    noise: standard deviation of the noise of an entry; estimated if None.

  Returns:
    The samples that fit the gradient.
  """
  links = chains.links_of(chain)
  rate = model.rates.get(links.sites[0])
  # The gradient of the logits has no more rank than classes but one, so it is used only where the
  # inputs of the last layer are shown by no other.
  spanning = chain.layers if len(chain.layers) == 2 else chain.layers[:-1]
  matrices = [np.asarray(x.weights) for x in planes.layers_of(spanning, gradient)]
  parts = [_whole(matrix, batch_size) for matrix in matrices]
  pixels = parts[0].rows
  # Pixels of which too little was sent are guessed, as the network takes all of them.
  told = [(x.rows if k else np.ones(len(x.rows)), x.columns) for k, x in enumerate(parts)]
  matrices = [
    x.matrix * rows[:, None] * columns for x, (rows, columns) in zip(parts, told, strict=True)
  ]
  pruned = any(part.pruned for part in parts)
  spectra = [spectrum(matrix, batch_size) for matrix in matrices]
  levels = find_levels(spectra, batch_size, max(rounding, *(x.share for x in parts)), noise)
  level = max(one.share for one in levels)
  shares = np.minimum([one.share for one in levels], MOST_ALLOWED)
  stds = [one.std * share / one.share for one, share in zip(levels, shares, strict=True)]
  zeros = (rate or 0.0, chains.may_be_silent(links.silent[0]), float(np.max(shares[:2])))
  # Each by itself: an image that is there twice has one dimension before dropout, and two after it.
  found_ranks = [
    _rank(seen, batch_size, most_noise, one.share)
    for seen, one in zip(spectra, levels, strict=True)
  ]
  ranks, noises = zip(*found_ranks, strict=True)
  rank, outside = min(ranks), max(noises)
  found, empty, rounds, copies = [], 0, 0, None
  while outside <= most_noise and min(ranks) > 0 and empty < _EMPTY_ROUNDS:
    spaces = tuple(
      planes.span(matrix, n, batch_size, known, std)
      for matrix, n, known, std in zip(matrices, ranks, told, stds, strict=True)
    )
    if ranks[0] == 1 < ranks[1]:
      copies = _find_copies(key, model, links, params, spaces, zeros, outside, ranks[1])
      break
    known = _candidates(jax.random.fold_in(key, rounds), spaces, zeros, ranks[0], 4**empty)
    rounds += 1
    samples = None
    if known is not None:
      samples = chains.complete(
        model, links, params, spaces, known, batch_size, loss, shares, levels[0].std
      )
      samples = jax.tree.map(np.asarray, samples)
      samples = _by_first_layer(samples) if pruned else samples
      tolerance = np.asarray(tolerance_of(samples.level))
      believed = np.maximum(_PRUNED if pruned else _BELIEVED, 2 * tolerance)
      samples = _distinct(samples, believed, 0 if pruned else _GOOD)
    if samples is None:
      empty += 1
      continue
    found.append(samples)
    if pruned:
      break  # what was not sent cannot be taken out
    empty = 0
    for k, space in enumerate(spaces):
      for inputs, delta in zip(samples.inputs[k], samples.deltas[k], strict=True):
        # Scaled so that the rank becomes exactly one less.
        scale = float(planes.share(inputs, delta, space))
        rows, columns = told[k]
        matrices[k] = matrices[k] - np.outer(rows * inputs, columns * delta) / scale
    ranks = [n - len(samples.label) for n in ranks]
  samples = jax.tree.map(lambda *x: np.concatenate(x), *found) if found else None
  return Batch(samples, outside, rank, rounds, level, pruned, pixels, copies)


def _whole(matrix: np.ndarray, size: int) -> Completed:
  """Fills in entries that were not sent."""
  if min(matrix.shape) > size and is_pruned(matrix):
    return complete(matrix, size)
  rows, columns = (np.ones(n) for n in matrix.shape)
  return Completed(matrix, rows, columns, 0.0, False)


def _rank(seen: Spectrum, most: int, most_noise: float, level: float) -> tuple[int, float]:
  """Returns the numerical rank of a gradient, or `most` if it is higher, and `Batch.noise`.

  The first singular value beyond the batch size is rounding (or noise). A larger one counts if that
  is less than the share `most_noise` of it, with more than which nothing is looked for: so an image
  that hardly stands out hides no other.
  """
  values = seen.values
  if len(values) <= most:
    return int(np.sum(values > _NO_DIMENSION * np.max(values, initial=0))), 0.0
  rest = values[most]
  rank = int(np.sum(rest < most_noise * values[:most]))
  # Of a gradient that is exact, or whose noise is known, samples may be lost in it; of another, the
  # first to be left out is about as large as the last that is not.
  known = level * np.linalg.norm(values) * sum(n**-0.5 for n in seen.shape)
  least = values[rank - 1] if 0 < rest < _OF_EDGE * known else values[most - 1]
  return rank, float(rest / max(least, 1e-300))


def _candidates(key, spaces, zeros_of, left, effort):
  """Returns what candidate samples kept after the first layer, and their vectors there."""
  first, second = spaces[0], spaces[1]
  if left > 1:
    points = first.right.T
    zero = _find_planes(
      key, points, first.columns, first.padding, first.noise, zeros_of, left, effort
    )
    return None if zero is None else _see(first, second, zero, zeros_of)
  filled = _filled(np.linalg.norm(first.right, axis=0), zeros_of[-1])
  return _see(first, second, ~filled[None], zeros_of)


def _filled(sizes, rounding):
  """Returns which points are more than rounding, by their sizes."""
  return sizes > max(_EMPTY_COLUMN, OF_ROUNDING * rounding) * np.max(sizes)


def _find_planes(key, points, told, padding, noise, zeros_of, most, effort):
  """Returns on which hyperplanes many points lie, b[planes, points]; None if there are none."""
  rate, silent, rounding = zeros_of
  if not (rate or silent):
    return None
  sizes = np.linalg.norm(points, axis=1)
  filled = _filled(sizes, rounding)
  counts, dimensions = filled.astype(float), points.shape[1]
  points = points / np.where(filled, sizes, 1)[:, None] * counts[:, None]
  noise = noise / np.sqrt(np.mean(sizes[filled] ** 2))
  starts = draw(jax.random.normal, key, (effort, max(64, 4 * dimensions), dimensions))
  starts = starts.astype(jnp.float64) * (1 - padding)[None, None]
  starts /= jnp.linalg.norm(starts, axis=-1, keepdims=True)
  normals = np.concatenate(
    [sparse.search(points, counts, padding, some, 1 / effort) for some in starts]
  )
  # Of the columns that are not empty a sample dropped fewer, as it dropped all of the empty ones.
  empty = np.sum((counts == 0) & (told > 0))
  share = max(rate * np.sum(told) - empty, 1.0) / np.sum(counts)
  zeros = sparse.examine(points, counts, padding, normals, share, silent, rounding, noise)
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
  rows = second.rows[:width]
  points, padding, noise = second.left[:width], second.padding, second.noise
  zero = _find_planes(key, points, rows, padding, noise, zeros_of, number**2, 1)
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
  coordinates, *_ = planes.first_inputs(first, layers[0], activation, kept, h, links.straight)
  inputs = coordinates @ first.left.T
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
  return batched_map(
    lambda one: chains.refine(first, second, one, off, rate, silent, rounding), zero
  )


def _by_first_layer(samples):
  """Judges samples by the equations of their images alone, where those of later layers fail.

  Deltas after the first layer have entries that were not sent, so what is solved for in later
  layers is off, and with it labels and masks.
  """
  failed = ~(samples.residual < _GOOD)

  def unless_failed(first, *later):
    return (first, *(entries & ~failed[:, None] for entries in later))

  return samples._replace(
    active=unless_failed(*samples.active),
    sure=unless_failed(*samples.sure),
    label=np.where(failed, NO_LABEL, samples.label),
    scale=np.where(failed, np.nan, samples.scale),
    residual=np.where(failed, samples.fit, samples.residual),
  )


def _distinct(samples, believed, good):
  """Returns the samples that are believed, each once; None if there is none."""
  kept: list[int] = []
  masks = samples.kept[0]
  first = np.min(samples.residual) < good
  for i in np.argsort(samples.residual):
    if not samples.residual[i] < (good if first else believed[i]):
      continue
    same = [j for j in kept if np.mean(masks[i] != masks[j]) < 0.02]
    if not any(np.allclose(samples.inputs[0][i], samples.inputs[0][j], rtol=1e-2) for j in same):
      kept.append(int(i))
  return jax.tree.map(lambda x: x[np.asarray(kept)], samples) if kept else None
