"""Layers of the built-in networks, with their initialisation."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from jaxdia.core.errors import InputError
from jaxdia.core.random import draw
from jaxdia.core.types import Array

ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
  "leaky_relu": nn.leaky_relu,
}


# PyTorch's default for linear and convolutional layers, which the paper's models are drawn
# with: uniform in +-1/sqrt(fan_in), kernel and bias. The numbers are those of Flax's
# variance_scaling(1/3, "fan_in", "uniform"), but drawn as a vector; see `draw`.
def _kernel_init(key, shape, dtype=jnp.float32):
  bound = jnp.sqrt(jnp.asarray(1 / math.prod(shape[:-1]), dtype))
  return draw(jax.random.uniform, key, shape, dtype=dtype, minval=-1) * bound


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return draw(jax.random.uniform, key, shape, dtype=dtype, minval=-bound, maxval=bound)

  return init


def dense(
  x: Float[Array, "*rows inputs"], features: int, name: str, use_bias: bool = True
) -> Float[Array, "*rows {features}"]:
  """Calls a new dense layer of a compact module, drawn as PyTorch draws it.

  Args:
    x: f[..., inputs].
    features: number of outputs.
    name: of the layer.
    use_bias: whether it has a bias.

  Returns:
    f[..., features].
  """
  layer = nn.Dense(
    features, use_bias, kernel_init=_kernel_init, bias_init=_bias_init(x.shape[-1]), name=name
  )
  return layer(x)


def convolution(
  x: Float[Array, "batch height width channels"],
  features: int,
  size: int,
  stride: int,
  name: str,
  use_bias: bool = True,
) -> Float[Array, "batch _ _ {features}"]:
  """Calls a new square convolution of a compact module, drawn as PyTorch draws it.

  Args:
    x: f[B, H, W, C].
    features: number of output channels.
    size: side of the kernel, in pixels; half of it pads the image.
    stride: in both directions.
    name: of the layer.
    use_bias: whether it has a bias.

  Returns:
    f[B, H / stride, W / stride, features].
  """
  layer = nn.Conv(
    features,
    (size, size),
    stride,
    padding=size // 2,
    use_bias=use_bias,
    kernel_init=_kernel_init,
    bias_init=_bias_init(size * size * x.shape[-1]),
    name=name,
  )
  return layer(x)


def group_norm(
  x: Float[Array, "batch height width channels"], groups: int, name: str
) -> Float[Array, "batch height width channels"]:
  """Calls a new group normalisation of a compact module, as PyTorch computes it.

  Args:
    x: f[B, H, W, C].
    groups: that share a mean and a variance.
    name: of the layer.
  """
  return nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, name=name)(x)


def check_groups(width: int, groups: int) -> None:
  """Refuses a width that the groups of a normalisation do not divide.

  Args:
    width: channels.
    groups: of them.

  Raises:
    InputError: they do not.
  """
  if width % groups:
    raise InputError(
      f"width is {width}; expected a multiple of the {groups} groups of the normalisation. Set"
      " width or groups."
    )
