"""Soteria: the gradient of the classifier without the features that tell most of the images."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdia.client.defences.base import Defence, Step, need_step
from jaxdia.core.errors import InputError, check_number
from jaxdia.core.trees import leaves_by_path, value_tree, with_leaves
from jaxdia.core.types import Array, Gradient, Key


@value_tree
class Soteria(Defence):
  """Prunes the representation before the classifier (Sun et al. 2021, algorithm 1 and eq. 10).

  The features r are what goes into the classifier. Those with the largest |r| / |dr/dx|, as a mean
  over the batch, change the images most if they are taken out, so the rows of the classifier's
  kernel gradient that belong to them are zero. All else is sent as it is. An attacker who knows it
  leaves these rows out of the distance.

  Attributes:
    pruned: share of the features whose rows are zero.

  Raises:
    InputError: it is no number in [0, 1); or, when it is called, the step is missing or the network
      has no dense layer that gives the logits.
  """

  adapts = True
  of_step = True

  pruned: float = 0.5

  def __post_init__(self):
    in_0_1 = (lambda value: 0 <= value < 1), "a number in [0, 1)"
    object.__setattr__(self, "pruned", check_number("pruned of soteria", self.pruned, *in_0_1))

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the gradient without these rows; see `Defence.__call__`."""
    del key
    importance = jax.jit(feature_importance)(need_step("soteria", step))
    place = jnp.argsort(jnp.argsort(-importance, stable=True), stable=True)
    count = jnp.round(jnp.asarray(self.pruned, importance.dtype) * importance.size)
    count = count.astype(place.dtype)
    return _map_kernel(lambda g: jnp.where((place >= count)[:, None], g, 0), gradient, step)

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Leaves out the rows that are zero; see `Defence.adapt`."""
    sent = leaves_by_path(target).get(_path_of_kernel(step))
    if sent is None:
      return gradient
    is_sent = jnp.any(sent != 0, axis=1, keepdims=True)
    return _map_kernel(lambda g: jnp.where(is_sent, g, 0), gradient, step)


def feature_importance(step: Step) -> Float[Array, " features"]:
  """Returns |r| / |dr/dx| of each input r of the classifier, as a mean over the batch.

  Args:
    step: of the client.

  Returns:
    f[features]; a feature that is zero in an image counts as 0 there.
  """
  model, layer = step.model, _path_of_kernel(step)[:-1]
  taps = {layer: (jnp.zeros((len(step.images), model.num_classes), step.images.dtype),)}

  def features(images):
    _, inputs = model.apply_tapped(step.params, step.masks, images, taps)
    return inputs[layer][0]

  found, pull = jax.vjp(features, step.images)

  def slope(feature):
    chosen = jnp.arange(found.shape[1]) == feature
    (derivative,) = pull(jnp.broadcast_to(chosen.astype(found.dtype), found.shape))
    return jnp.sqrt(jnp.sum(derivative**2, axis=(1, 2, 3)))  # of each image

  # One after the other, as all at once would take memory for features times pixels.
  slopes = jax.lax.map(slope, jnp.arange(found.shape[1])).T
  importance = jnp.where(slopes > 0, jnp.abs(found) / jnp.where(slopes > 0, slopes, 1), 0)
  return jnp.mean(importance, axis=0)


def _path_of_kernel(step: Step) -> tuple[str, ...]:
  classifier = step.model.classifier
  if classifier is None:
    raise InputError(
      f"the defence soteria prunes inputs of the dense layer that gives the logits, and"
      f" {step.model.network.name} is not known to have one. Choose another defence, such as top_k."
    )
  return (*classifier, "kernel")


def _map_kernel(function, gradient, step):
  """Returns a gradient whose kernel of the classifier is changed; a frozen one is not there."""
  leaves = leaves_by_path(gradient)
  path = _path_of_kernel(step)
  if path in leaves:
    leaves[path] = function(leaves[path])
  return with_leaves(gradient, leaves)


DEFENCES = {"soteria": Soteria}
