"""Convolutions of images, natively or as one product of patches with the kernel.

Under reverse differentiation twice, and with many lanes, XLA's convolutions are slow on a CPU: the
derivative by the kernel of several lanes at once is a convolution in groups, and such are computed
in a plain loop. As a product everything stays a product, whatever it is differentiated by, and the
convolution is a dense layer whose inputs are patches, with a row for each image and position.
"""

import dataclasses
import functools
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxdia.core.types import Array, Params

# How convolutions are computed; "auto" is by what is faster.
Convolve = Literal["auto", "native", "product"]
CONVOLVE = typing.get_args(Convolve)

# Paddings of Flax that are no zeros, and NumPy's names for them.
_WRAPPING = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


@dataclasses.dataclass(frozen=True)
class PlainConvolution:
  """A convolution of images by itself, as a function of its leaves and inputs.

  Attributes:
    strides: along height and width.
    padding: of height and width, or "SAME", "VALID", "CIRCULAR" or "REFLECT".
    input_dilation: along height and width.
    kernel_dilation: along height and width.
    groups: of channels.
    layout: of images, such as "NHWC"; kernels are HWIO.
  """

  strides: tuple[int, int]
  padding: str | tuple[tuple[int, int], ...]
  input_dilation: tuple[int, int] = (1, 1)
  kernel_dilation: tuple[int, int] = (1, 1)
  groups: int = 1
  layout: str = "NHWC"

  def __call__(self, leaves: Params, inputs: Float[Array, "b _ _ _"]) -> Float[Array, "b _ _ _"]:
    """Computes the outputs of images in the layout, natively.

    Args:
      leaves: "kernel" f[h, w, inputs / groups, outputs], and "bias" if there is one.
      inputs: in the layout.
    """
    kernel = leaves["kernel"]
    padding = self.padding
    if padding in _WRAPPING:
      inputs, padding = self._last(self._wrap(self._first(inputs), kernel.shape[:2])), "VALID"
    outputs = lax.conv_general_dilated(
      inputs,
      kernel,
      self.strides,
      padding,
      self.input_dilation,
      self.kernel_dilation,
      (self.layout, "HWIO", self.layout),
      self.groups,
    )
    return self._add_bias(leaves, outputs)

  # Outside of a program it is one of its own, not an operation after another.
  @functools.partial(jax.jit, static_argnums=0, inline=True)
  def product(self, leaves: Params, inputs: Float[Array, "b _ _ _"]) -> Float[Array, "b _ _ _"]:
    """Computes what a call does, as a product of patches with the kernel.

    Args:
      leaves: as of a call.
      inputs: as of a call.
    """
    kernel = leaves["kernel"]
    height, width, channels, outputs = kernel.shape
    patches = self.patches(inputs, (height, width))
    if self.groups == 1:
      found = patches @ kernel.reshape(-1, outputs)
    else:
      places, groups = height * width, self.groups
      patches = patches.reshape(*patches.shape[:3], places, groups, channels)
      kernel = kernel.reshape(places, channels, groups, outputs // groups)
      found = jnp.einsum("bhwpgc,pcgo->bhwgo", patches, kernel)
      found = found.reshape(*found.shape[:3], outputs)
    return self._add_bias(leaves, self._last(found))

  def patches(
    self, inputs: Float[Array, "b _ _ _"], size: tuple[int, int]
  ) -> Float[Array, "b h w _"]:
    """Returns what the kernel is multiplied with at each position of the outputs.

    Args:
      inputs: in the layout.
      size: height and width of the kernel.

    Returns:
      f[B, H', W', height * width * channels], in the order of the axes of the kernel.
    """
    x, padding = self._first(inputs), self.padding
    if padding in _WRAPPING:
      x, padding = self._wrap(x, size), "VALID"
    reach = _reach(size, self.kernel_dilation)
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(x.shape[1:3], reach, self.strides, padding)
    borders = [
      (*pads, dilation - 1) for pads, dilation in zip(padding, self.input_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
    # First along the width, then along the height: so fewer slices are put together.
    for axis in (2, 1):
      stride, step = self.strides[axis - 1], self.kernel_dilation[axis - 1]
      last = (x.shape[axis] - reach[axis - 1]) // stride * stride
      shifted = [
        lax.slice_in_dim(x, start, start + last + 1, stride, axis)
        for start in range(0, reach[axis - 1], step)
      ]
      x = jnp.concatenate(shifted, axis=3) if len(shifted) > 1 else shifted[0]
    return x

  def positions(self, outputs: Float[Array, "b _ _ _"]) -> Float[Array, "_ channels"]:
    """Returns outputs with a row for each image and position, in the order of `patches`.

    Args:
      outputs: in the layout.
    """
    outputs = self._first(outputs)
    return outputs.reshape(-1, outputs.shape[-1])

  def of_positions(
    self, rows: Float[Array, "_ channels"], shape: tuple[int, ...]
  ) -> Float[Array, "b _ _ _"]:
    """Returns outputs in the layout, from a row for each image and position.

    Args:
      rows: as `positions` gives them.
      shape: of the outputs.
    """
    return self._last(rows.reshape([shape[self.layout.index(axis)] for axis in "NHWC"]))

  def _first(self, images: jax.Array) -> jax.Array:
    """Turns images of the layout to NHWC."""
    return images.transpose([self.layout.index(axis) for axis in "NHWC"])

  def _last(self, images: jax.Array) -> jax.Array:
    """Turns images from NHWC to the layout."""
    return images.transpose(["NHWC".index(axis) for axis in self.layout])

  def _wrap(self, images: jax.Array, size: tuple[int, int]) -> jax.Array:
    borders = [((n - 1) // 2, n // 2) for n in _reach(size, self.kernel_dilation)]
    return jnp.pad(images, [(0, 0), *borders, (0, 0)], mode=_WRAPPING[self.padding])

  def _add_bias(self, leaves: Params, outputs: jax.Array) -> jax.Array:
    if "bias" not in leaves:
      return outputs
    others = [axis for axis, name in enumerate(self.layout) if name != "C"]
    return outputs + jnp.expand_dims(leaves["bias"].reshape(-1), others)


def _reach(size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
  """Returns the height and width that a kernel covers."""
  return (size[0] - 1) * dilation[0] + 1, (size[1] - 1) * dilation[1] + 1


def is_faster_as_product(convolution: PlainConvolution, platform: str) -> bool:
  """Returns whether an attack is faster with a convolution as a product.

  Args:
    convolution: the layer.
    platform: JAX's name of it.
  """
  return platform == "cpu" and convolution.groups == 1
