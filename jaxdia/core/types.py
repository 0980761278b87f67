"""The names that the rest of the package uses for arrays and trees of arrays."""

from typing import Any, NamedTuple

import jax

Key = jax.Array  # a typed key, from `jax.random.key`
Images = jax.Array  # f[B, H, W, C], normalised
Labels = jax.Array  # i[B] classes, or f[B, num_classes] probabilities
Logits = jax.Array  # f[B, num_classes]
Params = Any  # a pytree of arrays
Gradient = Any  # a pytree like Params
Masks = dict[str, jax.Array]  # one array for each dropout site, 1 = kept


class Statistics(NamedTuple):
  """What normalises the images of a data set: `(pixel - mean) / std` by channel.

  Attributes:
    mean: one float a channel, for pixels in [0, 1].
    std: one float a channel.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
