"""All samples of a batch, in rounds: find planes, complete samples, take them out.

What is taken out of the gradient lowers its rank, and leaves the zeros of the others
as many as they were: so every round is easier than the one before (deflation).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import CROSS_ENTROPY, Loss
from jaxdia.closed_form import chain as chains
from jaxdia.closed_form import spaces as planes
from jaxdia.closed_form import sparse
from jaxdia.closed_form.structure import Chain
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
# A singular value that is less than this share of the largest is rounding.
_NO_DIMENSION = 1e-6


class Batch(NamedTuple):
  """What was found of a batch.

  Attributes:
    samples: with leading axis k, at most the batch size.
    noise: f[], least singular value that is left out by the largest that is kept, over
      the layers: 1e-8 or so for an exact gradient, 1 for one that has not the rank of
      the batch.
    rank: the least number of dimensions that the gradient of a layer has: fewer than images if
      some coincide, or leave next to nothing.
    rounds: how often was searched.
  """

  samples: chains.Sample | None
  noise: float
  rank: int
  rounds: int


def solve(
  key: Key,
  model: DropoutModel,
  chain: Chain,
  params: Params,
  gradient: Gradient,
  batch_size: int,
  most_noise: float,
  loss: Loss = CROSS_ENTROPY,
  rounding: float = float(np.finfo(np.float32).eps),
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
    rounding: unit of the type that the client computed in.

  Returns:
    The samples that fit the gradient.
  """
  links = chains.links_of(chain)
  rate = model.rates.get(links.sites[0])
  zeros = (rate or 0.0, chains.may_be_silent(links.silent[0]))
  # The gradient of the logits has no more rank than classes but one, so it is used only where the
  # inputs of the last layer are shown by no other.
  spanning = chain.layers if len(chain.layers) == 2 else chain.layers[:-1]
  matrices = [np.asarray(x.weights) for x in planes.layers_of(spanning, gradient)]
  # Each by itself: an image that is there twice has one dimension before dropout, and two after it.
  ranks = [_rank(matrix, batch_size) for matrix in matrices]
  rank = min(ranks)
  found, noise, empty, rounds = [], 0.0, 0, 0
  while min(ranks) > 0 and empty < _EMPTY_ROUNDS:
    spanned = [
      planes.span(matrix, n, batch_size) for matrix, n in zip(matrices, ranks, strict=True)
    ]
    spaces = tuple(space for space, _ in spanned)
    if not rounds:
      noise = max(rest for _, rest in spanned)
      if noise > most_noise:
        break
    known = _candidates(jax.random.fold_in(key, rounds), spaces, zeros, ranks[0], 4**empty)
    rounds += 1
    samples = None
    if known is not None:
      samples = chains.complete(model, links, params, spaces, known, batch_size, loss, rounding)
      samples = jax.tree.map(np.asarray, samples)
      samples = _distinct(samples)
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
  if not found:
    return Batch(None, noise, rank, rounds)
  return Batch(jax.tree.map(lambda *x: np.concatenate(x), *found), noise, rank, rounds)


def _rank(matrix: np.ndarray, most: int) -> int:
  """Returns the numerical rank of a matrix, or `most` if it is higher."""
  values = np.linalg.svd(matrix, compute_uv=False)[:most]
  return int(np.sum(values > _NO_DIMENSION * values[0]))


def _candidates(key, spaces, zeros_of, left, effort):
  """Returns what candidate samples kept after the first layer, and their vectors there."""
  first, second = spaces[0], spaces[1]
  rate, silent = zeros_of
  sizes = np.linalg.norm(first.right, axis=0)
  counts = (sizes > _EMPTY_COLUMN * np.max(sizes)).astype(float)
  if left == 1:
    zero = (counts == 0)[None]
  else:
    if not any(zeros_of):
      return None
    points = (first.right / np.where(counts > 0, sizes, 1) * counts).T
    dimensions = len(first.values)
    starts = jax.random.normal(key, (effort, max(64, 4 * dimensions), dimensions))
    starts = starts.astype(jnp.float64) * (1 - first.padding)[None, None]
    starts /= jnp.linalg.norm(starts, axis=-1, keepdims=True)
    normals = np.concatenate(
      [sparse.search(points, counts, first.padding, some, 1 / effort) for some in starts]
    )
    # Of the columns that are not empty a sample dropped fewer, as it dropped all of the empty ones.
    share = max(rate * counts.size - np.sum(counts == 0), 1.0) / np.sum(counts)
    zeros = sparse.examine(points, counts, first.padding, normals, share, silent)
    chosen = sparse.distinct(zeros)[:left]
    if not len(chosen):
      return None
    zero = np.asarray(zeros.zero)[chosen] | (counts == 0)
  return _see(first, second, zero, zeros_of)


def _see(first, second, zero, zeros_of):
  # In sizes of which there are few, as each is compiled anew.
  size = next(n for n in (1, 4, 16, 64, 256, len(zero)) if n >= len(zero))
  missing = size - len(zero)
  zero = np.pad(zero, ((0, missing), (0, 0)), mode="edge")
  if not any(zeros_of):
    kept = np.ones(zero.shape)
    return kept[:1], first.right[:1], second.left[: zero.shape[1], 0][None]
  return _refine(first, second, zero, *zeros_of)


@jax.jit
def _refine(first, second, zero, rate, silent):
  off = jnp.zeros(zero.shape[1], bool)  # none is known to be
  return jax.lax.map(
    lambda one: chains.refine(first, second, one, off, rate, silent), zero, batch_size=64
  )


def _distinct(samples):
  """Returns the samples that are believed, each once; None if there is none."""
  kept: list[int] = []
  masks = samples.kept[0]
  limit = _GOOD if np.min(samples.residual) < _GOOD else _BELIEVED
  for i in np.argsort(samples.residual):
    if not samples.residual[i] < limit:
      break
    same = [j for j in kept if np.mean(masks[i] != masks[j]) < 0.02]
    if not any(np.allclose(samples.inputs[0][i], samples.inputs[0][j], rtol=1e-2) for j in same):
      kept.append(int(i))
  return jax.tree.map(lambda x: x[np.asarray(kept)], samples) if kept else None
