"""The image of a vision transformer's single-image batch, by one least-squares solve.

Dropout comes after the position embedding is added. So the embedding's gradient is, token by
token, the derivative G of the loss by the patch embedding's outputs, and the gradient of
its kernel is `dW = Pᵀ G` with the patches P. With no more tokens than the width, P follows
(APRIL, Lu et al. 2022, for a network without dropout and a bias).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxdia.closed_form.structure import close, find_pixels, model_to_try, probing_params
from jaxdia.core.trees import leaves_by_path, with_leaves
from jaxdia.core.types import Gradient
from jaxdia.models import Network, sample_masks


class Patching(NamedTuple):
  """How a network cuts and embeds its images.

  Attributes:
    kernel: path of the kernel, whose last axis are the outputs.
    embedding: path of the position embedding.
    first: index of the first patch among its tokens.
    pixels: i[tokens, entries], which pixel each entry of a patch is, in the
      order of the kernel's rows.
    site: name of the dropout site right after the embedding, or None.
  """

  kernel: tuple[str, ...]
  embedding: tuple[str, ...]
  first: int
  pixels: Integer[np.ndarray, "tokens entries"]
  site: str | None


@functools.lru_cache
def find_patching(network: Network) -> Patching | None:
  """Finds a patch embedding to whose outputs a position embedding is added.

  That it is so is tried: a change of the kernel changes the logits just as the
  change of the embedding does that it stands for, for random images and masks.

  Args:
    network: of a model.

  Returns:
    The first that is found; None if there is none.
  """
  model = model_to_try(network)
  with jax.enable_x64(True):
    params = probing_params(model)
    leaves = leaves_by_path(params)
    for path, pixels in _kernels(model, params, leaves):
      width = leaves[path].shape[-1]
      for name, leaf in leaves.items():
        tokens = leaf.size // width
        if leaf.shape[-1] != width or leaf.size % width or name == path or tokens < len(pixels):
          continue
        for first in sorted({tokens - len(pixels), 0}, reverse=True):
          patching = Patching(path, name, first, pixels, None)
          if _is_added(model, params, patching):
            return patching._replace(site=_find_site(model, params, patching))
  return None


def _kernels(model, params, leaves):
  """Yields kernels that might embed patches, with the pixels of each patch."""
  for layer in model.dense(1):
    path = (*layer.path, "kernel")
    if leaves[path].ndim != 2:  # with several axes of outputs, as the heads of an attention
      continue
    pixels = find_pixels(model, params, layer)
    if pixels is not None and len(pixels) > 1:
      yield path, pixels
  height, width, channels = model.image_shape
  indices = np.arange(height * width * channels).reshape(model.image_shape)
  for path, leaf in leaves.items():
    if leaf.ndim == 4 and leaf.shape[2] == channels:
      rows, columns = leaf.shape[:2]
      if height % rows == 0 and width % columns == 0 and rows * columns < height * width:
        cut = indices.reshape(height // rows, rows, width // columns, columns, channels)
        yield path, cut.swapaxes(1, 2).reshape(-1, rows * columns * channels)


def _changed(params, changes):
  leaves = leaves_by_path(params)
  return with_leaves(params, leaves | {path: leaves[path] + changes[path] for path in changes})


def _is_added(model, params, patching) -> bool:
  leaves = leaves_by_path(params)
  rng = np.random.default_rng(0)
  image = rng.standard_normal(model.image_shape)
  masks = sample_masks(jax.random.key(0), model, 1, jnp.float64)
  change = 0.1 * rng.standard_normal(leaves[patching.kernel].shape)
  embedding = leaves[patching.embedding]
  tokens = np.zeros((embedding.size // embedding.shape[-1], embedding.shape[-1]))
  last = patching.first + len(patching.pixels)
  tokens[patching.first : last] = image.ravel()[patching.pixels] @ change.reshape(
    -1, change.shape[-1]
  )
  apply = jax.jit(model.apply)
  before, one, other = (
    apply(_changed(params, changes), masks, jnp.asarray(image[None]))
    for changes in (
      {},
      {patching.kernel: change},
      {patching.embedding: tokens.reshape(embedding.shape)},
    )
  )
  return close(one, other) and not close(before, other)


def _find_site(model, params, patching) -> str | None:
  """Finds the site whose zeros are those of the embedding's gradient."""
  shape = leaves_by_path(params)[patching.embedding].shape
  size = int(np.prod(shape))
  masks = sample_masks(jax.random.key(1), model, 1, jnp.float64)
  image = jnp.asarray(np.random.default_rng(1).standard_normal((1, *model.image_shape)))

  def first_logit(embedding, masks):
    leaves = leaves_by_path(params) | {patching.embedding: embedding}
    return model.apply(with_leaves(params, leaves), masks, image)[0, 0]

  slope = jax.jit(jax.grad(first_logit))(leaves_by_path(params)[patching.embedding], masks)
  for site, mask in masks.items():
    if mask.size == size and np.array_equal(np.ravel(slope) != 0, np.ravel(mask) != 0):
      return site
  return None


class Patches(NamedTuple):
  """What the solve gives.

  Attributes:
    image: f64[H, W, C], normalised.
    kept: f64[entries] of the site after the embedding, where there is one.
    residual: f[], of the solve, relative to the gradient of the kernel.
  """

  image: Float[np.ndarray, " pixels"]
  kept: Float[np.ndarray, " entries"] | None
  residual: float


def solve_patches(patching: Patching, gradient: Gradient) -> Patches | None:
  """Returns the image of a batch of one.

  Args:
    patching: of the network.
    gradient: that the client sent.

  Returns:
    The image; None if there are more tokens than the width allows.
  """
  leaves = leaves_by_path(gradient)
  embedding = np.asarray(leaves[patching.embedding], np.float64)
  kernel = np.asarray(leaves[patching.kernel], np.float64)
  kernel = kernel.reshape(-1, kernel.shape[-1])
  tokens = embedding.reshape(-1, embedding.shape[-1])
  tokens = tokens[patching.first : patching.first + len(patching.pixels)]
  if len(tokens) > tokens.shape[1]:
    return None
  patches, _, rank, _ = np.linalg.lstsq(tokens.T, kernel.T, rcond=None)
  if rank < len(tokens):
    return None
  residual = np.linalg.norm(patches.T @ tokens - kernel) / np.linalg.norm(kernel)
  image = np.zeros(patching.pixels.size)
  image[patching.pixels] = patches
  kept = (embedding.ravel() != 0).astype(float) if patching.site else None
  return Patches(image, kept, float(residual))
