"""Random numbers of any shape, at the price of a vector's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Shaped

from jaxdia.core.types import Array, Key


def draw(
  sampler: Callable[..., jax.Array], key: Key, shape: Sequence[int], **settings: Any
) -> Shaped[Array, "..."]:
  """Draws an array: the numbers that the sampler draws of this shape, but compiled sooner.

  On a CPU XLA takes ten times as long to compile a sampler of four axes (docs/decisions.md).

  Args:
    sampler: of `jax.random`, as `jax.random.normal`.
    key: random key.
    shape: of the array.
    **settings: of the sampler.
  """
  return sampler(key, shape=(math.prod(shape),), **settings).reshape(tuple(shape))
