"""Labels from the gradient of the classifier."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation
from jaxdia.core.errors import InputError
from jaxdia.core.precision import full_precision
from jaxdia.core.types import Labels
from jaxdia.gradients import layer_gradient
from jaxdia.models import DropoutModel

_DUMMIES = 32
# Of the sum of what should cancel, the share that rounding may leave.
_ROUNDING = 1e-3


def is_turned(model: DropoutModel, observation: Observation) -> bool:
  """Returns whether a gradient has the opposite sign, as new weights minus old ones have.

  By the bias of the classifier the gradient is `mean softmax - share of the class`. It sums to 0,
  and of B images it is negative for B classes at most. Where it is positive for so few and
  negative for more, it was turned. Without a bias, with half as many images as classes, or
  where noise hides the sum, nothing is told.

  Args:
    model: the network.
    observation: of one client, with concrete values.
  """
  layer = {} if model.classifier is None else layer_gradient(observation.gradient, model.classifier)
  if "bias" not in layer:
    return False
  bias = np.asarray(layer["bias"], np.float64)
  positive, negative = int(np.sum(bias > 0)), int(np.sum(bias < 0))
  sums_to_0 = abs(np.sum(bias)) <= _ROUNDING * np.sum(np.abs(bias))
  return bool(sums_to_0 and 0 < positive <= observation.batch_size < negative)


def check_sign(model: DropoutModel, observation: Observation) -> None:
  """Refuses a gradient that has the opposite sign; see `is_turned`.

  Args:
    model: the network.
    observation: of one client, with concrete values.

  Raises:
    InputError: it was turned.
  """
  if is_turned(model, observation):
    raise InputError(
      f"the gradient by the bias of {'/'.join(model.classifier or ())} is negative for more than"
      f" {observation.batch_size} classes; of a batch of {observation.batch_size} it is so for no"
      " more than that. It has the opposite sign: use its negative, as old weights minus new ones."
    )


def recover_labels(model: DropoutModel, observation: Observation) -> Labels:
  """Reads the labels of a batch from the gradient of the classifier.

  The gradient by the logits is softmax - one-hot: negative for the true class
  only (iDLG, Zhao et al. 2020), and, as it sums to zero, largest in size there.
  So the label of a single image is the least entry of the bias gradient or, where
  the classifier has no bias, the column of the kernel gradient with the largest
  norm, whatever the sign of its inputs. (Of two classes without a bias the columns
  are equal; then the answer is arbitrary.)

  Of a batch, the gradient by a class is `mean softmax - share of the class`. The
  mean softmax, and without a bias the mean input of the classifier too, are those of
  dummy images that are noise, as in LLG (Wainakh et al. 2022) and iLRG (Ma et al. 2023);
  the scale is such that the class with the largest gradient is absent, if one may
  be. The shares are rounded to whole counts. For distinct labels this is the sign
  rule of Yin et al. (2021): the classes with a negative gradient. How well it does
  depends on how alike the softmax of all images is: best at random weights.

  Args:
    model: the network; its `classifier` says where to look.
    observation: of one client.

  Returns:
    i[B], for a batch in ascending order: which image has which label, it does not tell.

  Raises:
    InputError: the model has no known classifier.
  """
  if model.classifier is None:
    raise InputError(
      "labels=recovered reads the gradient of a dense layer that gives the logits; this model"
      " has none. Use labels=free or labels=given."
    )
  layer = layer_gradient(observation.gradient, model.classifier)
  if "kernel" not in layer:
    raise InputError(
      f"labels=recovered reads the gradient of {'/'.join(model.classifier)}, which the observation"
      " lacks: the layer is frozen. Use labels=free or labels=given."
    )
  if observation.batch_size > 1:
    with full_precision():
      return _recover_counts(model, observation, layer)
  if "bias" in layer:
    label = jnp.argmin(layer["bias"])
  else:
    label = jnp.argmax(jnp.sum(jnp.square(layer["kernel"]), axis=0))
  return jax.lax.convert_element_type(label, jnp.int32)[None]


def _recover_counts(model, observation, layer) -> Labels:
  size = observation.batch_size
  images = jax.random.normal(jax.random.key(0), (_DUMMIES, *model.image_shape), jnp.float32)
  images = images.astype(observation.dtype)
  softmax = jnp.mean(jax.nn.softmax(model.apply(observation.params, None, images)), axis=0)
  if "bias" in layer:
    shares = softmax - layer["bias"]
  else:
    inputs = _mean_inputs(model, observation, images)
    slopes = inputs @ layer["kernel"] / jnp.sum(inputs**2)
    # The inputs of real images may be larger or smaller than those of noise. Of more classes than
    # images one is absent; then its share, 0, gives the scale.
    largest = jnp.max(slopes / softmax)
    absent = (model.num_classes > size) | (largest > 1)
    shares = softmax - slopes / jnp.where(absent, jnp.maximum(largest, 1e-30), 1.0)
  wanted = jnp.maximum(shares, 0)
  wanted = wanted * size / jnp.maximum(jnp.sum(wanted), 1e-30)
  counts = jnp.floor(wanted).astype(jnp.int32)
  # The largest remainders make up for what rounding down left out.
  order = jnp.argsort(counts.astype(wanted.dtype) - wanted)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
  counts += (rank < size - jnp.sum(counts)).astype(jnp.int32)
  return jnp.repeat(
    jnp.arange(model.num_classes, dtype=jnp.int32), counts, total_repeat_length=size
  )


def _mean_inputs(model, observation, images):
  taps = {
    layer.path: tuple(jnp.zeros((rows, layer.outputs), images.dtype) for rows in layer.rows)
    for layer in model.dense(len(images))
    if layer.path == model.classifier
  }
  if not taps:
    raise InputError(
      "the labels of a batch cannot be read from a classifier that has no bias and cannot be"
      " tapped. Use labels=free or labels=given."
    )
  _, inputs = model.apply_tapped(observation.params, None, images, taps)
  return jnp.mean(inputs[model.classifier][0], axis=0)
