"""Backwards through convolutions, for one image: from the inputs of a layer to those before it.

Let `h = kept ∘ f(z) / (1 - p)` be what follows a convolution `z = K * x + b`, with the function f
of single entries. If h, what was kept of it and the derivative ∂L/∂h are known, then so are z
where h was kept, up to the branch of f, and `δ = ∂L/∂z`. And the gradient of the kernel is linear
in x: each of its entries is one equation, as is each kept entry of z. Mostly these are more
equations than x has entries. Then x is known, and what dropout kept of it, and the step can be
repeated for the convolution before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.closed_form.structure import activate
from jaxdia.core.types import Gradient, Params
from jaxdia.gradients import layer_gradient
from jaxdia.models import Convolution, DenseLayer, DropoutModel

# Least squares by normal equations, of so many unknowns.
MOST_INPUTS = 4096
# The weights of the prior, one after another, and how often each is used at most.
_FEATURE_WEIGHTS = (1e-9,)
_PIXEL_WEIGHTS = (1e-5, 1e-6, 1e-8)
_STEPS = 8
# A step that lowers the objective by less than this share is the last.
_LEAST_GAIN = 0.1
# Where a function is looked for the outputs that gave its values.
_GRID = np.linspace(-10, 10, 401)


class After(NamedTuple):
  """What is known behind a convolution.

  Attributes:
    values: f64[outputs], the inputs of the next layer, zero where dropped.
    kept: f64[outputs].
    cotangent: f64[outputs], derivative of the loss by the values.
  """

  values: jax.Array
  kept: jax.Array
  cotangent: jax.Array


class Before(NamedTuple):
  """What was found in front of a convolution.

  Attributes:
    inputs: f64[inputs].
    residual: f[], how much of the gradient and the values they leave unexplained, relative.
    error: f[], how far the inputs may be off for that residual, relative; infinite if
      there are fewer equations than inputs.
    spread: f64[inputs], standard deviations of the inputs, from the size of the residual;
      None if there are fewer equations than inputs.
    equations: i[], kernel entries and kept values.
  """

  inputs: np.ndarray
  residual: float
  error: float
  spread: np.ndarray | None
  equations: int


def solve(
  model: DropoutModel,
  layer: Convolution,
  after: DenseLayer | Convolution,
  params: Params,
  gradient: Gradient,
  known: After,
  pixels: np.ndarray | None,
) -> Before:
  """Finds the inputs of a convolution, by Gauss-Newton steps.

  The prior is that of smooth images, or of small features. Its weight shrinks, so where
  the equations suffice it does not matter; where not, it fills in what they leave open.

  Args:
    model: the network.
    layer: the convolution.
    after: the next layer.
    params: of the network, f64.
    gradient: of the client, f64.
    known: behind the convolution.
    pixels: i[inputs], which pixel each input is; None if the inputs are no image.

  Returns:
    The inputs.
  """
  problem = (model, layer, after)
  given = (params, layer_gradient(gradient, layer.path), known)
  prior, weights = np.eye(layer.inputs), _FEATURE_WEIGHTS
  if pixels is not None:  # of which some libraries have the channels first
    prior = _smoothness(model.image_shape)[np.ix_(pixels, pixels)]
    weights = _PIXEL_WEIGHTS
  inputs = _start(*problem, *given, prior, weights[0])
  for weight in weights:
    loss = np.inf
    for _ in range(_STEPS):
      inputs, new_loss = _step(*problem, *given, prior, weight, inputs)
      if not new_loss < (1 - _LEAST_GAIN) * loss:
        break
      loss = new_loss
  equations = sum(x.size for x in jax.tree.leaves(given[1])) + int(np.sum(known.kept))
  if equations < layer.inputs:
    residual = np.linalg.norm(_residuals_jitted(*problem, *given, inputs))
    return Before(np.asarray(inputs), float(residual), np.inf, None, equations)
  inputs, _ = _step(*problem, *given, prior, 0.0, inputs)
  residual, spread, error = _precision(*problem, *given, inputs)
  spread = np.asarray(spread) / max(equations - layer.inputs, 1) ** 0.5
  return Before(np.asarray(inputs), float(residual), float(error), spread, equations)


def cotangent_before(
  model: DropoutModel,
  layer: Convolution,
  after: DenseLayer | Convolution,
  params: Params,
  known: After,
  inputs: jax.Array,
) -> jax.Array:
  """Returns the derivative of the loss by the inputs of a convolution, f64[inputs].

  Args:
    model: the network.
    layer: the convolution.
    after: the next layer.
    params: of the network, f64.
    known: behind the convolution.
    inputs: f64[inputs], of it.
  """
  leaves = layer_gradient(params, layer.path)
  outputs, pull = jax.vjp(lambda x: _convolve(layer, leaves, x), jnp.asarray(inputs))
  return pull(_delta(model, layer, after, params, known, outputs)[1])[0]


def _convolve(layer, leaves, inputs):
  return layer.apply(leaves, inputs.reshape(1, *layer.input_shape)).reshape(-1)


def _delta(model, layer, after, params, known, outputs):
  """Returns the values behind outputs, with nothing dropped, and the derivative by the outputs."""
  function = functools.partial(activate, model, params, layer, after)
  values, slopes = jax.jvp(function, (outputs,), (jnp.ones_like(outputs),))
  return values, known.cotangent * known.kept * slopes


def _kernel_equations(layer, params, gradient, inputs, delta):
  """Returns how far the gradient of the parameters is from the client's, relative."""
  leaves = layer_gradient(params, layer.path)
  (found,) = jax.vjp(lambda leaves: _convolve(layer, leaves, inputs), leaves)[1](delta)
  return [(found[name] - g).ravel() / _size(g) for name, g in gradient.items()]


def _size(array):
  return jnp.linalg.norm(array) + 1e-300


def _residuals(model, layer, after, params, gradient, known, inputs):
  outputs = _convolve(layer, layer_gradient(params, layer.path), inputs)
  values, delta = _delta(model, layer, after, params, known, outputs)
  equations = _kernel_equations(layer, params, gradient, inputs, delta)
  equations.append(known.kept * (values - known.values) / _size(known.values))
  return jnp.concatenate(equations)


_residuals_jitted = jax.jit(_residuals, static_argnums=(1, 2))


def _matrix(function, inputs):
  """Returns the value of a function and its Jacobian, transposed."""
  value, along = jax.linearize(function, inputs)
  return value, jax.vmap(along)(jnp.eye(inputs.size))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _start(model, layer, after, params, gradient, known, prior, weight):
  """Returns the inputs that suit the outputs, as far as these can be told by their values.

  Of outputs with the same value the largest is taken first, and only where there is but
  one does it count as an equation.
  """

  function = functools.partial(activate, model, params, layer, after)
  on_grid = jax.vmap(lambda z: function(jnp.full(layer.outputs, z)))(jnp.asarray(_GRID))
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
  sure = jnp.where(jnp.sum(crosses, axis=0) == 1, known.kept, 0)
  _, delta = _delta(model, layer, after, params, known, outputs)

  def equations(inputs):
    found = _kernel_equations(layer, params, gradient, inputs, delta)
    error = _convolve(layer, layer_gradient(params, layer.path), inputs) - outputs
    found.append(sure * error / _size(known.values))
    return jnp.concatenate(found)

  constant, matrix = _matrix(equations, jnp.zeros(layer.inputs))
  square = matrix @ matrix.T + weight * prior
  return -jax.scipy.linalg.solve(square, matrix @ constant, assume_a="pos")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _step(model, layer, after, params, gradient, known, prior, weight, inputs):
  """Returns the inputs after a Gauss-Newton step of the best of a few lengths, and the loss."""
  residuals = functools.partial(_residuals, model, layer, after, params, gradient, known)

  def loss(inputs):
    value = jnp.sum(residuals(inputs) ** 2) + weight * inputs @ prior @ inputs
    return jnp.where(jnp.isfinite(value), value, jnp.inf)

  value, matrix = _matrix(residuals, inputs)
  square = matrix @ matrix.T
  square += weight * prior + 1e-15 * jnp.trace(square) / len(square) * jnp.eye(len(square))
  direction = matrix @ value + weight * prior @ inputs
  move = jax.scipy.linalg.solve(square, direction, assume_a="pos")
  lengths = jnp.asarray([1, 0.5, 0.25, 0.1, 0.03, 0.0])[:, None]
  points = inputs[None] - lengths * jnp.nan_to_num(move)[None]
  losses = jax.lax.map(loss, points)
  return points[jnp.argmin(losses)], jnp.min(losses)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _precision(model, layer, after, params, gradient, known, inputs):
  """Returns the size of the residuals, and what error of the inputs may go with it.

  That is f[inputs], as if all equations but as many as there are inputs had a part in it, and f[],
  the most, relative to the inputs.
  """
  residuals = functools.partial(_residuals, model, layer, after, params, gradient, known)
  value, matrix = _matrix(residuals, inputs)
  square = matrix @ matrix.T
  square += 1e-15 * jnp.trace(square) * jnp.eye(len(square))
  inverse = jax.scipy.linalg.inv(square)
  vector = jax.random.normal(jax.random.key(0), inputs.shape, inputs.dtype)
  for _ in range(8):
    vector = inverse @ vector
    vector /= jnp.linalg.norm(vector)
  residual = jnp.linalg.norm(value)
  spread = residual * jnp.sqrt(jnp.maximum(jnp.diag(inverse), 0))
  return residual, spread, residual / jnp.linalg.norm(vector @ matrix) / jnp.linalg.norm(inputs)


def _smoothness(shape) -> np.ndarray:
  """Returns the matrix Q with `x Q x` the squared differences of neighbours, and a little of x²."""
  height, width, channels = shape

  def along(count):
    steps = np.diff(np.eye(count), axis=0)
    return steps.T @ steps

  rows = np.kron(along(height), np.eye(width * channels))
  columns = np.kron(np.eye(height), np.kron(along(width), np.eye(channels)))
  return rows + columns + 1e-4 * np.eye(height * width * channels)
