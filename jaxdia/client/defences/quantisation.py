"""Gradients that are sent with few bits."""

import jax
import jax.numpy as jnp

from jaxdia.client.defences.base import Defence, Step
from jaxdia.core.errors import InputError, unknown
from jaxdia.core.random import draw
from jaxdia.core.trees import static, value_tree
from jaxdia.core.types import Gradient, Key, Scalar

# Types of 16 bits.
HALVES = ("float16", "bfloat16")


@value_tree
class Quantisation(Defence):
  """Rounds the entries of a gradient to integers, at random up or down (Alistarh et al. 2017).

  Each leaf has a scale of its own: its largest absolute value becomes the largest integer, 127 of 8
  bits and 32,767 of 16. An entry between two integers becomes the nearer one with the greater
  probability, so that its mean is the entry. So an attacker who knows it has nothing to change in a
  dummy gradient, and takes the rounding for noise.

  Attributes:
    bits: of an entry, 8 or 16.

  Raises:
    InputError: it is neither.
  """

  bits: int = static(default=8)

  def __post_init__(self):
    if isinstance(self.bits, bool) or self.bits not in (8, 16):
      raise InputError(f"bits of the quantisation is {self.bits!r}; expected 8 or 16.")

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the gradient of rounded entries, in its own type; see `Defence.__call__`."""
    del step
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))

    def quantise(key, leaf):
      unit = self._unit(leaf)
      drawn = draw(jax.random.uniform, key, leaf.shape, dtype=leaf.dtype)
      rounded = jnp.floor(leaf / jnp.where(unit > 0, unit, 1) + drawn)
      return jnp.clip(rounded, -self._most, self._most) * unit  # the sum may have been rounded up

    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(tree, [quantise(key, leaf) for key, leaf in pairs])

  def noise(self, gradient: Gradient, batch_size: int) -> Scalar | None:
    """Returns the squared norm of what was rounded away; see `Defence.noise`."""
    del batch_size
    # Between two integers, a unit apart, the variance is f (1 - f), which has the mean 1/6.
    leaves = jax.tree.leaves(gradient)
    return sum(
      (jnp.sum(leaf != 0, dtype=leaf.dtype) * self._unit(leaf) ** 2 / 6 for leaf in leaves),
      jnp.zeros((), leaves[0].dtype),
    )

  @property
  def _most(self) -> int:
    return 2 ** (self.bits - 1) - 1

  def _unit(self, leaf: jax.Array) -> Scalar:
    return jnp.max(jnp.abs(leaf)) / self._most


@value_tree
class Rounding(Defence):
  """Rounds the entries of a gradient to a type of 16 bits, to the nearest.

  An attacker who knows it changes nothing: the mean of what is rounded away is close to zero, and
  its size is far below the tolerance of a search.

  Attributes:
    dtype: "float16" or "bfloat16".

  Raises:
    InputError: it is neither.
  """

  dtype: str = static(default="bfloat16")

  def __post_init__(self):
    if self.dtype not in HALVES:
      raise unknown("dtype of the rounding:", self.dtype, HALVES)

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the gradient of rounded entries, in its own type; see `Defence.__call__`."""
    del key, step
    return jax.tree.map(lambda g: g.astype(self.dtype).astype(g.dtype), gradient)


DEFENCES = {"quantisation": Quantisation, "rounding": Rounding}
