"""Equations that the gradient of a convolution and its outputs are for its inputs.

With `δ`, the derivative of the loss by the outputs, the gradient of the kernel correlates the
inputs with δ: the same small matrix for every channel of the inputs. So these equations need not be
written out: they and their transpose are products with patches. All in float64, on the host.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Float

from jaxdia.closed_form.geometry import Geometry, find_geometry
from jaxdia.closed_form.structure import activate
from jaxdia.core.types import Array, Gradient, Params
from jaxdia.gradients import layer_gradient
from jaxdia.models import Convolution, DenseLayer, DropoutModel

# Of the diagonal of the normal equations of outputs, its entries are taken to be no less than this
# share of the mean: outputs that were dropped leave inputs of which only the kernel tells.
_LEAST_DIAGONAL = 1e-2
# So many equations of the kernel at once, at least, are multiplied with themselves.
_ROWS = 512
# Where a function is looked for the outputs that gave its values.
_GRID = np.linspace(-10, 10, 401)


class After(NamedTuple):
  """What is known behind a convolution.

  Attributes:
    values: f64[B, outputs], the inputs of the next layer, zero where dropped.
    kept: f64[B, outputs].
    cotangent: f64[B, outputs], derivative of the loss by the values.
  """

  values: Float[Array, "batch outputs"]
  kept: Float[Array, "batch outputs"]
  cotangent: Float[Array, "batch outputs"]


class Equations:
  """Equations near some inputs: how residuals change with the inputs.

  They are the entries of the kernel's gradient, those of the bias's, and the outputs, each with a
  weight.
  """

  def __init__(
    self,
    geometry: Geometry,
    inputs: Float[np.ndarray, "pixels channels"],
    delta: Float[np.ndarray, "positions outputs"],
    curvature: Float[np.ndarray, "positions outputs"],
    weights: Float[np.ndarray, "positions outputs"],
    scales: tuple[float, float],
  ):
    """Prepares the products.

    Args:
      geometry: of the convolution.
      inputs: f64[pixels, channels].
      delta: f64[positions, outputs], derivative of the loss by the outputs.
      curvature: likewise, derivative of delta by the outputs.
      weights: likewise, of the equations of outputs.
      scales: weights of the equations of the kernel and of the bias; 0 if there are none.
    """
    self.geometry = geometry
    self._patches = geometry.patches(inputs)
    self._delta, self._curvature, self._weights = delta, curvature, weights
    self._scales = scales

  def forward(
    self, inputs: Float[np.ndarray, "pixels channels"]
  ) -> Float[np.ndarray, " equations"]:
    """Returns the change of residuals, f64[equations].

    Args:
      inputs: f64[pixels, channels], their change.
    """
    geometry = self.geometry
    patches = geometry.patches(inputs)
    outputs = patches @ geometry.kernel
    delta = self._curvature * outputs
    kernel = self._delta.T @ patches + delta.T @ self._patches
    kernel = kernel.reshape(len(kernel), -1, inputs.shape[-1])
    kernel *= self._scales[0] * geometry.joined[:, None]
    parts = (kernel, delta.sum(0) * self._scales[1], self._weights * outputs)
    return np.concatenate([x.ravel() for x in parts])

  def transpose(
    self, residuals: Float[np.ndarray, " equations"]
  ) -> Float[np.ndarray, "pixels channels"]:
    """Returns f64[pixels, channels], the transpose of `forward`.

    Args:
      residuals: f64[equations].
    """
    geometry, count = self.geometry, self._delta.shape[1]
    size = geometry.kernel.size
    kernel = residuals[:size].reshape(count, -1, geometry.joined.shape[1])
    kernel = (kernel * (self._scales[0] * geometry.joined[:, None])).reshape(count, -1)
    delta = self._patches @ kernel.T + residuals[size : size + count] * self._scales[1]
    outputs = self._weights * residuals[size + count :].reshape(delta.shape)
    return geometry.gather(
      (self._curvature * delta + outputs) @ geometry.kernel.T + self._delta @ kernel
    )

  def normal(self) -> Float[np.ndarray, "inputs inputs"]:
    """Returns the matrix of the normal equations, f64[inputs, inputs], inputs by pixel and channel.

    Only its lower triangle counts; in Fortran's order. That of the outputs is a sum over
    positions of a square as large as a patch; only the rows of the kernel are written out, as many
    at once as are worth a product of matrices.
    """
    geometry, channels = self.geometry, self.geometry.order.shape[1]
    size = geometry.order.size
    columns = geometry.seen[..., None] * channels + np.arange(channels)
    columns = columns.reshape(len(columns), -1)
    found = np.zeros((size, size))
    for seen, weights in zip(columns, self._weights, strict=True):
      inside = np.flatnonzero(seen < size)
      # Where borders reflect, a position sees an input more than once.
      where, at = np.unique(seen[inside], return_inverse=True)
      kernel = np.zeros((len(where), len(weights)))
      np.add.at(kernel, at, geometry.kernel[inside] * weights)
      found[np.ix_(where, where)] += kernel @ kernel.T
    found = found.T  # symmetric so far
    (multiply,) = scipy.linalg.get_blas_funcs(("syrk",), (found,))
    waiting = []
    for output in range(len(geometry.joined)):
      waiting.append(self._rows(output, columns, size))
      if sum(x.shape[1] for x in waiting) >= _ROWS or output == len(geometry.joined) - 1:
        rows = np.concatenate(waiting, axis=1)
        found = multiply(1.0, rows, 1.0, found, lower=True, overwrite_c=True)
        waiting = []
    return found

  def _rows(self, output: int, columns: np.ndarray, size: int) -> np.ndarray:
    """Returns the equations of an output's kernel and bias, f64[inputs, equations]."""
    geometry, channels = self.geometry, self.geometry.order.shape[1]
    positions, places = geometry.seen.shape
    joined = np.flatnonzero(geometry.joined[output])
    curvature = self._curvature[:, output, None]
    patches = self._patches.reshape(positions, places, channels)[..., joined]
    patches = patches.reshape(positions, -1) * curvature * self._scales[0]
    entries = np.broadcast_to(geometry.kernel[:, output], columns.shape)
    starts = np.arange(positions + 1) * columns.shape[1]
    sees = scipy.sparse.csr_array(
      (entries.ravel(), columns.ravel(), starts), shape=(positions, size + channels)
    )
    rows = sees.T @ np.concatenate([patches, curvature * self._scales[1]], axis=1)
    own = np.arange(places * len(joined)).reshape(places, len(joined))
    at = columns.reshape(positions, places, channels)[..., joined]
    np.add.at(rows, (at, own), self._delta[:, output, None, None] * self._scales[0])
    return rows[:size]

  def preconditioner(
    self, weight: float, prior: scipy.sparse.csr_matrix
  ) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the inverse of what is near the normal equations.

    That is the kernel's part at fixed delta, and the diagonal of that of the outputs and the prior,
    the mean of a group of channels.

    Args:
      weight: of the prior.
      prior: [inputs, inputs], by pixel and channel.
    """
    geometry, shape = self.geometry, self.geometry.order.shape
    diagonal = geometry.gather(self._weights**2 @ geometry.kernel.T**2)
    diagonal += weight * prior.diagonal().reshape(shape)
    whole = scipy.sparse.csr_array(geometry.correlate(self._delta) * self._scales[0])
    floor = _LEAST_DIAGONAL * np.mean(diagonal) + 1e-7 * whole.power(2).sum() / shape[0] + 1e-300
    groups = []
    for outputs in np.unique(geometry.joined, axis=1).T > 0:
      channels = np.flatnonzero(geometry.joined[np.argmax(outputs)])
      scale = 1 / np.maximum(np.mean(diagonal[:, channels], axis=1), floor)
      matrix = whole[np.repeat(outputs, geometry.seen.shape[1])]
      # Strides leave zeros in it. Sparse products, as those of BLAS in threads wait for each other.
      direct = matrix.shape[0] >= shape[0]
      if direct:
        inverse = _inverse((matrix.T @ matrix).toarray() + np.diag(1 / scale))
      else:
        inner = (matrix.multiply(scale[None]) @ matrix.T).toarray()
        inverse = _inverse(np.eye(len(inner)) + inner)
      groups.append((channels, direct, scale[:, None], matrix, inverse, matrix.T.tocsr()))

    def apply(vector):
      found = np.empty_like(vector)
      for channels, direct, scale, matrix, inverse, transposed in groups:
        if direct:
          found[:, channels] = inverse @ vector[:, channels]
          continue
        scaled = vector[:, channels] * scale
        found[:, channels] = scaled - scale * (transposed @ (inverse @ (matrix @ scaled)))
      return found

    return apply


def _inverse(square: np.ndarray) -> scipy.sparse.csr_array:
  """Returns the inverse of a positive matrix, of which zeros between blocks stay zeros."""
  factor = scipy.linalg.cholesky(square, lower=True, check_finite=False)
  (invert,) = scipy.linalg.get_lapack_funcs(("potri",), (factor,))
  triangle = np.tril(invert(factor, lower=1)[0])
  return scipy.sparse.csr_array(triangle + np.tril(triangle, -1).T)


class Problem(NamedTuple):
  """What is known of the inputs of a convolution, by pixel (of all images) and channel.

  Attributes:
    geometry: of the convolution.
    kernel: f64[outputs, places, channels], gradient of the kernel, relative.
    bias: f64[outputs], likewise.
    scales: what these were multiplied with; 0 if there is none.
    values: f64[positions, outputs], behind the convolution.
    kept: likewise.
    cotangent: likewise.
    size: of the values.
    function: from outputs to values, slopes and curvatures.
    start: outputs that give the values, and 1 where there is but one.
  """

  geometry: Geometry
  kernel: Float[np.ndarray, "outputs places channels"]
  bias: Float[np.ndarray, " outputs"]
  scales: tuple[float, float]
  values: Float[np.ndarray, "positions outputs"]
  kept: Float[np.ndarray, "positions outputs"]
  cotangent: Float[np.ndarray, "positions outputs"]
  size: float
  function: Callable[[np.ndarray], list[np.ndarray]]
  start: tuple[np.ndarray, np.ndarray]

  def along(
    self, inputs: Float[np.ndarray, "pixels channels"]
  ) -> list[Float[np.ndarray, "positions outputs"]]:
    """Returns values, slopes and curvatures behind inputs f64[pixels, channels]."""
    return self.function(self.geometry.patches(inputs) @ self.geometry.kernel + self.geometry.bias)

  def residuals(
    self, inputs: Float[np.ndarray, "pixels channels"]
  ) -> Float[np.ndarray, " equations"]:
    """Returns f64[equations], relative."""
    values, slopes, _ = self.along(inputs)
    delta = self.cotangent * self.kept * slopes
    return self.stacked(inputs, delta, self.kept * (values - self.values) / self.size)

  def stacked(
    self,
    inputs: Float[np.ndarray, "pixels channels"],
    delta: Float[np.ndarray, "positions outputs"],
    outputs: Float[np.ndarray, "positions outputs"],
  ) -> Float[np.ndarray, " equations"]:
    """Returns the residuals of the kernel and of the bias before those of the outputs."""
    kernel = (delta.T @ self.geometry.patches(inputs)).reshape(self.kernel.shape)
    kernel = (kernel * self.scales[0] - self.kernel) * self.geometry.joined[:, None]
    bias = delta.sum(0) * self.scales[1] - self.bias
    return np.concatenate([kernel.ravel(), bias, outputs.ravel()])

  def equations(self, inputs: Float[np.ndarray, "pixels channels"]) -> Equations:
    """Returns how the residuals change near inputs."""
    _, slopes, curvatures = self.along(inputs)
    delta, curvature = (self.cotangent * self.kept * x for x in (slopes, curvatures))
    weights = self.kept * slopes / self.size
    return Equations(self.geometry, inputs, delta, curvature, weights, self.scales)


def find_problem(
  model: DropoutModel,
  layer: Convolution,
  after: DenseLayer | Convolution,
  params: Params,
  gradient: Gradient,
  known: After,
) -> Problem:
  """Puts together what is known of the inputs of a convolution.

  Args:
    model: the network.
    layer: the convolution.
    after: the next layer.
    params: of the network, f64.
    gradient: of the client, f64.
    known: behind the convolution.
  """
  count = len(known.values)
  geometry = find_geometry(layer, layer_gradient(params, layer.path), count)
  gradients = layer_gradient(gradient, layer.path)
  outputs, channels = geometry.joined.shape
  kernel = np.zeros((outputs, geometry.seen.shape[1], channels))
  bias = np.zeros(outputs)
  scales = [0.0, 0.0]
  if "kernel" in gradients:
    scales[0] = 1 / _size(gradients["kernel"])
    grouped = gradients["kernel"].reshape(kernel.shape[1], -1, outputs).transpose(2, 0, 1)
    kernel = np.tile(grouped, channels // grouped.shape[2]) * scales[0] * geometry.joined[:, None]
  if "bias" in gradients:
    scales[1] = 1 / _size(gradients["bias"])
    bias = gradients["bias"].ravel() * scales[1]
  order = geometry.positions

  def function(outputs):
    flat = np.empty(order.size)
    flat[order] = outputs
    found = _slopes(model, layer, after, params, flat.reshape(count, -1))
    return [np.nan_to_num(np.asarray(x)).ravel()[order] for x in found]

  values, kept, cotangent = (np.asarray(x).ravel()[order] for x in known)
  start = _outputs(model, layer, after, params, known)
  begin = tuple(np.asarray(x).ravel()[order] for x in start)
  known_parts = (values, kept, cotangent, _size(values), function, begin)
  return Problem(geometry, kernel, bias, (scales[0], scales[1]), *known_parts)


def _size(array) -> float:
  return float(np.linalg.norm(array)) + 1e-300


@functools.partial(jax.jit, static_argnums=(1, 2))
def _slopes(model, layer, after, params, outputs):
  """Returns the values behind outputs, with nothing dropped, and two derivatives."""
  function = jax.vmap(functools.partial(activate, model, params, layer, after))

  def slope(outputs):
    return jax.jvp(function, (outputs,), (jnp.ones_like(outputs),))[::-1]

  slopes, curvatures, values = jax.jvp(slope, (outputs,), (jnp.ones_like(outputs),), has_aux=True)
  return values, slopes, curvatures


@functools.partial(jax.jit, static_argnums=(1, 2))
def _outputs(model, layer, after, params, known):
  """Returns the largest outputs that give the values, and 1 where there are no others."""

  function = jax.vmap(functools.partial(activate, model, params, layer, after))
  on_grid = function(jnp.full((len(_GRID), layer.outputs), jnp.asarray(_GRID)[:, None]))[:, None]
  crosses = (on_grid[1:] > known.values[None]) != (on_grid[:-1] > known.values[None])
  last = len(crosses) - 1 - jnp.argmax(crosses[::-1], axis=0)
  nearest = jnp.argmin(jnp.abs(on_grid - known.values[None]), axis=0)
  any_cross = jnp.any(crosses, axis=0)
  grid = jnp.asarray(_GRID)
  low = jnp.where(any_cross, grid[last], grid[nearest])
  high = jnp.where(any_cross, grid[last + 1], grid[nearest])
  above = function(high) > known.values

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    upper = (function(middle) > known.values) == above
    return jnp.where(upper, low, middle), jnp.where(upper, middle, high)

  outputs = jax.lax.fori_loop(0, 50, halve, (low, high))[0]
  return outputs, jnp.where(jnp.sum(crosses, axis=0) == 1, known.kept, 0)
