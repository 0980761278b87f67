"""How far two gradients are from each other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdia.core.types import Scalar


class Comparison(NamedTuple):
  """What a dummy gradient g and a target T have to do with each other; each f[].

  Attributes:
    inner: <g, T>.
    squared_norm: |g|².
    target_squared_norm: |T|².
    squared_distance: |c g - T|², of the multiple c g that is the nearest to T.
  """

  inner: Scalar
  squared_norm: Scalar
  target_squared_norm: Scalar
  squared_distance: Scalar


def cosine_distance(comparison: Comparison) -> Scalar:
  """Returns 1 - cosine of the angle between two gradients (Geiping et al. 2020).

  Args:
    comparison: of the gradients, each taken as one vector.

  Returns:
    f[], in [0, 2].
  """
  norms = jnp.sqrt(comparison.squared_norm) * jnp.sqrt(comparison.target_squared_norm)
  # The authors add 1e-8. Of small gradients, as trained weights have, that would be no small part,
  # and a perfect match far from 0: so no more than a millionth, a tenth of the usual tolerance.
  distance = 1 - comparison.inner / (norms + jnp.minimum(1e-8, 1e-6 * norms))
  # Rounding may end below 0, where there is no distance; its derivative is not touched.
  return distance + jax.lax.stop_gradient(jnp.maximum(distance, 0) - distance)


def squared_l2_distance(comparison: Comparison) -> Scalar:
  """Returns the squared Euclidean distance of two gradients (Zhu et al. 2019) but for a factor.

  Summed losses, clipping and learning rates multiply a client's gradient by a number that nobody
  has to know: it is the one that fits best, and the distance is the share of the target that it
  leaves. Of a gradient as it is that number is 1 at the solution, so this changes the way there.
  Where it is negative the distance goes on beyond 1, so that a search finds its way back.

  Args:
    comparison: of the gradients, each taken as one vector.

  Returns:
    f[], in [0, 2].
  """
  norm = comparison.target_squared_norm
  left = comparison.squared_distance / jnp.where(norm > 0, norm, 1)
  return jnp.where(comparison.inner < 0, 2 - left, left)


DISTANCES = {"cosine": cosine_distance, "squared_l2": squared_l2_distance}


def noise_distance(distance: str, noise: Scalar, squared_norm: Scalar) -> Scalar:
  """Returns the distance of the true gradient from one that was sent with noise.

  Args:
    distance: a key of `DISTANCES`.
    noise: f[], the squared norm of the noise.
    squared_norm: f[], of what was sent, noise and all.

  Returns:
    f[]; 0 where as much as all that was sent may be noise, as its distance then tells nothing.
  """
  value = noise / squared_norm
  if distance == "cosine":  # noise is orthogonal to the gradient, but for chance
    value = 1 - jnp.sqrt(jnp.maximum(1 - value, 0))
  return jnp.where(noise < squared_norm, value, 0)


def suits(distance: str, method: str) -> str:
  """Returns the method by which a distance can be computed to float tolerance.

  c² |g|² - 2 c <g, T> + |T|² is a small difference of large numbers near the solution,
  so the squared distance is taken of formed gradients; the cosine needs no such
  difference.

  Args:
    distance: a key of `DISTANCES`.
    method: that is wanted.
  """
  return "formed" if distance == "squared_l2" and method == "auto" else method
