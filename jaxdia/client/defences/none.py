"""No defence."""

from collections.abc import Callable

from jaxdia.core.types import Gradient, Key

# defence(key, gradient) -> what the client sends instead, a tree of the same shapes
Defence = Callable[[Key, Gradient], Gradient]


def identity(key: Key, gradient: Gradient) -> Gradient:
  """Sends the gradient as it is.

  Args:
    key: random key, of which no use is made.
    gradient: of the client's batch.
  """
  del key
  return gradient


DEFENCES = {"none": lambda: identity}
