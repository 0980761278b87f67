"""Keeps batched LAPACK calls of one program in a row.

Such a call takes a thread of the pool and waits there for other threads to do its parts. On a CPU
with two cores, two calls that run side by side take both, and wait for ever (jaxlib 0.10.2). The
runtime runs side by side what does not depend on each other, so here they do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdia.core.types import Array

# So many elements are computed at once.
_AT_ONCE = 64


def after(values: Float[Array, "*shape"], first: Float[Array, "..."]) -> Float[Array, "*shape"]:
  """Returns values, which nothing that uses them gets before something else is there.

  Args:
    values: f[...].
    first: f[...], what is waited for.

  Returns:
    `values`; a unit of rounding larger if `first` has a NaN, as they must depend on it.
  """
  larger = values * (1 + jnp.finfo(values.dtype).eps)
  return jnp.where(jnp.any(jnp.isnan(first)), larger, values)


def batched_map(function: Callable[[Any], Any], xs: Any) -> Any:
  """Applies a function along the leading axis, some elements at a time.

  The last batch is filled up: `jax.lax.map` would compute a shorter one beside the others.

  Args:
    function: of one element.
    xs: pytree of arrays [n, ...], n > 0.

  Returns:
    Pytree of arrays [n, ...].
  """
  number = len(jax.tree.leaves(xs)[0])
  at_once = min(number, _AT_ONCE)

  def fill(x):
    return jnp.pad(x, [(0, -number % at_once)] + [(0, 0)] * (x.ndim - 1), mode="edge")

  found = jax.lax.map(function, jax.tree.map(fill, xs), batch_size=at_once)
  return jax.tree.map(lambda y: y[:number], found)
