"""What a network is made of, as far as attacks need to know it."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdia.core.trees import Path
from jaxdia.core.types import Array, Number, Params


class Site(NamedTuple):
  """One place in a network where dropout acts.

  Attributes:
    name: where it is, such as "block_0/hidden_dropout"; its key in the masks.
    rate: the probability of an entry to be dropped, in [0, 1); f[] inside a program that
      serves several rates.
  """

  name: str
  rate: Number


class DenseLayer(NamedTuple):
  """A dense layer `z = a @ kernel (+ bias)` whose inputs and outputs can be tapped.

  Attributes:
    path: where its parameters are; `kernel` f[inputs, outputs], and `bias` if it has one. The
      kernel may have several axes in place of one of these, as in Flax's attention.
    rows: rows of `a` in each call of the layer: images times positions.
    inputs: columns of `a`.
    outputs: columns of `z`.
  """

  path: Path
  rows: tuple[int, ...]
  inputs: int
  outputs: int


class Convolution(NamedTuple):
  """A convolution as a linear map of a whole image; tapped as a dense layer with a row an image.

  Attributes:
    path: where its parameters are; `kernel`, and `bias` if it has one.
    input_shape: (height, width, channels); of a library that has the channels first, (channels,
      height, width).
    output_shape: likewise.
    apply: `apply(leaves, inputs f[B, *input_shape]) -> f[B, *output_shape]`, the layer by itself.
  """

  path: Path
  input_shape: tuple[int, int, int]
  output_shape: tuple[int, int, int]
  apply: Callable[[Params, jax.Array], jax.Array]

  @property
  def rows(self) -> tuple[int, ...]:
    """Rows for one image in its only call."""
    return (1,)

  @property
  def inputs(self) -> int:
    """Columns of its inputs, which are flattened."""
    return math.prod(self.input_shape)

  @property
  def outputs(self) -> int:
    """Columns of its outputs, which are flattened."""
    return math.prod(self.output_shape)


@dataclasses.dataclass(frozen=True)
class PlainConvolution:
  """A convolution by itself, as a function of its leaves and inputs: `Convolution.apply`.

  Attributes:
    strides: along height and width.
    padding: of height and width, or "SAME" or "VALID".
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

  def __call__(self, leaves: Params, inputs: jax.Array) -> jax.Array:
    """Computes the outputs of images in the layout."""
    outputs = jax.lax.conv_general_dilated(
      inputs,
      leaves["kernel"],
      self.strides,
      self.padding,
      self.input_dilation,
      self.kernel_dilation,
      (self.layout, "HWIO", self.layout),
      self.groups,
    )
    if "bias" in leaves:
      others = [axis for axis, name in enumerate(self.layout) if name != "C"]
      outputs += jnp.expand_dims(leaves["bias"].reshape(-1), others)
    return outputs


class Entry(NamedTuple):
  """Where an array lies among the params that a network's own library knows by a name.

  Attributes:
    path: of the leaf, which has the layout of Flax: kernels f[..., inputs, outputs].
    axes: `leaf = array.transpose(axes)`; None if the layouts are the same.
  """

  path: Path
  axes: tuple[int, ...] | None = None


def shape_before(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
  """Returns the shape of the array that `transpose(axes)` gives this shape.

  Args:
    shape: of a leaf.
    axes: of its `Entry`.
  """
  return shape if axes is None else tuple(shape[axes.index(i)] for i in range(len(axes)))


# {path of a layer: one array for each of its calls}
Taps = dict[Path, tuple[Float[Array, "_ _"], ...]]
