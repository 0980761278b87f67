"""Clipping of the gradient's norm."""

import jax
import optax

from jaxdia.client.defences.base import Defence, Step
from jaxdia.core.errors import check_number
from jaxdia.core.precision import usual_promotion
from jaxdia.core.trees import value_tree
from jaxdia.core.types import Gradient, Key


@value_tree
class Clipping(Defence):
  """Scales a gradient down to a norm, if it has a greater one (Pascanu et al. 2013).

  The cosine between gradients does not see it. For other distances, which take gradients that are
  formed, an attacker who knows it clips the dummy gradient too.

  Attributes:
    max_norm: of all entries together, in units of the gradient.

  Raises:
    InputError: it is no finite number above 0.
  """

  max_norm: float = 1.0

  def __post_init__(self):
    above_0 = (lambda value: value > 0), "a finite number above 0"
    value = check_number("max_norm of the clipping", self.max_norm, *above_0)
    object.__setattr__(self, "max_norm", value)

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the clipped gradient; see `Defence.__call__`."""
    del key, step
    with usual_promotion():
      clipping = optax.clip_by_global_norm(self.max_norm)
      return clipping.update(gradient, clipping.init(gradient))[0]

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Clips the gradient of a dummy batch; see `Defence.adapt`."""
    del target, step
    return self(jax.random.key(0), gradient)


DEFENCES = {"clipping": Clipping}
