"""What a network is made of, as far as attacks need to know it."""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path
from jaxdia.core.types import Array, Number
from jaxdia.models.convolutions import PlainConvolution

Shape = tuple[int, ...]


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
  """A layer `z = a @ kernel (+ bias)` whose inputs and outputs can be tapped.

  A convolution is one too: `a` are then its patches.

  Attributes:
    path: where its parameters are; `kernel` f[inputs, outputs], and `bias` if it has one. The
      kernel may have several axes in place of one of these, as in Flax's attention.
    rows: rows of `a` in each call of the layer: images times positions.
    inputs: columns of `a`.
    outputs: columns of `z`.
    shapes: of what each call returns.
    convolution: that it is, with the height and width of its kernel; None if it is none.
  """

  path: Path
  rows: tuple[int, ...]
  inputs: int
  outputs: int
  shapes: tuple[tuple[int, ...], ...]
  convolution: tuple[PlainConvolution, tuple[int, int]] | None = None

  def input_rows(self, inputs: Float[Array, "..."]) -> Float[Array, "rows inputs"]:
    """Returns `a` of a call.

    Args:
      inputs: that the layer was called with.
    """
    if self.convolution is not None:
      convolution, size = self.convolution
      inputs = convolution.patches(inputs, size)
    return inputs.reshape(-1, self.inputs)

  def output_rows(self, outputs: Float[Array, "..."]) -> Float[Array, "rows outputs"]:
    """Returns `z` of a call, or the derivatives by it.

    Args:
      outputs: of one of `shapes`.
    """
    if self.convolution is not None:
      return self.convolution[0].positions(outputs)
    return outputs.reshape(-1, self.outputs)

  def of_rows(self, rows: Float[Array, "rows outputs"], shape: Shape) -> Float[Array, "..."]:
    """Returns what a call returns, from its rows.

    Args:
      rows: as `output_rows` gives them.
      shape: of the outputs of the call.
    """
    if self.convolution is not None:
      return self.convolution[0].of_positions(rows, shape)
    return rows.reshape(shape)


class Convolution(NamedTuple):
  """A convolution as a linear map of a whole image; tapped as a dense layer with a row an image.

  Attributes:
    path: where its parameters are; `kernel`, and `bias` if it has one.
    input_shape: (height, width, channels); of a library that has the channels first, (channels,
      height, width).
    output_shape: likewise.
    apply: the layer by itself.
  """

  path: Path
  input_shape: tuple[int, int, int]
  output_shape: tuple[int, int, int]
  apply: PlainConvolution

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
Taps = dict[Path, tuple[Float[Array, "..."], ...]]


def drop(
  inputs: Float[Array, "*shape"], mask: Float[Array, "..."], rate: Number
) -> Float[Array, "*shape"]:
  """Applies one dropout mask: the only place that scales by 1 / (1 - rate).

  Args:
    inputs: f[...], the activations.
    mask: f[...], of the same rank, and 1 or equal to `inputs` along each axis; 1 = kept, 0 =
      dropped, and what an attack tries lies between.
    rate: the probability of an entry to be dropped.

  Returns:
    f[...]: with the expected mask, 1 - rate, exactly the inputs.
  """
  # The division comes first so that the expected mask gives a factor of exactly 1.
  return inputs * (mask / jnp.asarray(1 - rate, mask.dtype))


def check_masks(name: str, masks: object, sites: Collection[str]) -> None:
  """Refuses masks that are not a mapping with one for each site.

  Args:
    name: of the network, for the message.
    masks: that it is called with; None is the evaluation mode.
    sites: their names.

  Raises:
    InputError: they are not that; the message says which sites there are.
  """
  if masks is None:
    return
  mend = "Take them from sample_masks or expected_masks."
  if not isinstance(masks, Mapping):
    raise InputError(
      f"masks is {type(masks).__name__}; expected a dict of the mask of each site,"
      f" {sorted(sites)}. {mend}"
    )
  if set(masks) != set(sites):
    raise InputError(f"masks have the sites {sorted(masks)}; {name} has {sorted(sites)}. {mend}")
  for site, mask in masks.items():
    if mask is None:
      raise InputError(
        f"the mask of site {site!r} is None; expected an array. {mend} Without any mask pass None"
        " in place of the dict, which is the evaluation mode."
      )
