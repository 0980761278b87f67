"""From the zeros of one sample to all that the gradient says of it, layer by layer.

Row vectors: a layer computes `z = a W + b`, and its gradient is `dW = Σ_b a_bᵀ δ_b`.
With a 1 as further input the bias is a row of the kernel, and its gradient one of dW.
The spaces that dW spans, on the side of the inputs and of the outputs, hold every
a_b and every δ_b of the batch. Where sample b dropped an entry after layer 1, both δ_b of
layer 1 and a_b of layer 2 are zero, and the vectors with these zeros are theirs alone.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxdia.closed_form.sparse import LEAST_GAP, bounds, normal, split_zeros
from jaxdia.closed_form.structure import activate
from jaxdia.core.types import Array, Number, Params
from jaxdia.gradients import layer_gradient
from jaxdia.models import DenseLayer, DropoutModel

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
  """

  left: Float[Array, "inputs rank"]
  values: Float[Array, " rank"]
  right: Float[Array, "rank outputs"]
  padding: Float[Array, " rank"]


class Sample(NamedTuple):
  """What was found of one image of the batch; without leading axes.

  Attributes:
    inputs: {layer number: f64[inputs (+ 1)]}.
    deltas: {layer number: f64[outputs]}, derivatives of the batch's loss.
    kept: {layer number: f64[inputs]}, masks of the inputs of all layers but the first.
    label: i[].
    residual: f[], how far all this is from what the gradient allows, relative.
  """

  inputs: tuple[jax.Array, ...]
  deltas: tuple[jax.Array, ...]
  kept: tuple[jax.Array, ...]
  label: jax.Array
  residual: jax.Array


def layers_of(chain: Sequence[DenseLayer], params: Params) -> tuple[Layer, ...]:
  """Returns the parameters of the layers of a chain; a gradient's if given one."""
  layers = []
  for layer in chain:
    leaves = layer_gradient(params, layer.path)
    rows = [leaves["kernel"]] + ([leaves["bias"][None]] if "bias" in leaves else [])
    layers.append(Layer(jnp.concatenate(rows).astype(jnp.float64), "bias" in leaves))
  return tuple(layers)


def span(matrix: Float[Array, "inputs outputs"], rank: int, size: int) -> tuple[Space, float]:
  """Returns the space of a gradient, and how much lies outside.

  Args:
    matrix: f64[inputs, outputs].
    rank: dimensions that are used.
    size: dimensions in all, so that shapes need not change with the rank.

  Returns:
    The space; and the largest singular value left out by the least one kept.
  """
  left, values, right = np.linalg.svd(matrix, full_matrices=False)
  rest = values[rank] if len(values) > rank else 0.0
  rest = rest / max(values[min(rank, len(values)) - 1], 1e-300)
  unused = np.arange(size) >= rank
  left = np.where(unused, 0, _resize(left, size, 1))
  right = np.where(unused[:, None], 0, _resize(right, size, 0))
  values = np.where(unused, 1, _resize(values, size, 0))
  return Space(left, values, right, unused.astype(float)), float(rest)


def _resize(array, size, axis):
  array = np.take(array, range(min(size, array.shape[axis])), axis)
  padding = [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(array.shape)]
  return np.pad(array, padding)


def _rms(values, kept):
  return jnp.sqrt(jnp.sum(kept * values**2) / jnp.maximum(jnp.sum(kept), 1))


def _solve(rows, values, weights, padding):
  """Returns the least-squares solution x of `x @ rows = values`."""
  weighted = rows * weights[None]
  matrix = weighted @ rows.T
  size = jnp.trace(matrix)
  matrix += jnp.diag(padding * (1 + size) + 1e-14 * size + 1e-300)
  return jax.scipy.linalg.solve(matrix, weighted @ values, assume_a="pos")


def refine(
  delta_space: Space, input_space: Space, zero: Bool[Array, " n"], rate: Number
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
  """Finds out what a sample dropped, from both of the gradients that show it.

  Where an entry was dropped, the delta before it and the input after it are zero. Either may
  be nearly zero for another reason (a slope that vanishes); hardly ever are both.

  Args:
    delta_space: of the layer before.
    input_space: of the layer after.
    zero: b[n], entries that seem dropped.
    rate: f[], of dropout.

  Returns:
    kept f64[n], delta f64[n] and inputs f64[n], the latter two up to scale and sign.
  """
  count = len(zero)
  points = jnp.stack([delta_space.right.T, input_space.left[:count]])

  def vectors(weights):
    normals = jax.vmap(normal, (0, None, None))(points, weights, delta_space.padding)
    return jnp.einsum("inr,ir->in", points, normals)

  def joint_sizes(weights):
    both = vectors(weights)
    return jnp.linalg.norm(both / jnp.sqrt(jnp.mean(both**2, axis=1, keepdims=True)), axis=0)

  # Reweighted, so that an entry that only seems dropped loses its weight.
  sizes = joint_sizes(zero.astype(jnp.float64))
  for epsilon in (0.3, 0.1, 0.03, 0.01, 1e-3):
    sizes = joint_sizes(zero.astype(sizes.dtype) / (sizes**2 + epsilon**2))
  least, most = bounds(count, 0.0, rate)
  zeros = split_zeros(sizes, jnp.ones(count), jnp.maximum(least, 1), most)
  chosen = zeros.zero & (zeros.gap > LEAST_GAP)  # a sample may have dropped nothing
  delta, inputs = vectors(chosen)
  kept = 1 - chosen.astype(jnp.float64)
  return kept, kept * delta, kept * inputs


@functools.partial(jax.jit, static_argnums=(1, 2, 6))
def complete(
  model: DropoutModel,
  links: tuple[tuple[DenseLayer, DenseLayer], ...],
  sites: tuple[str | None, ...],
  params: Params,
  spaces: tuple[Space, ...],
  known: tuple[Float[Array, "k n"], Float[Array, "k n"], Float[Array, "k n"]],
  batch_size: int,
) -> Sample:
  """Recovers samples from what they kept after the first layer.

  Args:
    model: the network.
    links: each layer of the chain with the one after it.
    sites: of dropout after each layer but the last; None where there is none.
    params: its parameters, f64.
    spaces: of the gradient of each layer but the last, or of two layers.
    known: kept, delta and inputs as `refine` gives them, with leading axis k.
    batch_size: of the client.

  Returns:
    The samples, with leading axis k.
  """
  rates = [None if site is None else model.rates[site] for site in sites]
  return jax.lax.map(
    lambda one: _complete(model, links, params, spaces, rates, batch_size, *one),
    known,
    batch_size=64,
  )


def _complete(model, links, params, spaces, rates, batch_size, kept, delta, h) -> Sample:
  layers = layers_of([*(layer for layer, _ in links), links[-1][1]], params)
  last = len(links)

  def activation(k, outputs):  # the inputs of layer k + 1, and their slopes
    def function(z):
      layer, after = links[k]
      return activate(model, params, layer, after, z)

    return jax.jvp(function, (outputs,), (jnp.ones_like(outputs),))

  coordinates = _first_inputs(layers, spaces, activation, kept, h)
  inputs = [coordinates @ spaces[0].left.T]
  if layers[0].biased:
    inputs[0] = inputs[0].at[-1].set(1.0)
  masks, slopes = [], []
  for k in range(last):
    values, slope = activation(k, inputs[k] @ layers[k].weights)
    # delta = (next delta @ weights.T) * slope, and the next delta lies in the space of its layer.
    inner = layers[k + 1].weights[: len(values)].T
    if k + 1 == last:
      next_delta = _solve(inner * (kept * slope)[None], delta, kept, jnp.zeros(len(inner)))
    else:
      space = spaces[k + 1]
      rows = (space.right @ inner) * (kept * slope)[None]
      next_delta = _solve(rows, delta, kept, space.padding) @ space.right
    # What was kept shows once more, now that the delta is known that would be if all were.
    expected = (next_delta @ inner) * slope
    sure = jnp.abs(expected) > 3e-5 * _rms(expected, jnp.ones(len(kept)))
    kept = jnp.where(sure, (jnp.abs(delta) > jnp.abs(expected) / 2).astype(kept.dtype), kept)
    masks.append(kept)
    slopes.append(kept * slope)
    one = jnp.ones(1 if layers[k + 1].biased else 0)
    inputs.append(jnp.concatenate([kept * values, one]))
    delta = next_delta
    if k + 1 < last:
      kept = jnp.ones_like(delta)
      if rates[k + 1] is not None:
        count = jnp.asarray(float(delta.size))
        least, most = bounds(count, 0.0, rates[k + 1])
        zeros = split_zeros(delta, jnp.ones_like(delta), jnp.maximum(least, 1), most)
        zero = zeros.zero & (zeros.gap > LEAST_GAP)
        if k + 2 < len(spaces):
          kept, direction, _ = refine(space, spaces[k + 2], zero, rates[k + 1])
          delta = direction * jnp.sum(direction * delta) / jnp.sum(direction**2)
        else:
          kept = 1 - zero.astype(delta.dtype)

  # The last delta is (softmax - one-hot) / B; which class it is shows in its direction.
  classes = jnp.eye(layers[last].weights.shape[1])
  candidates = jax.nn.softmax(inputs[last] @ layers[last].weights)[None] - classes
  fits = jnp.abs(candidates @ delta) / (jnp.linalg.norm(candidates, axis=1) + 1e-300)
  label = jnp.argmax(fits)
  deltas = [candidates[label] / batch_size]
  for k in reversed(range(last)):
    inner = layers[k + 1].weights[: len(slopes[k])].T
    deltas.insert(0, (deltas[0] @ inner) * slopes[k])
  residual = jnp.max(jnp.asarray([*_outside(inputs, deltas, spaces)]))
  residual = jnp.where(jnp.isfinite(residual), residual, jnp.inf)
  return Sample(tuple(inputs), tuple(deltas), tuple(masks), label, residual)


def _outside(inputs, deltas, spaces):
  """Yields how far a sample is from the spaces of the gradient, each f[] and relative."""
  for k, space in enumerate(spaces):
    for vector, basis in ((inputs[k], space.left), (deltas[k], space.right.T)):
      coordinates = vector @ basis
      yield jnp.linalg.norm(vector - basis @ coordinates) / jnp.linalg.norm(vector)
    # Taking the sample out of the gradient lowers its rank (Wedderburn 1934).
    yield jnp.abs(1 - share(inputs[k], deltas[k], space))


def share(inputs: jax.Array, delta: jax.Array, space: Space) -> jax.Array:
  """Returns 1 if a gradient without the outer product of two vectors has a rank less."""
  return jnp.sum((inputs @ space.left) * (delta @ space.right.T) / space.values)


def _first_inputs(layers, spaces, activation, kept, h):
  """Finds the inputs of the first layer from the direction of those of the second.

  `activation(c @ left.T @ W) = s h` on the kept entries, for some scale s: by
  Levenberg-Marquardt over (c, s).
  """
  first = spaces[0]
  h = h / _rms(h, kept)
  rows = first.left.T @ layers[0].weights
  rank = len(rows)
  count = jnp.sum(kept)
  # With a bias the input that goes with it is 1, which weighs as much as all entries.
  one_row = first.left[-1] * jnp.sqrt(count) if layers[0].biased else None
  at = activation(0, jnp.zeros_like(h))[0]
  slope = activation(0, jnp.full_like(h, 0.5))[0] - activation(0, jnp.full_like(h, -0.5))[0]
  padding = jnp.concatenate([first.padding, jnp.zeros(1)])

  def residuals(theta, sign):
    # With c = s c', divided by s: else s = 0 would be a solution.
    c, scale = theta[:rank], sign * jnp.exp(theta[rank])
    outputs = scale * (c @ rows)
    values, slopes = activation(0, outputs)
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
    c = _solve(rows, (scale * h - at) / slope, kept, first.padding)
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
  return sign * jnp.exp(theta[rank]) * theta[:rank]
