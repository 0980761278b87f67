"""The victim's side: what a client computes, and what of it the server sees."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdia.core.errors import InputError
from jaxdia.core.types import Gradient, Images, Key, Labels, Logits, Masks, Params, Statistics
from jaxdia.models import DropoutModel, jit_for_all_rates, sample_masks

# Images whose normalised values are the pixels themselves.
_PIXELS = Statistics(mean=(0.0,), std=(1.0,))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params", "gradient", "labels", "mean", "std"],
  meta_fields=["batch_size"],
)
@dataclasses.dataclass(frozen=True)
class Observation:
  """All that the server sees of one training step: the input of every attack.

  Attributes:
    params: the model's parameters, which the server sent.
    gradient: of the client's loss, a tree like `params`; or what
      `jaxdia.matching.prepare` made of it.
    labels: i[B], where the threat model grants them; otherwise None.
    mean: f[C] or f[1], public statistics of the kind of data.
    std: f[C] or f[1].
    batch_size: number of images in the client's batch, B.
  """

  params: Params
  gradient: Gradient
  labels: Labels | None
  mean: jax.Array
  std: jax.Array
  batch_size: int

  @property
  def dtype(self) -> jnp.dtype:
    """Floating-point type that the attack computes in: that of the gradient."""
    return jnp.result_type(*jax.tree.leaves(self.gradient))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["images", "labels", "masks"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Secret:
  """What stays with the client. Evaluation and the running of experiments alone may see it.

  Attributes:
    images: f[B, H, W, C], normalised.
    labels: i[B].
    masks: of the client's training step.
  """

  images: Images
  labels: Labels
  masks: Masks


def client_loss(
  model: DropoutModel, params: Params, masks: Masks, images: Images, labels: Labels
) -> jax.Array:
  """Returns the mean cross-entropy that the client descends.

  Args:
    model: the network.
    params: its parameters.
    masks: one array for each dropout site.
    images: f[B, H, W, C], normalised.
    labels: i[B] classes, or f[B, num_classes] probabilities.

  Returns:
    f[], the loss.
  """
  with full_precision():
    return loss_of_logits(model.apply(params, masks, images), labels)


def full_precision() -> contextlib.AbstractContextManager[None]:
  """Makes matrix products inside exact to their type, as they are on CPU without it.

  On GPU and TPU the default rounds float32 inputs to fewer bits. A gradient
  distance of 1e-5, where the paper's attacks end, cannot be seen then.
  """
  return jax.default_matmul_precision("highest")


def loss_of_logits(logits: Logits, labels: Labels) -> jax.Array:
  """Returns the mean cross-entropy of logits.

  Args:
    logits: f[B, num_classes].
    labels: i[B] classes, or f[B, num_classes] probabilities.

  Returns:
    f[], the loss.
  """
  if jnp.issubdtype(labels.dtype, jnp.integer):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return optax.softmax_cross_entropy(logits, labels).mean()


def client_gradient(
  model: DropoutModel, params: Params, masks: Masks, images: Images, labels: Labels
) -> Gradient:
  """Returns the gradient that the client sends: of `client_loss` by `params`.

  Args:
    model: the network.
    params: its parameters.
    masks: one array for each dropout site.
    images: f[B, H, W, C], normalised.
    labels: i[B] classes, or f[B, num_classes] probabilities.

  Returns:
    A tree like `params`.
  """
  return jax.grad(client_loss, argnums=1)(model, params, masks, images, labels)


def observe(
  key: Key,
  model: DropoutModel,
  params: Params,
  images: Images,
  labels: Labels,
  *,
  statistics: Statistics = _PIXELS,
  reveal_labels: bool = True,
) -> tuple[Observation, Secret]:
  """Plays one training step of a client that draws its dropout masks.

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

  Returns:
    What the server sees, and what it does not.

  Raises:
    InputError: images or labels that the model cannot have been trained on.
  """
  images, labels = _check_batch(model, images, labels)
  dtype = jnp.result_type(*jax.tree.leaves(params))
  images = jnp.asarray(images, dtype)
  labels = jnp.asarray(labels, jnp.int32)
  masks = sample_masks(key, model, images.shape[0], dtype)
  observation = Observation(
    params=params,
    gradient=_compiled_gradient(model, params, masks, images, labels),
    labels=labels if reveal_labels else None,
    mean=jnp.asarray(statistics.mean, dtype),
    std=jnp.asarray(statistics.std, dtype),
    batch_size=images.shape[0],
  )
  return observation, Secret(images, labels, masks)


_compiled_gradient = jit_for_all_rates(client_gradient)


def _check_batch(model, images, labels):
  images, labels = np.asarray(images), np.asarray(labels)
  expected = ", ".join(str(n) for n in model.image_shape)
  if images.ndim != 4 or images.shape[1:] != tuple(model.image_shape) or not len(images):
    raise InputError(
      f"images have shape {images.shape}; expected (B, {expected}) with B at least 1. Resize"
      " them, or create the model for their shape."
    )
  if not np.issubdtype(images.dtype, np.floating):
    raise InputError(
      f"images are {images.dtype}; expected normalised floats. Divide pixels by 255, then"
      " normalise with jaxdia.data.normalize."
    )
  if not np.isfinite(images).all():
    raise InputError("images contain NaN or infinite values; expected finite floats.")
  if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(
      f"labels are {labels.dtype} of shape {labels.shape}; expected integers of shape"
      f" ({len(images)},), one class an image."
    )
  if labels.min() < 0 or labels.max() >= model.num_classes:
    wrong = labels[(labels < 0) | (labels >= model.num_classes)][0]
    raise InputError(
      f"labels contain {wrong}; expected classes from 0 to {model.num_classes - 1}. Create the"
      " model with more classes, or correct the labels."
    )
  return images, labels
