"""Gaussian noise on the gradient."""

import dataclasses

import jax

from jaxdia.client.defences.none import Defence
from jaxdia.core.errors import check_number
from jaxdia.core.types import Gradient, Key


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
  """Adds independent normal noise to every entry of a gradient.

  Attributes:
    std: standard deviation of the noise, in units of the gradient.
  """

  std: float

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


def gaussian_noise(std: float = 1e-3) -> Defence:
  """Returns the defence that adds Gaussian noise.

  Args:
    std: standard deviation, in units of the gradient.

  Raises:
    InputError: it is no finite number of at least 0.
  """
  at_least_0 = (lambda value: value >= 0), "a finite number of at least 0"
  return GaussianNoise(check_number("std of the noise", std, *at_least_0))


DEFENCES = {"gaussian_noise": gaussian_noise}
