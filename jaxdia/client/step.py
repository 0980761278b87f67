"""What a client computes: the gradient of one step, or what several local steps amount to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdia.client.defences import Defence, Step, as_defence, identity
from jaxdia.client.local import LocalUpdate, as_local, draw_masks, local_gradient
from jaxdia.client.losses import CROSS_ENTROPY, Function, Kind, Loss, as_loss
from jaxdia.client.observation import Observation, Secret
from jaxdia.core.errors import InputError
from jaxdia.core.transfers import with_transfers
from jaxdia.core.trees import is_traced
from jaxdia.core.types import (
  Gradient,
  Images,
  ImagesLike,
  Key,
  Labels,
  LabelsLike,
  Masks,
  Params,
  Scalar,
  Statistics,
  as_numbers,
  as_statistics,
  check_key,
  mend_of_labels,
)
from jaxdia.models import DropoutModel, check_model

# Images whose normalised values are the pixels themselves.
_PIXELS = Statistics(mean=(0.0,), std=(1.0,))
# How far a pixel may lie outside of 0 to 1, for rounding.
_NEARLY = 1e-3
# Folded into the key of a step for what its defence draws; the masks use the numbers of sites.
DEFENCE_STREAM = 2**31


def client_loss(
  model: DropoutModel,
  params: Params,
  masks: Masks | None,
  images: Images,
  labels: Labels,
  loss: Loss = CROSS_ENTROPY,
) -> Scalar:
  """Returns the loss that the client descends.

  Args:
    model: the network.
    params: its parameters.
    masks: one array for each dropout site; None for the network without dropout.
    images: f[B, H, W, C], normalised.
    labels: i[B] classes, or f[B, num_classes] probabilities.
    loss: of the logits.

  Returns:
    f[], the loss.
  """
  return loss(model.apply(params, masks, images), labels)


def client_gradient(
  model: DropoutModel,
  params: Params,
  masks: Masks | None,
  images: Images,
  labels: Labels,
  loss: Loss = CROSS_ENTROPY,
  local: LocalUpdate | None = None,
) -> Gradient:
  """Returns the gradient that the client sends: of `client_loss` by `params`.

  Args:
    model: the network.
    params: its parameters.
    masks: one array for each dropout site; None for the network without dropout.
    images: f[B, H, W, C], normalised.
    labels: i[B] classes, or f[B, num_classes] probabilities.
    loss: of the logits.
    local: what the client does with it before it sends anything; None sends it as it is.

  Returns:
    A tree like `params`.
  """

  def gradient(params, masks, images, labels):
    return jax.grad(client_loss, argnums=1)(model, params, masks, images, labels, loss)

  if local is None:
    return gradient(params, masks, images, labels)
  return local_gradient(gradient, params, masks, images, labels, local)


@with_transfers
def observe(
  key: Key,
  model: DropoutModel,
  params: Params,
  images: ImagesLike,
  labels: LabelsLike,
  *,
  statistics: Statistics = _PIXELS,
  reveal_labels: bool = True,
  defence: Defence = identity,
  loss: Loss | Kind | Function = CROSS_ENTROPY,
  local: LocalUpdate | None = None,
) -> tuple[Observation, Secret]:
  """Plays the training of a client that draws its dropout masks.

  Args:
    key: random key, from which the masks are drawn.
    model: the network.
    params: its parameters.
    images: f[B, H, W, C], normalised with `statistics`, of the params' type.
    labels: i[B] classes.
    statistics: what normalised the images; they tell an attack which values are
      valid pixels. By default the images are pixels in [0, 1].
    reveal_labels: whether the server is granted the labels, as the paper's
      attacks assume.
    defence: what the client does to its gradient before it sends it, which the server knows.
    loss: what the client descends: a `Loss`, the name of one, or a function.
    local: its local steps; None for one gradient.

  Returns:
    What the server sees, and what it does not.

  Raises:
    InputError: the model is none; images or labels that it cannot have been trained on, or that
      cannot be shared out among local steps; no such loss; or a defence that is none or does not
      suit the network.
  """
  check_key(key)
  check_model(model)
  params = nn.unbox(params)
  loss, defence, statistics = as_loss(loss), as_defence(defence), as_statistics(statistics)
  images, labels = as_numbers(images), as_numbers(labels)
  _check_batch(model, images, labels, statistics)
  dtype = jnp.result_type(*jax.tree.leaves(params))
  images, labels = jnp.asarray(images, dtype), jnp.asarray(labels, jnp.int32)
  local = as_local(local)
  masks = draw_masks(key, model, local, images.shape[0], dtype)
  gradient = _compiled_gradient(model, params, masks, images, labels, loss, local)
  step = None if local else Step(model, params, masks, images, labels, loss)
  observation = Observation(
    params=params,
    gradient=defence(jax.random.fold_in(key, DEFENCE_STREAM), gradient, step),
    labels=labels if reveal_labels else None,
    mean=statistics.mean,
    std=statistics.std,
    batch_size=images.shape[0],
    loss=loss,
    local=local,
    defence=defence,
  )
  return observation, Secret(images, labels, None if defence.redraws else masks)


_compiled_gradient = jax.jit(client_gradient, static_argnames="loss")


def _check_batch(model: DropoutModel, images: Any, labels: Any, statistics: Statistics) -> None:
  """Refuses a batch that the model cannot have been trained on; of traced arrays only shapes."""
  expected = ", ".join(str(n) for n in model.image_shape)
  if images.ndim != 4 or images.shape[1:] != tuple(model.image_shape) or not images.shape[0]:
    raise InputError(
      f"images have shape {images.shape}; expected (B, {expected}) with B at least 1."
      f" {_mend_of_images(images.shape, tuple(model.image_shape))}"
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise InputError(
      f"images are {images.dtype}; expected normalised floats. Divide pixels by 255, then"
      " normalise with jaxdia.data.normalize."
    )
  if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise InputError(
      f"labels are {labels.dtype} of shape {labels.shape}; expected integers of shape"
      f" ({images.shape[0]},), one class an image.{mend_of_labels(labels, images.shape[0])}"
    )
  if len(statistics.mean) not in (1, images.shape[-1]):
    raise InputError(
      f"statistics are for {len(statistics.mean)} channels; expected one number for each of the"
      f" {images.shape[-1]} of the images, or one for all."
    )
  if is_traced((images, labels)):
    return
  images, labels = np.asarray(images), np.asarray(labels)
  if not np.isfinite(images).all():
    raise InputError("images contain NaN or infinite values; expected finite floats.")
  mean, std = (np.asarray(value) for value in statistics)
  pixels = images * std + mean
  if pixels.min() < -_NEARLY or pixels.max() > 1 + _NEARLY:
    raise InputError(
      f"images have pixels from {pixels.min():.3g} to {pixels.max():.3g} for the statistics mean"
      f" {statistics.mean} and std {statistics.std}; expected 0 to 1, which is all that an attack"
      " looks for. Pass the statistics that normalised them, or divide pixels by 255."
    )
  if labels.min() < 0 or labels.max() >= model.num_classes:
    wrong = labels[(labels < 0) | (labels >= model.num_classes)][0]
    raise InputError(
      f"labels contain {wrong}; expected classes from 0 to {model.num_classes - 1}. Create the"
      " model with more classes, or correct the labels."
    )


def _mend_of_images(shape: tuple[int, ...], expected: tuple[int, int, int]) -> str:
  """Returns what makes images of other shapes those of a model, for the end of a message."""
  height, width, channels = expected
  if shape[1:] == (channels, height, width):
    return "Use images.transpose(0, 2, 3, 1)."
  if shape == expected:
    return "Use images[None] for a single one."
  if channels == 1 and shape[1:] == (height, width):
    return "Use images[..., None]."
  return "Resize them, or create the model for their shape."
