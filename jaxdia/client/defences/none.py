"""No defence."""

import dataclasses
from collections.abc import Callable

from jaxdia.core.types import Gradient, Key

# defence(key, gradient) -> what the client sends instead, a tree of the same shapes
Defence = Callable[[Key, Gradient], Gradient]


@dataclasses.dataclass(frozen=True)
class Identity:
  """Sends the gradient as it is."""

  def __call__(self, key: Key, gradient: Gradient) -> Gradient:
    """Returns the gradient.

    Args:
      key: random key, of which no use is made.
      gradient: of the client's batch.
    """
    del key
    return gradient


identity = Identity()
DEFENCES = {"none": Identity}
