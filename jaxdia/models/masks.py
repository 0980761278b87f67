"""Masks of a dropout model: drawn, expected, and those that a network's own library draws."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdia.core.errors import InputError
from jaxdia.core.precision import full_precision, usual_promotion
from jaxdia.core.random import draw
from jaxdia.core.types import Images, Key, Masks, Params, check_key
from jaxdia.models.base import DropoutModel
from jaxdia.models.hooks import Hooks
from jaxdia.models.layers import drop


def sample_masks(key: Key, model: DropoutModel, batch_size: int, dtype=jnp.float32) -> Masks:
  """Draws masks as training does: each entry is kept with probability 1 - rate.

  Args:
    key: random key.
    model: whose sites to draw for.
    batch_size: number of images.
    dtype: floating-point type of the masks.

  Returns:
    {site name: f[shape]} of zeros and ones, for every type the same ones, but for the rounding
    of rates that are arrays.
  """
  check_key(key)
  shapes = model.mask_shapes(batch_size)
  return {
    site.name: draw(
      jax.random.bernoulli,
      jax.random.fold_in(key, i),
      shapes[site.name],
      p=jnp.asarray(1 - site.rate, jnp.float32),
    ).astype(dtype)
    for i, site in enumerate(model.sites)
  }


def expected_masks(model: DropoutModel, batch_size: int, dtype=jnp.float32) -> Masks:
  """Returns the masks that make every site the identity: the evaluation mode.

  Args:
    model: whose sites to fill.
    batch_size: number of images.
    dtype: floating-point type of the masks.

  Returns:
    {site name: f[shape]}, everywhere 1 - rate.
  """
  shapes = model.mask_shapes(batch_size)
  return {s.name: jnp.full(shapes[s.name], 1 - s.rate, dtype) for s in model.sites}


def read_masks(model: DropoutModel, params: Params, images: Images, rngs: Any = None) -> Masks:
  """Returns the masks that a network's own library draws in a training step.

  With them a gradient that was computed by the library alone can be scored, or given to the
  well-informed attacker.

  Args:
    model: of `from_flax`, `from_nnx`, `from_equinox` or `from_torch`.
    params: of the step.
    images: f[B, H, W, C], of the step.
    rngs: Flax Linen: as they were given to `module.apply`. Flax NNX: the module as it was before
      the step, as its streams of random numbers are part of it. Equinox: the keys of the images,
      key[B]. PyTorch: what was given to `torch.manual_seed` before the step, on a CPU.

  Returns:
    {site: f[shape]} of zeros and ones.

  Raises:
    InputError: the model is of plain functions, whose library is not known.
  """
  masks: Masks = {}

  def read(call):
    if call.draw is None:
      raise InputError(
        f"{model.network.name} is no network of a library that draws masks; expected a model of"
        " from_flax, from_nnx, from_equinox or from_torch."
      )
    masks[call.name] = call.draw().astype(call.inputs.dtype)
    return drop(call.inputs, masks[call.name], call.rate)

  with full_precision(), usual_promotion():
    model.network.call(params, images, Hooks(read), rngs)
  return masks


def batch_axes(model: DropoutModel) -> dict[str, int | None]:
  """Returns for each site the axis of its mask that grows with the batch.

  Args:
    model: whose sites to look at.

  Returns:
    {site name: axis}, None where all images share one mask.
  """
  two, three = model.mask_shapes(2), model.mask_shapes(3)
  grows = {
    name: [axis for axis, (a, b) in enumerate(zip(two[name], three[name], strict=True)) if a != b]
    for name in two
  }
  return {name: axes[0] if axes else None for name, axes in grows.items()}
