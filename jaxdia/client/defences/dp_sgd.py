"""DP-SGD: the gradient of each example is clipped, and noise is added to their sum."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdia.client.defences.base import Defence, Step, need_step, normal_noise
from jaxdia.core.errors import InputError, check_count, check_number
from jaxdia.core.precision import full_precision, usual_promotion
from jaxdia.core.trees import leaves_by_path, value_tree, with_leaves
from jaxdia.core.types import Gradient, Key, Scalar
from jaxdia.models import batch_axes


@value_tree
class DPSGD(Defence):
  """Clips the gradient of each image and adds normal noise to their mean (Abadi et al. 2016).

  What is computed is optax's `differentially_private_aggregate`. The gradients of the images are
  those under the masks that each had in the step. An attacker who knows it clips the gradient of
  each dummy image, and ends a search where the distance is that of the noise. It computes the
  gradient anew, so it is the first of a chain.

  Attributes:
    max_norm: of the gradient of an image, in units of the gradient.
    noise_multiplier: standard deviation of the noise on the sum, in units of `max_norm`.

  Raises:
    InputError: max_norm is no number above 0, or noise_multiplier none of at least 0; or, when it
      is called, the step is missing, or the network has no gradients of single images.
  """

  adapts = True
  of_step = True
  renews = True

  max_norm: float = 1.0
  noise_multiplier: float = 1.0

  def __post_init__(self):
    for name, is_valid, expected in (
      ("max_norm", lambda value: value > 0, "a finite number above 0"),
      ("noise_multiplier", lambda value: value >= 0, "a finite number of at least 0"),
    ):
      value = check_number(f"{name} of dp_sgd", getattr(self, name), is_valid, expected)
      object.__setattr__(self, name, value)

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the noised mean of clipped gradients; see `Defence.__call__`."""
    return _aggregate(key, self, gradient, need_step("dp_sgd", step))

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Returns the mean of clipped gradients of the dummy images; see `Defence.adapt`."""
    del target
    leaves, tree = jax.tree.flatten(example_gradients(gradient, step))
    with usual_promotion():
      total: Any = optax.per_example_global_norm_clip(leaves, self.max_norm)[0]
    return jax.tree.unflatten(tree, [leaf / len(step.images) for leaf in total])

  def noise(self, gradient: Gradient, batch_size: int) -> Scalar | None:
    """Returns the squared norm of the noise; see `Defence.noise`."""
    return normal_noise((self.max_norm * self.noise_multiplier / batch_size) ** 2, gradient)

  def epsilon(self, delta: float = 1e-5, steps: int = 1, sampling: float = 1.0) -> float:
    """Returns ε by the package dp-accounting, from the privacy loss; see `Defence.epsilon`."""
    delta = check_number("delta", delta, lambda value: 0 < value < 1, "a number in (0, 1)")
    steps = check_count("steps", steps, 1)
    in_0_1 = (lambda value: 0 < value <= 1), "a probability above 0"
    sampling = check_number("sampling", sampling, *in_0_1)
    try:
      import dp_accounting  # pyright: ignore[reportMissingImports]
      from dp_accounting.pld import PLDAccountant  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise InputError(
        f"ε needs the package dp-accounting, which cannot be imported ({error}):"
        ' pip install "jaxdia[privacy]".'
      ) from error
    if self.noise_multiplier == 0:
      return float("inf")
    event = dp_accounting.GaussianDpEvent(self.noise_multiplier)
    if sampling < 1:
      event = dp_accounting.PoissonSampledDpEvent(sampling, event)
    event = dp_accounting.SelfComposedDpEvent(event, steps)
    return float(PLDAccountant().compose(event).get_epsilon(delta))


@jax.jit
def _aggregate(key: Key, defence: DPSGD, gradient: Gradient, step: Step) -> Gradient:
  with full_precision(), usual_promotion():
    aggregate = optax.contrib.differentially_private_aggregate(
      defence.max_norm, defence.noise_multiplier, 0
    )
    state = optax.contrib.DifferentiallyPrivateAggregateState(key)  # in place of the 0
    return aggregate.update(example_gradients(gradient, step), state)[0]


def example_gradients(like: Gradient, step: Step) -> Gradient:
  """Returns the gradient of the loss of each image, under its own masks.

  Args:
    like: a gradient of the batch, with the leaves that are wanted.
    step: with the batch.

  Returns:
    A tree like `like`, whose leaves have a leading axis of images.

  Raises:
    InputError: a mask has more than an entry for each image along its axis of the batch.
  """
  model, size, axes = step.model, len(step.images), batch_axes(step.model)
  for site, mask in (step.masks or {}).items():
    axis = axes[site]
    if axis is not None and mask.shape[axis] != size:
      raise InputError(
        f"the mask of the site {site!r} has the shape {mask.shape}; expected {size},"
        f" the number of images, along axis {axis}. Such a network has no gradients of single"
        " images. Choose another defence."
      )

  def loss(params, masks, image, label):
    if masks is not None:
      masks = {site: _with_batch_axis(mask, axes[site]) for site, mask in masks.items()}
    return step.loss(model.apply(params, masks, image[None]), label[None])

  over = (None, None if step.masks is None else axes, 0, 0)
  gradients: Any = jax.vmap(jax.grad(loss), over)(step.params, step.masks, step.images, step.labels)
  found = leaves_by_path(gradients)
  return with_leaves(like, {path: found[path] for path in leaves_by_path(like)})


def _with_batch_axis(mask: jax.Array, axis: int | None) -> jax.Array:
  return mask if axis is None else jnp.expand_dims(mask, axis)


DEFENCES = {"dp_sgd": DPSGD}
