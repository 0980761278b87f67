"""Gaussian noise on the gradient."""

import jax
import jax.numpy as jnp

from jaxdia.client.defences.base import Defence, Step, global_norm, normal_noise
from jaxdia.core.errors import InputError, check_number
from jaxdia.core.random import draw
from jaxdia.core.trees import static, value_tree
from jaxdia.core.types import Gradient, Key, Scalar


@value_tree
class GaussianNoise(Defence):
  """Adds independent normal noise to every entry of a gradient.

  An attacker who knows it ends a search where the distance is that of the noise, instead of going
  on until the noise is fitted.

  Attributes:
    std: standard deviation of the noise, in units of the gradient, or of its rms entry.
    relative: whether it is in units of the rms entry, the root of the mean of all squares.

  Raises:
    InputError: std is no finite number of at least 0, or relative is not True or False.
  """

  std: float = 1e-3
  relative: bool = static(default=False)

  def __post_init__(self):
    at_least_0 = (lambda value: value >= 0), "a finite number of at least 0"
    object.__setattr__(self, "std", check_number("std of the noise", self.std, *at_least_0))
    if not isinstance(self.relative, bool):
      raise InputError(f"relative of the noise is {self.relative!r}; expected True or False.")

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the noised gradient; see `Defence.__call__`."""
    del step
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    std = self.std * _rms(gradient) if self.relative else self.std
    noised = [
      leaf + jnp.asarray(std, leaf.dtype) * draw(jax.random.normal, k, leaf.shape, dtype=leaf.dtype)
      for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, noised)

  def noise(self, gradient: Gradient, batch_size: int) -> Scalar | None:
    """Returns the squared norm of the noise; see `Defence.noise`."""
    del batch_size
    variance = self.std**2
    if self.relative:  # what was sent has the variance of both
      variance = variance / (1 + variance) * _rms(gradient) ** 2
    return normal_noise(variance, gradient)


def _rms(gradient: Gradient) -> Scalar:
  count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
  return global_norm(gradient) / count**0.5


DEFENCES = {"gaussian_noise": GaussianNoise}
