"""The modes in which JAX computes: full precision, and its usual rules in the code of others."""

import contextlib
from collections.abc import Iterator

import jax


def full_precision() -> contextlib.AbstractContextManager[None]:
  """Makes matrix products inside exact to their type, as they are on CPU without it.

  On GPU and TPU the default rounds float32 inputs to fewer bits. A gradient
  distance of 1e-5, where the paper's attacks end, cannot be seen then.
  """
  return jax.default_matmul_precision("highest")


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
  """Lets the code of others mix types and ranks inside, whatever a program allows its own.

  Flax's LayerNorm and optax's Adam cannot do without.
  """
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
