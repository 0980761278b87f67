"""Gaussian noise on the gradient."""

import dataclasses

import jax

from jaxdia.core.errors import check_number
from jaxdia.core.types import Gradient, Key


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
  """Adds independent normal noise to every entry of a gradient.

  Attributes:
    std: standard deviation of the noise, in units of the gradient.

  Raises:
    InputError: it is no finite number of at least 0.
  """

  std: float = 1e-3

  def __post_init__(self):
    at_least_0 = (lambda value: value >= 0), "a finite number of at least 0"
    object.__setattr__(self, "std", check_number("std of the noise", self.std, *at_least_0))

  def __call__(self, key: Key, gradient: Gradient) -> Gradient:
    """Returns the noised gradient.

    Args:
      key: random key, from which the noise is drawn.
      gradient: of the client's batch.
    """
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    noised = [
      leaf + self.std * jax.random.normal(k, leaf.shape, leaf.dtype)
      for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, noised)


DEFENCES = {"gaussian_noise": GaussianNoise}
