"""Pruning of the entries of a gradient that are small."""

import jax
import jax.numpy as jnp

from jaxdia.client.defences.base import Defence, Step, global_norm
from jaxdia.core.errors import check_number
from jaxdia.core.trees import value_tree
from jaxdia.core.types import Gradient, Key, Scalar

# Entries that are so many bounds large are clipped before they are raised to a power.
_FAR = 1e3


def _sent(gradient: Gradient, target: Gradient) -> Gradient:
  """Returns of a dummy gradient what was sent of the client's, and what is too large to be pruned.

  What was pruned was no larger than the smallest entry that was sent. So of its entries only what
  exceeds that is left, which is nothing of the true gradient.

  Args:
    gradient: of the dummy batch.
    target: that was sent, with zeros for what was pruned.
  """
  least = [jnp.min(jnp.where(t != 0, jnp.abs(t), jnp.inf)) for t in jax.tree.leaves(target)]
  kept = jax.tree.map(lambda g, t: jnp.where(t != 0, g, 0), gradient, target)
  # In units of the dummy gradient, as what was sent may have been scaled since.
  scale = jax.lax.stop_gradient(global_norm(kept)) / global_norm(target)
  bound = jnp.min(jnp.stack(least)) * scale
  return jax.tree.map(
    lambda g, t: jnp.where(t != 0, g, g - jnp.clip(g, -bound, bound)), gradient, target
  )


def _sizes(gradient: Gradient) -> jax.Array:
  """Returns the absolute values of all entries, in ascending order."""
  return jnp.sort(jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(gradient)]))


@value_tree
class TopK(Defence):
  """Keeps the entries of a gradient that are largest, and sends zeros for the others.

  It is the sparsification of Aji and Heafield (2017), and the pruning by which Zhu et al. (2019)
  hold against their attack. An attacker who knows it asks of what was pruned only that it is no
  larger than what was sent.

  Attributes:
    share: of all entries of the gradient together, how much is kept. Of those that are as large as
      the smallest one that is, all are.

  Raises:
    InputError: it is no number above 0 and at most 1.
  """

  adapts = True

  share: float = 0.1

  def __post_init__(self):
    in_0_1 = (lambda value: 0 < value <= 1), "a number above 0, at most 1"
    object.__setattr__(self, "share", check_number("share of top_k", self.share, *in_0_1))

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the pruned gradient; see `Defence.__call__`."""
    del key, step
    sizes = _sizes(gradient)
    kept = jnp.round(jnp.asarray(self.share, sizes.dtype) * sizes.size).astype(jnp.int32)
    least = sizes[sizes.size - jnp.maximum(kept, 1)]
    return jax.tree.map(lambda g: jnp.where(jnp.abs(g) >= least, g, 0), gradient)

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Lets pruned entries be small; see `Defence.adapt`."""
    del step
    return _sent(gradient, target)

  def clean(self, gradient: Gradient) -> Gradient:
    """Prunes once more, as noise may have filled the zeros; see `Defence.clean`."""
    return self(jax.random.key(0), gradient)


@value_tree
class Percentile(Defence):
  """Sends zeros for small entries of a gradient, and clips large ones, as NVFlare does.

  It is its filter PercentilePrivacy with the same defaults, after Shokri and Shmatikov (2015).
  There, `gamma` is in units of the difference between weights; of a gradient it is that number
  divided by the learning rate. An attacker who knows it asks of what was pruned only that it is no
  larger than what was sent, and clips the dummy gradient too, smoothly: g / (1 + (g / gamma)⁴)^¼.
  With the clipping itself, or its derivative taken as that of the identity, some searches end at
  inverted images.

  Attributes:
    percentile: of the absolute values of all entries together; those below are pruned. Leaves that
      are a single number are left as they are.
    gamma: the greatest absolute value that is sent, in units of the gradient.

  Raises:
    InputError: percentile is no number from 0 to 100, or gamma none above 0.
  """

  adapts = True

  percentile: float = 10.0
  gamma: float = 0.01

  def __post_init__(self):
    for name, is_valid, expected in (
      ("percentile", lambda value: 0 <= value <= 100, "a number from 0 to 100"),
      ("gamma", lambda value: value > 0, "a finite number above 0"),
    ):
      value = check_number(
        f"{name} of the defence percentile", getattr(self, name), is_valid, expected
      )
      object.__setattr__(self, name, value)

  def __call__(self, key: Key, gradient: Gradient, step: Step | None = None) -> Gradient:
    """Returns the pruned and clipped gradient; see `Defence.__call__`."""
    del key, step
    return jax.tree.map(lambda g: self._clip(g) if g.ndim else g, self.clean(gradient))

  def adapt(self, gradient: Gradient, target: Gradient, step: Step) -> Gradient:
    """Lets pruned entries be small, and clips the others; see `Defence.adapt`."""
    del step

    def clip(g):  # smoothly; its derivative is 0 where nothing of g is left to see
      ratio = jnp.clip(g / jnp.asarray(self.gamma, g.dtype), -_FAR, _FAR)
      return self.gamma * ratio / jnp.sqrt(jnp.sqrt(1 + ratio**4)) if g.ndim else g

    return jax.tree.map(clip, _sent(gradient, target))

  def clean(self, gradient: Gradient) -> Gradient:
    """Prunes, once more if noise may have filled the zeros; see `Defence.clean`."""
    least = self._least(gradient)
    return jax.tree.map(lambda g: jnp.where(jnp.abs(g) >= least, g, 0) if g.ndim else g, gradient)

  def _least(self, gradient: Gradient) -> Scalar:
    sizes = _sizes(gradient)
    return jnp.percentile(sizes, jnp.asarray(self.percentile, sizes.dtype))

  def _clip(self, leaf: jax.Array) -> jax.Array:
    gamma = jnp.asarray(self.gamma, leaf.dtype)
    return jnp.clip(leaf, -gamma, gamma)


DEFENCES = {"top_k": TopK, "percentile": Percentile}
