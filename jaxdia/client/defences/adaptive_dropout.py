"""Dropout as a defence: masks that are drawn anew, at a rate that nobody is told."""

import jax
import jax.numpy as jnp

from jaxdia.client.defences.base import Defence, Step, need_step
from jaxdia.core.errors import InputError, check_count, check_number
from jaxdia.core.trees import leaves_by_path, static, value_tree, with_leaves
from jaxdia.core.types import Gradient, Key
from jaxdia.models import DropoutModel, sample_masks


@value_tree
class AdaptiveDropout(Defence):
  """Draws the dropout rate of a step, and the mean over several draws of masks is sent.

  Scheliga et al. (2023) suggest that a dropout that adapts might protect where dropout does not.
  Each draw has a rate of its own, of all sites. The masks of the step have no part in it, so
  it is the first of a chain, and evaluation does not know the masks. Attacks do nothing about
  it: they assume the rates of their model, and one mask for each image.

  Attributes:
    lowest: rate that is drawn.
    highest: rate that is drawn.
    draws: of masks, whose gradients are averaged.

  Raises:
    InputError: rates are not in order in [0, 1), or draws is no count; or, when it is called, the
      step is missing.
  """

  of_step = True
  renews = True
  redraws = True

  lowest: float = 0.25
  highest: float = 0.75
  draws: int = static(default=1)

  def __post_init__(self):
    for name in ("lowest", "highest"):
      in_0_1 = (lambda value: 0 <= value < 1), "a number in [0, 1)"
      rate = check_number(f"{name} of adaptive_dropout", getattr(self, name), *in_0_1)
      object.__setattr__(self, name, rate)
    if self.lowest > self.highest:
      raise InputError(
        f"lowest and highest of adaptive_dropout are {self.lowest} and {self.highest}; expected a"
        " lowest rate that is not above the highest."
      )
    draws = check_count("draws of adaptive_dropout", self.draws, 1)
    object.__setattr__(self, "draws", draws)

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the mean gradient over the draws; see `Defence.__call__`."""
    found = leaves_by_path(_mean_gradient(key, self, need_step("adaptive_dropout", step)))
    return with_leaves(gradient, {path: found[path] for path in leaves_by_path(gradient)})


@jax.jit
def _mean_gradient(key: Key, defence: AdaptiveDropout, step: Step) -> Gradient:
  def loss(params, key):
    of_rate, of_masks = jax.random.split(key)
    limits = {"minval": defence.lowest, "maxval": defence.highest}
    rate = jax.random.uniform(of_rate, (), step.images.dtype, **limits)
    model = DropoutModel(step.model.network, dict.fromkeys(step.model.rates, rate))
    masks = sample_masks(of_masks, model, len(step.images), step.images.dtype)
    return step.loss(model.apply(params, masks, step.images), step.labels)

  def mean_loss(params):
    keys = jax.random.split(key, defence.draws)
    return jnp.mean(jax.lax.map(lambda one: loss(params, one), keys))

  return jax.grad(mean_loss)(step.params)


DEFENCES = {"adaptive_dropout": AdaptiveDropout}
