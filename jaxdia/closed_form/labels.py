"""Labels from the gradient of the classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation, check_fit
from jaxdia.closed_form.last_layer import find_last_layer
from jaxdia.core.errors import InputError
from jaxdia.core.precision import full_precision
from jaxdia.core.random import draw
from jaxdia.core.transfers import with_transfers
from jaxdia.core.trees import is_traced
from jaxdia.core.types import Labels
from jaxdia.models import DropoutModel, discovery

_DUMMIES = 32
# What turns logits into outputs from which the loss subtracts its targets.
_SQUASHED = {"cross_entropy": jax.nn.softmax, "binary_cross_entropy": jax.nn.sigmoid}
# Of the sum of what should cancel, the share that rounding may leave.
_ROUNDING = 1e-3


def is_turned(model: DropoutModel, observation: Observation) -> bool:
  """Returns whether a gradient has the opposite sign, as new weights minus old ones have.

  By the bias of the classifier the gradient of the cross-entropy is `mean softmax - share of the
  class`. It sums to 0, and of B images it is negative for B classes at most. Where it is positive
  for so few and negative for more, it was turned. Without a bias, with half as many images as
  classes, where noise hides the sum, or with label smoothing or another loss, nothing is told.

  Args:
    model: the network.
    observation: of one client, with concrete values.
  """
  last = find_last_layer(model.network)
  layer = {} if last is None else last.read(observation.gradient, model.num_classes)
  loss = observation.loss
  if "bias" not in layer or loss.kind != "cross_entropy" or loss.label_smoothing:
    return False
  bias = np.asarray(layer["bias"], np.float64)
  positive, negative = int(np.sum(bias > 0)), int(np.sum(bias < 0))
  sums_to_0 = abs(np.sum(bias)) <= _ROUNDING * np.sum(np.abs(bias))
  return bool(sums_to_0 and 0 < positive <= observation.batch_size < negative)


def check_sign(model: DropoutModel, observation: Observation) -> None:
  """Refuses a gradient that is of another model, or has the opposite sign; see `is_turned`.

  Args:
    model: the network.
    observation: of one client, with concrete values.

  Raises:
    InputError: it was turned, or see `jaxdia.client.check_fit`.
  """
  check_fit(model, observation)
  if is_traced(observation):
    raise InputError(
      "the observation is traced, as inside of jax.jit or jax.vmap; expected one with values, as"
      " this reckons on the host. Call it outside, or use attack.init and attack.step, which may be"
      " traced."
    )
  if is_turned(model, observation):
    last = find_last_layer(model.network)
    raise InputError(
      f"the gradient by the bias of {last.name if last else ''} is negative for more than"
      f" {observation.batch_size} classes; of a batch of {observation.batch_size} it is so for no"
      " more than that. It has the opposite sign: use its negative, as old weights minus new ones."
    )


@with_transfers
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

  The binary cross-entropy has the sigmoid where the cross-entropy has the softmax, so the same
  holds but for a factor. Label smoothing pulls all shares towards 1 / num_classes, of which the
  counts are freed. A single image under label smoothing, the mean squared error or a function of
  one's own gets the label whose derivative by the logits points where that of the bias does: the
  logits are known, as the inputs of a dense layer with a bias are. Without a bias, the binary
  cross-entropy of a single image has the label whose column points against the others, and label
  smoothing leaves the largest column, unless the network is surer than the smoothed target. All
  else is refused.

  Args:
    model: the network; its `classifier` says where to look.
    observation: of one client.

  Returns:
    i[B], for a batch in ascending order: which image has which label, it does not tell.

  Raises:
    InputError: the observation is none of the model, see `jaxdia.client.check_fit`; the model has
      no known classifier, or the loss tells no labels.
  """
  check_fit(model, observation)
  last = find_last_layer(model.network)
  if last is None:
    raise InputError(
      "labels=recovered reads the gradient of a dense layer that gives the logits; this model"
      " has none. Use labels=free or labels=given."
    )
  layer = last.read(observation.gradient, model.num_classes)
  if "kernel" not in layer:
    raise InputError(
      f"labels=recovered reads the gradient of {last.name}, which the observation"
      " lacks: the layer is frozen. Use labels=free or labels=given."
    )
  loss, single = observation.loss, observation.batch_size == 1
  if loss.kind != "cross_entropy" and discovery.discover(model.network, 2).is_shifted:
    raise InputError(
      f"labels=recovered takes the outputs of {last.name} as logits; what follows"
      f" it (log_softmax, say) makes no difference to the cross-entropy, but to the loss"
      f" {loss.name}. Use labels=free or labels=given."
    )
  if loss.kind not in _SQUASHED and not (single and "bias" in layer):
    raise InputError(
      f"labels=recovered cannot read the labels from the gradient of the loss {loss.name} by"
      f" {last.name}: it tells that of a single image alone, where the layer has"
      " a bias. Use labels=free or labels=given."
    )
  with full_precision():
    return (_recover_label if single else _recover_counts)(model, observation, last, layer)


@functools.partial(jax.jit, static_argnums=2)
def _recover_label(model, observation, last, layer) -> Labels:
  loss = observation.loss
  if "bias" in layer and (loss.kind not in _SQUASHED or loss.label_smoothing):
    label = _label_by_direction(model, observation, last, layer)
  elif "bias" in layer:
    label = jnp.argmin(layer["bias"])
  else:
    sizes = jnp.sum(jnp.square(layer["kernel"]), axis=0)
    label = jnp.argmax(sizes)
    if loss.kind == "binary_cross_entropy":
      # The columns are multiples of one another; that of the label points against the others.
      signs = jnp.sign(layer["kernel"][:, label] @ layer["kernel"])
      label = jnp.argmin(signs * jnp.sign(jnp.sum(signs)))
  return jax.lax.convert_element_type(label, jnp.int32)[None]


def _label_by_direction(model, observation, last, layer) -> jax.Array:
  kernel, delta = layer["kernel"], layer["bias"]
  params = last.read(observation.params, model.num_classes)
  tiny = jnp.finfo(delta.dtype).tiny
  # The gradient of the kernel is the outer product of the layer's inputs and delta.
  inputs = kernel @ delta / jnp.maximum(jnp.sum(delta**2), tiny)
  logits = (inputs @ params["kernel"] + params["bias"])[None]
  classes = jnp.arange(model.num_classes, dtype=jnp.int32)
  slope = jax.grad(lambda logits, label: observation.loss(logits, label[None]))
  slopes = jax.vmap(slope, (None, 0))(logits, classes)[:, 0]
  return jnp.argmax(slopes @ delta / (jnp.linalg.norm(slopes, axis=1) + tiny))


@functools.partial(jax.jit, static_argnums=2)
def _recover_counts(model, observation, last, layer) -> Labels:
  size, loss = observation.batch_size, observation.loss
  shape = (_DUMMIES, *model.image_shape)
  images = draw(jax.random.normal, jax.random.key(0), shape, dtype=jnp.float32)
  images = images.astype(observation.dtype)
  outputs = jnp.mean(_SQUASHED[loss.kind](model.apply(observation.params, None, images)), axis=0)
  if loss.label_smoothing:
    outputs -= loss.label_smoothing / model.num_classes
  # Of a mean the gradient is divided by the number of terms: images, or images and classes.
  terms = 1 if loss.reduction == "mean" else 1 / size
  terms *= 1 if loss.kind == "cross_entropy" or loss.reduction == "sum" else model.num_classes
  if "bias" in layer:
    shares = outputs - layer["bias"] * terms
  else:
    inputs = _mean_inputs(model, observation, last, images)
    slopes = inputs @ layer["kernel"] * (terms / jnp.sum(inputs**2))
    # The inputs of real images may be larger or smaller than those of noise. Of more classes than
    # images one is absent; then its share, 0, gives the scale.
    largest = jnp.max(jnp.where(outputs > 0, slopes / outputs, 0))
    absent = (model.num_classes > size) | (largest > 1)
    shares = outputs - slopes / jnp.where(absent, jnp.maximum(largest, 1e-30), 1.0)
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


def _mean_inputs(model, observation, last, images):
  """Returns the mean inputs of the last layer: what a logit's derivative by its weights is."""

  def difference(params):
    logits = jnp.mean(model.apply(params, None, images), axis=0)
    return logits[0] - logits[1]  # what is added to all of them cancels

  return last.read(jax.grad(difference)(observation.params), model.num_classes)["kernel"][:, 0]
