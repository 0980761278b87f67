"""Where the inputs of a convolution go: sums over the pixels that each position sees."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float, Integer

from jaxdia.core.types import Params
from jaxdia.models import Convolution


class Geometry(NamedTuple):
  """A convolution as sums over the pixels that each position of the outputs sees.

  The images of a batch are beside each other: their pixels are as many more pixels, their positions
  as many more positions.

  Attributes:
    order: i[pixels, channels], where each input is among the flattened ones of the batch.
    positions: i[positions, outputs], likewise of the outputs.
    seen: i[positions, places], the pixel at each place of the kernel; beyond the last for none.
    scatter: [pixels + 1, positions * places] of 0 and 1, sparse: adds up what was seen.
    kernel: f64[places * channels, outputs], of zeros between groups.
    bias: f64[outputs].
    joined: f64[outputs, channels], 1 in the same group, otherwise 0.
  """

  order: Integer[np.ndarray, "pixels channels"]
  positions: Integer[np.ndarray, "positions outputs"]
  seen: Integer[np.ndarray, "positions places"]
  scatter: scipy.sparse.csr_matrix
  kernel: Float[np.ndarray, "weights outputs"]
  bias: Float[np.ndarray, " outputs"]
  joined: Float[np.ndarray, "outputs channels"]

  def patches(
    self, inputs: Float[np.ndarray, "pixels channels"]
  ) -> Float[np.ndarray, "positions weights"]:
    """Returns f64[positions, places * channels] of inputs f64[pixels, channels]."""
    border = np.zeros((1, inputs.shape[1]))
    return np.concatenate([inputs, border])[self.seen].reshape(len(self.seen), -1)

  def gather(
    self, patches: Float[np.ndarray, "positions weights"]
  ) -> Float[np.ndarray, "pixels channels"]:
    """Returns f64[pixels, channels], the transpose of `patches`."""
    return (self.scatter @ patches.reshape(-1, self.order.shape[1]))[:-1]

  def correlate(self, delta: Float[np.ndarray, "positions outputs"]) -> scipy.sparse.csr_array:
    """Returns the matrix of the kernel's gradient of one channel, [outputs * places, pixels].

    Args:
      delta: f64[positions, outputs].
    """
    outputs, places = delta.shape[1], self.seen.shape[1]
    rows = np.arange(outputs)[:, None] * places + np.tile(np.arange(places), len(delta))
    columns = np.broadcast_to(self.seen.ravel(), rows.shape)
    values = np.repeat(delta.T, places, axis=1)
    shape = (outputs * places, len(self.order) + 1)
    entries = (values.ravel(), (rows.ravel(), columns.ravel()))
    return scipy.sparse.csr_array(scipy.sparse.coo_array(entries, shape=shape))[:, :-1]


def find_geometry(layer: Convolution, leaves: Params, count: int) -> Geometry:
  """Returns where the inputs of a convolution go.

  Args:
    layer: the convolution.
    leaves: "kernel" f[h, w, inputs / groups, outputs], and "bias" if there is one.
    count: images of the batch.
  """
  convolution = layer.apply
  kernel = np.asarray(leaves["kernel"], np.float64)
  height, width, channels, outputs = kernel.shape
  places, groups = height * width, convolution.groups
  order = _channels_last(layer.input_shape, convolution.layout)
  sizes = {"N": 1, **dict(zip(convolution.layout[1:], layer.input_shape, strict=True)), "C": 1}
  image = [sizes[axis] for axis in convolution.layout]
  numbers = jnp.arange(1.0, len(order) + 1).reshape(image)  # 0 is what lies outside
  seen = np.asarray(convolution.patches(numbers, (height, width))).astype(int).reshape(-1, places)
  pixels = count * len(order)
  seen = [np.where(seen == 0, pixels, seen - 1 + i * len(order)) for i in range(count)]
  seen = np.concatenate(seen)
  of_output = np.arange(outputs) // (outputs // groups)
  joined = (of_output[:, None] == np.arange(channels * groups) // channels).astype(float)
  whole = np.tile(kernel.reshape(places, channels, outputs), (1, groups, 1)) * joined.T
  entries = (np.ones(seen.size), (seen.ravel(), np.arange(seen.size)))
  return Geometry(
    _beside(order, count),
    _beside(_channels_last(layer.output_shape, convolution.layout), count),
    seen,
    scipy.sparse.csr_matrix(entries, shape=(pixels + 1, seen.size)),
    whole.reshape(-1, outputs),
    np.asarray(leaves["bias"], np.float64).ravel() if "bias" in leaves else np.zeros(outputs),
    joined,
  )


def _beside(order: np.ndarray, count: int) -> np.ndarray:
  """Returns where the entries of images are that are flattened one after another."""
  return np.concatenate([order + i * order.size for i in range(count)])


def _channels_last(shape: tuple[int, ...], layout: str) -> np.ndarray:
  """Returns i[pixels, channels], where each entry of a flattened image is."""
  numbers = np.arange(math.prod(shape)).reshape(shape)
  axes = [layout.index(axis) - 1 for axis in "HWC"]
  return numbers.transpose(axes).reshape(-1, shape[axes[-1]])
