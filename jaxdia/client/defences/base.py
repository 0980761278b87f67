"""What a defence is: what a client does to its gradient, and what an attacker makes of it."""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxdia.client.losses import CROSS_ENTROPY, Loss
from jaxdia.core.errors import InputError
from jaxdia.core.trees import static, value_tree
from jaxdia.core.types import Gradient, Images, Key, Labels, Masks, Params, Scalar
from jaxdia.models import DropoutModel


@value_tree
class Step:
  """A training step, of the client or of a dummy batch, for defences that compute on it.

  Attributes:
    model: the network.
    params: its parameters.
    masks: of the step; None for the network without dropout.
    images: f[B, H, W, C], normalised.
    labels: i[B] classes, or f[B, num_classes] probabilities.
    loss: that is descended.
  """

  model: DropoutModel
  params: Params
  masks: Masks | None
  images: Images
  labels: Labels
  loss: Loss = static(default=CROSS_ENTROPY)


class Defence(abc.ABC):
  """What a client does to its gradient before it sends it, which the server knows.

  A defence is a `jaxdia.core.trees.value_tree`: frozen, equal by value, and a pytree whose leaves
  are the numbers that a program takes as they come. So attackers of one defence share a program,
  whatever its settings are.

  Attributes:
    adapts: whether `adapt` is needed for every distance; the dummy gradient is then formed whole.
    of_step: whether it computes on the training step, and so needs the gradient of a single one.
    renews: whether it computes the gradient anew, so that nothing that comes before it has an
      effect.
    redraws: whether it does so with masks that are not those of the step.
  """

  adapts: ClassVar[bool] = False
  of_step: ClassVar[bool] = False
  renews: ClassVar[bool] = False
  redraws: ClassVar[bool] = False

  @abc.abstractmethod
  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns what the client sends.

    Args:
      key: random key, for what is drawn.
      gradient: of the client's batch; None where a layer is frozen.
      step: that the gradient is of, if it is of one.

    Returns:
      A tree of the same shapes.

    Raises:
      InputError: the defence needs a step, and there is none.
    """

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Returns what the defence would make of the gradient of a dummy batch, differentiable by it.

    Args:
      gradient: of the dummy batch; None where a layer is frozen.
      target: what the client sent, a tree of the same shapes.
      step: the dummy batch.
    """
    del target, step
    return gradient

  def clean(self, gradient: Gradient) -> Gradient:
    """Returns what was sent without what later defences hid of this one.

    Args:
      gradient: that was sent.
    """
    return gradient

  def epsilon(self, delta: float = 1e-5, steps: int = 1, sampling: float = 1.0) -> float:
    """Returns ε of the differential privacy of some training steps, for an image more or less.

    Args:
      delta: δ.
      steps: how many.
      sampling: probability of an image to be in the batch of a step.

    Returns:
      ε; infinite if the defence promises none.

    Raises:
      InputError: a number is out of range, or what computes it is not installed.
    """
    del delta, steps, sampling
    return float("inf")

  def noise(self, gradient: Gradient, batch_size: int) -> Scalar | None:
    """Returns how far random draws are expected to have taken the gradient away.

    Args:
      gradient: that was sent.
      batch_size: of the client.

    Returns:
      f[], the mean of the squared norm of what they added; None if nothing is drawn.
    """
    del gradient, batch_size


@value_tree
class Identity(Defence):
  """Sends the gradient as it is."""

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the gradient; see `Defence.__call__`."""
    del key, step
    return gradient


def as_defence(value: Any) -> Defence:
  """Returns a defence, or refuses what is none.

  Args:
    value: that was given.

  Raises:
    InputError: it is none, or no pytree.
  """
  if not isinstance(value, Defence):
    raise InputError(
      f"the defence is {value!r}; expected a jaxdia.client.defences.Defence, such as"
      " defences.create('gaussian_noise', std=0.01), or a class of your own that derives from it."
    )
  if any(leaf is value for leaf in jax.tree.leaves(value)):
    raise InputError(
      f"the defence {type(value).__name__} is no pytree. Decorate its class with"
      " jaxdia.core.trees.value_tree."
    )
  return value


def need_step(name: str, step: Step | None) -> Step:
  """Returns the step that a defence computes on.

  Args:
    name: of the defence.
    step: that it was given.

  Raises:
    InputError: it was given none.
  """
  if step is None:
    raise InputError(
      f"the defence {name} needs the training step that a gradient is of, and was given the"
      " gradient alone. Pass it: defence(key, gradient, defences.Step(model, params, masks, images,"
      " labels)). The update of several local steps has none."
    )
  return step


def global_norm(gradient: Gradient) -> Scalar:
  """Returns the Euclidean norm of all entries together.

  Args:
    gradient: with one leaf at least.
  """
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))


def normal_noise(variance: Any, gradient: Gradient) -> Scalar:
  """Returns the mean of the squared norm of normal noise.

  Args:
    variance: of an entry.
    gradient: that the noise is in. Entries that are zero have none.
  """
  return variance * sum(jnp.sum(leaf != 0, dtype=leaf.dtype) for leaf in jax.tree.leaves(gradient))


identity = Identity()
DEFENCES = {"none": Identity}
