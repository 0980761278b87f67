"""The spaces that gradients of dense layers span, and what is solved for in them."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.closed_form.serial import after
from jaxdia.closed_form.singular import leading
from jaxdia.core.types import Array, Params, Scalar
from jaxdia.gradients import layer_gradient
from jaxdia.models import DenseLayer

# Sizes (root mean square) that the kept activations are tried with, and steps from each.
_SCALES = (0.05, 0.15, 0.4, 1.0, 2.5)
_FIRST_STEPS, _STEPS = 4, 20


class Layer(NamedTuple):
  """The parameters of a layer of a chain, with its bias as last row.

  Attributes:
    weights: f64[inputs (+ 1), outputs].
    biased: b[], whether the last row is a bias.
  """

  weights: Float[Array, "inputs outputs"]
  biased: bool


class Space(NamedTuple):
  """The gradient of a layer, `left @ diag(values) @ right`, by its singular vectors.

  Attributes:
    left: f64[inputs (+ 1), rank].
    values: f64[rank]; dimensions that are not used any more have 1.
    right: f64[rank, outputs].
    padding: f64[rank], 1 for such dimensions, otherwise 0.
    rows: f64[inputs (+ 1)], 1 for those that the gradient tells, 0 for those of which too little
      was sent; these are 0 in `left`.
    columns: f64[outputs], likewise.
    noise: f64[rank], standard deviation of the entries of each singular vector, by the noise of the
      gradient: the less an image has a part in it, the more. 0 for dimensions that are not used.
  """

  left: Float[Array, "inputs rank"]
  values: Float[Array, " rank"]
  right: Float[Array, "rank outputs"]
  padding: Float[Array, " rank"]
  rows: Float[Array, " inputs"]
  columns: Float[Array, " outputs"]
  noise: Float[Array, " rank"]


def layers_of(chain: Sequence[DenseLayer], params: Params) -> tuple[Layer, ...]:
  """Returns the parameters of the layers of a chain; a gradient's if given one.

  Args:
    chain: its layers.
    params: of the network, or a gradient by them.
  """
  layers = []
  for layer in chain:
    leaves = layer_gradient(params, layer.path)
    rows = [leaves["kernel"]] + ([leaves["bias"][None]] if "bias" in leaves else [])
    layers.append(Layer(jnp.concatenate(rows).astype(jnp.float64), "bias" in leaves))
  return tuple(layers)


def span(
  matrix: Float[np.ndarray, "inputs outputs"],
  rank: int,
  size: int,
  told: tuple[Float[np.ndarray, " inputs"], Float[np.ndarray, " outputs"]],
  std: float,
) -> Space:
  """Returns the space of a gradient.

  Args:
    matrix: f64[inputs, outputs].
    rank: dimensions that are used.
    size: dimensions in all, so that shapes need not change with the rank.
    told: `rows` and `columns` of the space.
    std: standard deviation of the noise of an entry.
  """
  left, values, right = leading(matrix, rank)
  unused = np.arange(size) >= rank
  left = np.where(unused, 0, _resize(left, size, 1))
  right = np.where(unused[:, None], 0, _resize(right, size, 0))
  values = np.where(unused, 1, _resize(values, size, 0))
  noise = np.where(unused, 0, std / np.maximum(values, 1e-300))
  return Space(left, values, right, unused.astype(float), *told, noise)


def _resize(array, size, axis):
  array = np.take(array, range(min(size, array.shape[axis])), axis)
  padding = [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(array.shape)]
  return np.pad(array, padding)


def share(inputs: Float[Array, " inputs"], delta: Float[Array, " outputs"], space: Space) -> Scalar:
  """Returns 1 if a gradient without the outer product of two vectors has a rank less.

  Args:
    inputs: f64[inputs (+ 1)].
    delta: f64[outputs].
    space: of the gradient.

  Returns:
    f[]; its inverse times the outer product is what to take out (Wedderburn 1934).
  """
  return jnp.sum((inputs @ space.left) * (delta @ space.right.T) / space.values)


def noise_in(
  coordinates: Float[Array, " rank"], noise: Float[Array, " rank"], vector: Float[Array, " n"]
) -> Scalar:
  """Returns the standard deviation of the entries of a vector, relative to their size, f[].

  Args:
    coordinates: f64[rank], of the vector in a space.
    noise: of the space.
    vector: f64[n].
  """
  size = jnp.sqrt(jnp.mean(vector**2))
  return jnp.sqrt(jnp.sum((coordinates * noise) ** 2)) / jnp.maximum(size, 1e-300)


def rms(values: Float[Array, " n"], kept: Float[Array, " n"]) -> Scalar:
  """Returns the root mean square of the values that were kept, f[].

  Args:
    values: f64[n].
    kept: f64[n], 1 for those that count, otherwise 0.
  """
  return jnp.sqrt(jnp.sum(kept * values**2) / jnp.maximum(jnp.sum(kept), 1))


def least_squares(
  rows: Float[Array, "k n"],
  values: Float[Array, " n"],
  weights: Float[Array, " n"],
  padding: Float[Array, " k"],
) -> Float[Array, " k"]:
  """Returns the least-squares solution x of `x @ rows = values`.

  Args:
    rows: f64[k, n].
    values: f64[n].
    weights: f64[n], of the equations.
    padding: f64[k], 1 where x is to be 0.

  Returns:
    f64[k].
  """
  weighted = rows * weights[None]
  matrix = weighted @ rows.T
  size = jnp.trace(matrix)
  matrix += jnp.diag(padding * (1 + size) + 1e-14 * size + 1e-300)
  return jax.scipy.linalg.solve(matrix, weighted @ values, assume_a="pos")


def fit_size(
  logits: Float[Array, " classes"], delta: Float[Array, " classes"]
) -> tuple[Scalar, Scalar]:
  """Finds the size of logits by the direction of the derivative of the cross-entropy.

  Without a bias, and with functions such as a ReLU, what a layer gets tells the size of the
  image nowhere but here: `δ_j = t softmax(s z)_j` for all classes but that of the image, so log |δ|
  is linear in z, and s is its slope.

  Args:
    logits: f64[num_classes], up to scale.
    delta: f64[num_classes], up to scale.

  Returns:
    s, and how far it may be off, relative.
  """
  sizes = jnp.abs(delta)
  weights = jnp.where(jnp.arange(len(delta)) == jnp.argmax(sizes), 0, delta**2)
  weights /= jnp.sum(weights) + 1e-300
  logs = jnp.log(sizes + 1e-300)
  z, y = logits - weights @ logits, logs - weights @ logs
  spread = weights @ z**2
  size = weights @ (z * y) / spread
  error = jnp.sqrt(weights @ (y - size * z) ** 2 / spread / jnp.maximum(len(delta) - 3, 1))
  return size, jnp.where(size > 0, error / size, jnp.inf)


def first_inputs(
  first: Space,
  layer: Layer,
  activation: Callable[[Float[Array, " n"]], tuple[Float[Array, " n"], Float[Array, " n"]]],
  kept: Float[Array, " n"],
  h: Float[Array, " n"],
  straight: bool,
) -> tuple[Float[Array, " rank"], Scalar, Scalar]:
  """Finds the inputs of the first layer from the direction of those of the second.

  `activation(c @ left.T @ W) = s h` on the kept entries, for some scale s: by
  Levenberg-Marquardt over (c, s).

  Args:
    first: of the gradient of the first layer.
    layer: its parameters.
    activation: the inputs of the second layer, and their slopes, of outputs of the first.
    kept: f64[n], inputs of the second layer that are not zero.
    h: f64[n], these inputs, up to scale and sign.
    straight: whether the function is linear on either side of 0.

  Returns:
    f64[rank], coordinates of the inputs, and their standard error f64[] in all, by what is left of
    the equations; and what is left of these, f64[], relative. The size of the inputs is arbitrary
    where it makes no difference.
  """
  h = h / rms(h, kept)
  rows = first.left.T @ layer.weights
  rank = len(rows)
  if straight:
    return _straight_inputs(first, layer, activation, rows, kept, h)
  count = jnp.sum(kept)
  # With a bias the input that goes with it is 1, which weighs as much as all entries.
  one_row = first.left[-1] * jnp.sqrt(count) if layer.biased else None
  at = activation(jnp.zeros_like(h))[0]
  slope = activation(jnp.full_like(h, 0.5))[0] - activation(jnp.full_like(h, -0.5))[0]
  padding = jnp.concatenate([first.padding, jnp.zeros(1)])

  def residuals(theta, sign):
    # With c = s c', divided by s: else s = 0 would be a solution.
    c, scale = theta[:rank], sign * jnp.exp(theta[rank])
    outputs = scale * (c @ rows)
    values, slopes = activation(outputs)
    r = kept * (values / scale - h)
    along_scale = kept * (slopes * outputs - values) / scale
    jacobian = jnp.concatenate([(kept * slopes)[None] * rows, along_scale[None]])
    if one_row is not None:
      one = scale * (c @ one_row)
      r = jnp.append(r, one - jnp.sqrt(count))
      jacobian = jnp.concatenate([jacobian, jnp.append(scale * one_row, one)[:, None]], axis=1)
    return r, jacobian

  def step(sign, _, carry):
    theta, damping, loss = carry
    r, jacobian = residuals(theta, sign)
    matrix = jacobian @ jacobian.T
    diagonal = damping * jnp.diag(matrix) + padding * (1 + jnp.trace(matrix)) + 1e-300
    move = jax.scipy.linalg.solve(matrix + jnp.diag(diagonal), jacobian @ r, assume_a="pos")
    new = theta - move
    new_loss = jnp.sum(residuals(new, sign)[0] ** 2)
    better = new_loss < loss
    return (
      jnp.where(better, new, theta),
      jnp.clip(jnp.where(better, damping / 5, damping * 5), 1e-14, 1e6),
      jnp.where(better, new_loss, loss),
    )

  def fit(scale):
    sign = jnp.sign(scale)
    c = least_squares(rows, (scale * h - at) / slope, kept, first.padding)
    theta = jnp.append(c / scale, jnp.log(jnp.abs(scale)))
    loss = jnp.sum(residuals(theta, sign)[0] ** 2)
    return sign, (theta, jnp.asarray(1e-3), loss)

  def descend(sign, carry, steps):
    return jax.lax.fori_loop(0, steps, functools.partial(step, sign), carry)

  # A few steps from every scale, many from the best.
  scales = jnp.asarray([sign * scale for scale in _SCALES for sign in (1, -1)])
  signs, carries = jax.vmap(fit)(scales)
  carries = jax.vmap(lambda sign, carry: descend(sign, carry, _FIRST_STEPS))(signs, carries)
  losses = jnp.where(jnp.isfinite(carries[2]), carries[2], jnp.inf)
  best = jnp.argsort(losses)[:2]
  signs, carries = jax.tree.map(lambda x: x[best], (signs, carries))
  thetas, _, losses = jax.vmap(lambda sign, carry: descend(sign, carry, _STEPS))(signs, carries)
  theta, sign = jax.tree.map(lambda x: x[jnp.argmin(losses)], (thetas, signs))
  r, jacobian = residuals(theta, sign)
  scale = sign * jnp.exp(theta[rank])
  # By c and the scale; the coordinates are their product.
  by_theta = jnp.concatenate([scale * jnp.eye(rank), scale * theta[None, :rank]]).T
  left = jnp.sqrt(jnp.sum(r**2) / jnp.maximum(count, 1))
  spread = _spread(jacobian, r, padding, by_theta)
  return after(scale * theta[:rank], spread), spread, left


def _spread(jacobian, left, padding, by=None):
  """Returns the standard error of what was solved for, all entries together.

  Args:
    jacobian: f64[k, n], derivatives of the n equations.
    left: f64[n], what is left of them.
    padding: f64[k], 1 for unknowns that are none.
    by: f64[m, k], what is wanted by the unknowns; these themselves if None.
  """
  used = 1 - padding
  matrix = jacobian @ jacobian.T
  matrix += jnp.diag(padding * (1 + jnp.trace(matrix)) + 1e-14 * jnp.trace(matrix) + 1e-300)
  by = jnp.diag(used) if by is None else by * used[None]
  equations = jnp.sum(jnp.any(jacobian != 0, axis=0), dtype=used.dtype) - jnp.sum(used)
  variance = jnp.sum(left**2) / jnp.maximum(equations, 1)
  inverse = jax.scipy.linalg.solve(matrix, by.T, assume_a="pos")
  return jnp.sqrt(variance * jnp.sum(by.T * inverse))


def _straight_inputs(first, layer, activation, rows, kept, h):
  """Finds the coordinates for a function that is linear on either side of 0: by its inverse."""
  positive, negative = (activation(jnp.full_like(h, z))[0] for z in (1.0, -1.0))

  def solve(sign):
    values = sign * h
    outputs = values / jnp.where((values > 0) | (negative == 0), positive, -negative)
    c = least_squares(rows, outputs, kept, first.padding)
    c += least_squares(rows, outputs - c @ rows, kept, first.padding)
    left = activation(c @ rows)[0] - values
    slopes = activation(c @ rows)[1]
    return (
      c,
      jnp.sum(kept * left**2),
      _spread(rows * (kept * slopes)[None], kept * left, first.padding),
    )

  solutions, losses, spreads = jax.vmap(solve)(jnp.asarray([1.0, -1.0]))
  best = jnp.argmin(losses)
  c, spread = after(solutions, spreads)[best], spreads[best]
  size = 1 / (c @ first.left[-1]) if layer.biased else 1.0
  fit = jnp.sqrt(losses[best] / jnp.maximum(jnp.sum(kept), 1))
  return size * c, jnp.abs(size) * spread, fit
