"""Several defences, one after the other."""

import jax
import jax.numpy as jnp

from jaxdia.client.defences.base import Defence, Step, as_defence
from jaxdia.client.defences.clipping import Clipping
from jaxdia.core.errors import InputError
from jaxdia.core.trees import value_tree
from jaxdia.core.types import Gradient, Key, Scalar


@value_tree
class Chain(Defence):
  """Defences one after the other, each on what the one before gives.

  Attributes:
    defences: in the order in which the client applies them.

  Raises:
    InputError: there is none, or one that computes the gradient anew is not the first.
  """

  defences: tuple[Defence, ...]

  def __post_init__(self):
    defences = tuple(as_defence(one) for one in self.defences)
    object.__setattr__(self, "defences", defences)
    if not defences:
      raise InputError("a chain of no defences; expected one at least, or defences.identity.")
    for one in defences[1:]:
      if one.renews:
        raise InputError(
          f"{type(one).__name__} computes the gradient anew, so that what comes before it in a"
          " chain has no effect. Make it the first."
        )

  @property
  def renews(self) -> bool:
    """Whether the first one does; see `Defence`."""
    return self.defences[0].renews

  @property
  def redraws(self) -> bool:
    """Whether the first one does; see `Defence`."""
    return self.defences[0].redraws

  @property
  def adapts(self) -> bool:
    """Whether one of them needs it; see `Defence`."""
    return any(one.adapts for one in self.defences)

  @property
  def of_step(self) -> bool:
    """Whether one of them does; see `Defence`."""
    return any(one.of_step for one in self.defences)

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns what the last one gives; see `Defence.__call__`."""
    for k, one in zip(jax.random.split(key, len(self.defences)), self.defences, strict=True):
      gradient = one(k, gradient, step)
    return gradient

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Lets each adapt the gradient of a dummy batch, in order; see `Defence.adapt`."""
    for one in self.defences:
      gradient = one.adapt(gradient, target, step)
    return gradient

  def clean(self, gradient: Gradient) -> Gradient:
    """Lets each clean what was sent, the last one first; see `Defence.clean`."""
    for one in reversed(self.defences):
      gradient = one.clean(gradient)
    return gradient

  def epsilon(self, delta: float = 1e-5, steps: int = 1, sampling: float = 1.0) -> float:
    """Returns ε of the first one, which what comes after does not change; see `Defence.epsilon`."""
    return self.defences[0].epsilon(delta, steps, sampling)

  def noise(self, gradient: Gradient, batch_size: int) -> Scalar | None:
    """Returns the sum of their noise; see `Defence.noise`.

    Of what was drawn before a norm was clipped it is not known how much is left: it is not counted.
    """
    found = []
    for one in reversed(self.defences):
      if isinstance(one, Clipping):
        break
      found.append(one.noise(gradient, batch_size))
    found = [noise for noise in found if noise is not None]
    return jnp.sum(jnp.stack(found)) if found else None
