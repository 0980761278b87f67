"""How far a dummy gradient is from the gradient that the client sent."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdia.typing import Gradient


def _dot(a: Gradient, b: Gradient) -> jax.Array:
  products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
  return jax.tree.reduce(jnp.add, products)


def cosine_distance(gradient: Gradient, target: Gradient) -> jax.Array:
  """Returns 1 - cosine of the angle between two gradients (Geiping et al. 2020).

  Args:
    gradient: a tree of arrays, taken as one vector.
    target: a tree like `gradient`.

  Returns:
    f[], in [0, 2].
  """
  norms = jnp.sqrt(_dot(gradient, gradient)) * jnp.sqrt(_dot(target, target))
  return 1 - _dot(gradient, target) / (norms + 1e-8)


def squared_l2_distance(gradient: Gradient, target: Gradient) -> jax.Array:
  """Returns the squared Euclidean distance of two gradients (Zhu et al. 2019).

  Args:
    gradient: a tree of arrays, taken as one vector.
    target: a tree like `gradient`.

  Returns:
    f[], at least 0.
  """
  difference = jax.tree.map(jnp.subtract, gradient, target)
  return _dot(difference, difference)


DISTANCES: dict[str, Callable[[Gradient, Gradient], jax.Array]] = {
  "cosine": cosine_distance,
  "squared_l2": squared_l2_distance,
}
