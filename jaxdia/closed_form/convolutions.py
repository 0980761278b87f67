"""Backwards through convolutions: from the inputs of a layer to those before it.

Let `h = kept ∘ f(z) / (1 - p)` be what follows a convolution `z = K * x + b`, with the function f
of single entries. If h, what was kept of it and the derivative ∂L/∂h are known, then so are z
where h was kept, up to the branch of f, and `δ = ∂L/∂z`. And the gradient of the kernel is linear
in x: each of its entries is one equation, as is each kept entry of z. Mostly these are more
equations than x has entries. Then x is known, and what dropout kept of it, and the step can be
repeated for the convolution before. The images of a batch share the gradient of the kernel, and
are solved for together.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Float, Integer

from jaxdia.closed_form.kernel_equations import After, Equations, Problem, find_problem
from jaxdia.closed_form.structure import activate
from jaxdia.core.types import Array, Gradient, Params
from jaxdia.gradients import layer_gradient
from jaxdia.models import Convolution, DenseLayer, DropoutModel

# Of so many inputs at most the normal equations are written out in the end (2 GiB), and inverted.
_MOST_WRITTEN = 16384
_MOST_INVERTED = 4096
# The weights of the prior, one after another, and how often each is used at most.
_FEATURE_WEIGHTS = (1e-9,)
_PIXEL_WEIGHTS = (1e-5, 1e-6, 1e-8)
_STEPS = 8
# A step that lowers the objective by less than this share is the last.
_LEAST_GAIN = 0.1
# The inverse is renewed while this lowers what is left to less than this share, and that is no less
# than what rounding of gradients in float32 leaves.
_LEAST_RENEWAL = 0.5
_ROUNDING = 3e-7
_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
# How exactly steps are solved for while there are more of them, and in the end; in how many
# iterations.
_TOLERANCE = 1e-4
_LAST_TOLERANCE = 1e-9
_ITERATIONS = 1000
_LAST_ITERATIONS = 4000
# Where what is left has grown by this much over its least, rounding has the upper hand.
_ROUNDED = 1e6
# Draws of the errors of many inputs.
_DRAWS = 8


class Before(NamedTuple):
  """What was found in front of a convolution.

  Attributes:
    inputs: f64[B, inputs].
    residual: f[], how much of the gradient and the values they leave unexplained, relative.
    error: f[], how far the inputs may be off for that residual, relative; infinite if
      there are fewer equations than inputs.
    spread: f64[B, inputs], standard deviations of the inputs, from the size of the residual;
      None if there are fewer equations than inputs.
    equations: i[], kernel entries and kept values.
  """

  inputs: Float[np.ndarray, "batch inputs"]
  residual: float
  error: float
  spread: Float[np.ndarray, "batch inputs"] | None
  equations: int


def solve(
  model: DropoutModel,
  layer: Convolution,
  after: DenseLayer | Convolution,
  params: Params,
  gradient: Gradient,
  known: After,
  pixels: Integer[np.ndarray, " inputs"] | None,
) -> Before:
  """Finds the inputs of a convolution, by Gauss-Newton steps.

  The prior is that of smooth images, or of small features. Its weight shrinks, so where
  the equations suffice it does not matter; where not, it fills in what they leave open of images.
  Features that they leave open are not solved for.

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
  count = len(known.values)
  shape, size = (count, layer.inputs), count * layer.inputs
  gradients = layer_gradient(gradient, layer.path)
  equations = sum(x.size for x in gradients.values()) + int(np.sum(known.kept))
  if equations < size and pixels is None:
    return Before(np.zeros(shape), np.inf, np.inf, None, equations)
  problem = find_problem(model, layer, after, params, gradient, known)
  if pixels is None:
    prior, weights = scipy.sparse.eye_array(size, format="csr"), _FEATURE_WEIGHTS
  else:  # of which some libraries have the channels first
    order = problem.geometry.order[: model.image_shape[0] * model.image_shape[1]]
    pixels = pixels[order.ravel()]
    one, weights = _smoothness(model.image_shape)[pixels][:, pixels], _PIXEL_WEIGHTS
    prior = scipy.sparse.block_diag([one] * count, format="csr")
  inputs = _start(problem, prior, weights[0])
  for weight in weights:
    inputs = _descend(problem, prior, weight, inputs, None)
  flat, spreads = np.empty((2, size))
  flat[problem.geometry.order] = inputs
  if equations < size:
    residual = float(np.linalg.norm(problem.residuals(inputs)))
    return Before(flat.reshape(shape), residual, np.inf, None, equations)
  inputs, inverse = _newton(problem, prior, inputs)
  residual, spread, error = _precision(problem, inputs, inverse)
  flat[problem.geometry.order] = inputs
  spreads[problem.geometry.order] = spread / max(equations - size, 1) ** 0.5
  return Before(flat.reshape(shape), residual, error, spreads.reshape(shape), equations)


@functools.partial(jax.jit, static_argnums=(1, 2))
def cotangent_before(
  model: DropoutModel,
  layer: Convolution,
  after: DenseLayer | Convolution,
  params: Params,
  known: After,
  inputs: Float[Array, "batch inputs"],
) -> Float[Array, "batch inputs"]:
  """Returns the derivative of the loss by the inputs of a convolution, f64[B, inputs].

  Args:
    model: the network.
    layer: the convolution.
    after: the next layer.
    params: of the network, f64.
    known: behind the convolution.
    inputs: f64[B, inputs], of it.
  """
  leaves = layer_gradient(params, layer.path)
  outputs, pull = jax.vjp(lambda x: _convolve(layer, leaves, x), jnp.asarray(inputs))
  return pull(_delta(model, layer, after, params, known, outputs)[1])[0]


def _convolve(layer, leaves, inputs):
  return layer.apply(leaves, inputs.reshape(-1, *layer.input_shape)).reshape(len(inputs), -1)


def _delta(model, layer, after, params, known, outputs):
  """Returns the values behind outputs, with nothing dropped, and the derivative by the outputs."""
  function = jax.vmap(functools.partial(activate, model, params, layer, after))
  values, slopes = jax.jvp(function, (outputs,), (jnp.ones_like(outputs),))
  return values, known.cotangent * known.kept * slopes


def _start(problem: Problem, prior, weight: float) -> np.ndarray:
  """Returns the inputs that suit the outputs, as far as these can be told by their values.

  Of outputs with the same value the largest is taken first, and only where there is but
  one does it count as an equation.
  """
  outputs, sure = problem.start
  geometry = problem.geometry
  _, slopes, _ = problem.function(outputs)
  delta, weights = problem.cotangent * problem.kept * slopes, sure / problem.size
  none = np.zeros(geometry.order.shape)
  equations = Equations(geometry, none, delta, np.zeros_like(delta), weights, problem.scales)
  residuals = problem.stacked(none, delta, weights * (geometry.bias - outputs))
  return -_least_squares(equations, prior, weight, equations.transpose(residuals))


def _least_squares(equations, prior, weight, target, last=False) -> np.ndarray:
  """Solves the normal equations with a prior."""

  def product(vector):
    found = equations.transpose(equations.forward(vector))
    return found + weight * (prior @ vector.ravel()).reshape(vector.shape)

  near = equations.preconditioner(weight, prior)
  limits = (_LAST_TOLERANCE, _LAST_ITERATIONS) if last else (_TOLERANCE, _ITERATIONS)
  return _conjugate_gradients(product, target, near, *limits)


def _descend(problem: Problem, prior, weight, inputs, solve) -> np.ndarray:
  """Returns the inputs after Gauss-Newton steps, each of the best of a few lengths.

  Args:
    problem: what is known.
    prior: [inputs, inputs], sparse.
    weight: of the prior.
    inputs: f64[pixels, channels], where to begin.
    solve: gives the solution of the normal equations for a right side; None to find it anew.
  """

  def loss(inputs):
    value = np.sum(problem.residuals(inputs) ** 2)
    value += weight * inputs.ravel() @ (prior @ inputs.ravel())
    return value if np.isfinite(value) else np.inf

  least = np.inf
  for _ in range(_STEPS):
    equations = problem.equations(inputs)
    target = equations.transpose(problem.residuals(inputs))
    target += weight * (prior @ inputs.ravel()).reshape(inputs.shape)
    move = solve(target) if solve else _least_squares(equations, prior, weight, target)
    points = [inputs - length * np.nan_to_num(move) for length in _LENGTHS]
    losses = [loss(point) for point in points]
    inputs, new = points[int(np.argmin(losses))], min(losses)
    if not new < (1 - _LEAST_GAIN) * least:
      break
    least = new
  return inputs


class _Inverse(NamedTuple):
  """The inverse of the normal equations.

  Attributes:
    solve: its product with f64[pixels, channels].
    equations: they are of these.
    factor: of Cholesky, lower, if they were written out.
  """

  solve: Callable[[np.ndarray], np.ndarray]
  equations: Equations
  factor: np.ndarray | None


def _inverse(problem: Problem, inputs: np.ndarray) -> _Inverse:
  equations = problem.equations(inputs)
  if inputs.size > _MOST_WRITTEN:
    prior = scipy.sparse.csr_array((inputs.size, inputs.size))
    return _Inverse(
      functools.partial(_least_squares, equations, prior, 0.0, last=True), equations, None
    )
  square = equations.normal()
  square[np.diag_indices(len(square))] += 1e-15 * np.trace(square)
  factor = scipy.linalg.cholesky(square, lower=True, overwrite_a=True, check_finite=False)

  def solve(vector):
    found = scipy.linalg.cho_solve((factor, True), vector.ravel(), check_finite=False)
    return found.reshape(vector.shape)

  return _Inverse(solve, equations, factor)


def _newton(problem: Problem, prior, inputs) -> tuple[np.ndarray, _Inverse]:
  """Returns the inputs after steps without a prior, and an inverse near them."""
  inverse = _inverse(problem, inputs)
  before = np.inf
  for _ in range(_STEPS):
    inputs = _descend(problem, prior, 0.0, inputs, inverse.solve)
    residual = np.linalg.norm(problem.residuals(inputs))
    # Far from the inputs the inverse of where the steps began is not the right one.
    if not residual < _LEAST_RENEWAL * before or residual < _ROUNDING:
      break
    before = residual
    inverse = _inverse(problem, inputs)
  return inputs, inverse


def _precision(problem: Problem, inputs: np.ndarray, inverse: _Inverse):
  """Returns the size of the residuals, and what error of the inputs may go with it.

  That is f64[pixels, channels], as if all equations but as many as there are inputs had a part in
  it, and the most, relative to the inputs. Of many inputs the variances are drawn, and those of a
  pixel's channels taken to be alike.
  """
  random = np.random.default_rng(0)
  residuals = problem.residuals(inputs)
  residual = float(np.linalg.norm(residuals))
  if inverse.factor is not None and inputs.size <= _MOST_INVERTED:
    (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), (inverse.factor,))
    triangle = invert(inverse.factor, lower=1)[0]
    variances = np.sum(np.tril(triangle) ** 2, axis=0).reshape(inputs.shape)
  else:
    noise = random.standard_normal((_DRAWS, residuals.size))
    draws = [inverse.solve(inverse.equations.transpose(row)) for row in noise]
    variances = np.mean(np.square(draws), axis=(0, 2))[:, None] * np.ones_like(inputs)
  vector = random.standard_normal(inputs.shape)
  for _ in range(8):
    vector = inverse.solve(vector)
    length = np.linalg.norm(vector)
    if not (np.isfinite(length) and length > 0):  # they determine some inputs not at all
      return residual, residual * np.sqrt(variances), np.inf
    vector /= length
  weakest = np.linalg.norm(inverse.equations.forward(vector))
  error = residual / weakest / np.linalg.norm(inputs)
  return residual, residual * np.sqrt(variances), float(error)


def _smoothness(shape) -> scipy.sparse.csr_array:
  """Returns the matrix Q with `x Q x` the squared differences of neighbours, and a little of x²."""
  height, width, channels = shape

  def along(count):
    steps = scipy.sparse.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(count - 1, count))
    return steps.T @ steps

  one = scipy.sparse.eye_array
  rows = scipy.sparse.kron(along(height), one(width * channels))
  columns = scipy.sparse.kron(one(height), scipy.sparse.kron(along(width), one(channels)))
  return (rows + columns + 1e-4 * one(height * width * channels)).tocsr()


def _conjugate_gradients(
  product: Callable[[np.ndarray], np.ndarray],
  target: np.ndarray,
  preconditioner: Callable[[np.ndarray], np.ndarray],
  tolerance: float,
  most: int,
) -> np.ndarray:
  """Returns the solution of `product(x) = target`.

  Args:
    product: with a symmetric matrix without negative eigenvalues.
    target: f64[...].
    preconditioner: the product with a matrix near its inverse.
    tolerance: of what is left, relative, in the norm of the preconditioner.
    most: iterations at most.
  """
  found, left = np.zeros_like(target), target
  direction = scaled = preconditioner(left)
  first = size = least = np.vdot(left, scaled)
  best = found
  for _ in range(most):
    if not size > tolerance**2 * first:
      break
    image = product(direction)
    curvature = np.vdot(direction, image)
    if not curvature > 0:
      break
    found = found + size / curvature * direction
    left = left - size / curvature * image
    scaled = preconditioner(left)
    size, before = np.vdot(left, scaled), size
    if size < least:
      best, least = found, size
    elif size > _ROUNDED * least:
      break
    direction = scaled + size / before * direction
  return best
