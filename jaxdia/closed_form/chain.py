"""From the zeros of one sample to all that the gradient says of it, layer by layer.

Row vectors: a layer computes `z = a W + b`, and its gradient is `dW = Σ_b a_bᵀ δ_b`.
With a 1 as further input the bias is a row of the kernel, and its gradient one of dW.
The spaces that dW spans, on the side of the inputs and of the outputs, hold every
a_b and every δ_b of the batch. Where sample b dropped an entry after layer 1, both δ_b of
layer 1 and a_b of layer 2 are zero, and the vectors with these zeros are theirs alone.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.client import Loss
from jaxdia.closed_form.found import tolerance_of
from jaxdia.closed_form.parts import NO_LABEL
from jaxdia.closed_form.serial import after, batched_map
from jaxdia.closed_form.spaces import (
  Space,
  first_inputs,
  fit_size,
  layers_of,
  least_squares,
  noise_in,
  rms,
  share,
)
from jaxdia.closed_form.sparse import LEAST_GAP, bounds, normal, split_zeros
from jaxdia.closed_form.structure import LayerChain, activate
from jaxdia.core.precision import usual_promotion
from jaxdia.core.types import Array, Number, Params
from jaxdia.models import DenseLayer, DropoutModel

# So many units of rounding may a derivative by the logits be off, since 1 is taken from a softmax.
_UNITS = 4
# A sample has a label unless it fits the gradient so many times better without.
_BETTER_WITHOUT = 10.0
# A delta tells what was dropped if it is so many times its noise.
_SURE = 10
# The standard deviation of a normal distribution by the geometric mean of its sizes.
_OF_SIZES = math.exp((np.euler_gamma + math.log(2)) / 2)
# So often what a sample kept is judged by what it would have if it had kept all.
_TURNS = 4
# Behind a ReLU no more than this share of the outputs is zero.
_MOST_SILENT = 0.95


class Sample(NamedTuple):
  """What was found of one image of the batch; without leading axes.

  Attributes:
    inputs: f64[inputs (+ 1)] of each layer.
    deltas: f64[outputs] of each layer, derivatives of the batch's loss.
    kept: f64[inputs] of each layer but the first, masks of its inputs.
    active: b[inputs] of each layer but the first, where the mask makes a difference. Where it makes
      none, as behind a ReLU that is off, it is not known, and `kept` is 0.
    sure: b[inputs] likewise, where the difference is beyond the noise, so that `kept` is known.
    label: i[]; NO_LABEL if the gradient does not tell it.
    scale: f[], by which factor the gradient exceeds that of the loss.
    residual: f[], how far all this is from what the gradient allows, relative.
    error: f[], standard error of the inputs of the first layer, by the noise of its gradient and by
      how well those of the second fit.
    fit: f[], what is left of the inputs of the second layer, in the direction that its gradient
      tells of them, by those that follow from the first; relative.
    level: f[], share of it that rounding or noise changed, in the layer where that is most.
  """

  inputs: tuple[Float[Array, "*samples _"], ...]
  deltas: tuple[Float[Array, "*samples _"], ...]
  kept: tuple[Float[Array, "*samples _"], ...]
  active: tuple[Bool[Array, "*samples _"], ...]
  sure: tuple[Bool[Array, "*samples _"], ...]
  label: Integer[Array, "*samples"]
  scale: Float[Array, "*samples"]
  residual: Float[Array, "*samples"]
  error: Float[Array, "*samples"]
  fit: Float[Array, "*samples"]
  level: Float[Array, "*samples"]


def refine(
  delta_space: Space,
  input_space: Space,
  zero: Bool[Array, " n"],
  off: Bool[Array, " n"],
  rate: Number,
  silent: Number,
  rounding: Number,
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
  """Finds out what a sample dropped, from both of the gradients that show it.

  Where an entry was dropped, the delta before it and the input after it are zero. Either may
  be nearly zero for another reason (a slope that vanishes); hardly ever are both.

  Args:
    delta_space: of the layer before.
    input_space: of the layer after.
    zero: b[n], entries that seem zero.
    off: b[n], entries that are zero of themselves, whether dropped or not.
    rate: f[], of dropout.
    silent: see `bounds`, of the entries that are not known to be off.
    rounding: f[], share of the gradient that rounding changed; of the sample it may be more.

  Returns:
    kept f64[n], delta f64[n] and inputs f64[n], the latter two up to scale and sign.
  """
  count = len(zero)
  points = jnp.stack([delta_space.right.T, input_space.left[:count]])
  padding = jnp.stack([delta_space.padding, input_space.padding])
  noise = jnp.stack([delta_space.noise, input_space.noise])

  def vectors(weights):
    normals = jax.vmap(normal, (0, None, 0))(points, weights, padding)
    both = jnp.einsum("inr,ir->in", points, normals)
    return both, jax.vmap(noise_in)(normals, noise, both)

  def joint_sizes(weights):
    both, noises = vectors(weights)
    sizes = jnp.linalg.norm(both / jnp.sqrt(jnp.mean(both**2, axis=1, keepdims=True)), axis=0)
    return sizes * jnp.sqrt(2 / jnp.maximum(jnp.sum(told, axis=0), 1)), jnp.max(noises)

  # Reweighted, so that an entry that only seems dropped loses its weight.
  told = jnp.stack([delta_space.columns, input_space.rows[:count]])
  off |= ~jnp.any(told > 0, axis=0)
  sizes, own = joint_sizes(zero.astype(jnp.float64))
  for epsilon in (0.3, 0.1, 0.03, 0.01, 1e-3):
    sizes, own = joint_sizes(zero.astype(sizes.dtype) / (sizes**2 + epsilon**2))
  on = 1 - off.astype(sizes.dtype)
  least, most = bounds(jnp.sum(on), 0.0, rate, silent)
  rounding = jnp.maximum(rounding, own)
  zeros = split_zeros(sizes, on, jnp.maximum(least, 1), most, rounding)
  chosen = zeros.zero & (zeros.gap > LEAST_GAP)  # a sample may have dropped nothing
  kept = on * (1 - chosen.astype(on.dtype))
  delta, inputs = vectors(1 - kept)[0]
  kept = after(kept, delta)
  # What only seemed dropped can be seen again in these, so they are not made zero there.
  return kept, on * delta, on * inputs


class Links(NamedTuple):
  """What a chain of layers is made of, without arrays.

  Attributes:
    layers: all.
    sites: of dropout after each layer but the last; None where there is none.
    silent: after each layer but the last, whether the function is a ReLU or like it.
    straight: whether the first of these functions is linear on either side of 0.
    homogeneous: see `structure.LayerChain`.
  """

  layers: tuple[DenseLayer, ...]
  sites: tuple[str | None, ...]
  silent: tuple[bool, ...]
  straight: bool
  homogeneous: bool


def links_of(chain: LayerChain) -> Links:
  """Returns what a chain is made of.

  Args:
    chain: of at least two layers.
  """
  sites = tuple(source.site for source in chain.inputs[1:])
  silent = tuple(link.silent for link in chain.links)
  return Links(chain.layers, sites, silent, chain.links[0].homogeneous, chain.homogeneous)


def may_be_silent(silent: bool) -> float:
  """Returns the share of the outputs of a function that may be zero of itself."""
  return _MOST_SILENT if silent else 0.0


@functools.partial(jax.jit, static_argnums=(1, 5, 6))
def complete(
  model: DropoutModel,
  links: Links,
  params: Params,
  spaces: tuple[Space, ...],
  known: tuple[Float[Array, "k n"], Float[Array, "k n"], Float[Array, "k n"]],
  batch_size: int,
  loss: Loss,
  levels: Float[Array, " spaces"],
  std: float,
) -> Sample:
  """Recovers samples from what they kept after the first layer.

  Args:
    model: the network.
    links: its dense layers.
    params: its parameters, f64.
    spaces: of the gradient of each layer but the last, or of two layers.
    known: kept, delta and inputs as `refine` gives them, with leading axis k.
    batch_size: of the client.
    loss: of the client.
    levels: f[spaces], share of the gradient of each layer that rounding or noise changed, at least
      a unit of the type that the client computed in.
    std: standard deviation of the noise of an entry of the first layer's gradient.

  Returns:
    The samples, with leading axis k.
  """
  return batched_map(
    lambda one: _complete(model, links, params, spaces, batch_size, loss, levels, std, *one), known
  )


def _complete(model, links, params, spaces, batch_size, loss, levels, std, *known) -> Sample:
  kept, delta, h = known
  layers = layers_of(links.layers, params)
  last = len(layers) - 1

  def activation(k, outputs):  # the inputs of layer k + 1, and their slopes
    def function(z):
      return activate(model, params, links.layers[k], links.layers[k + 1], z)

    return jax.jvp(function, (outputs,), (jnp.ones_like(outputs),))

  coordinates, spread, fit = first_inputs(
    spaces[0],
    layers[0],
    functools.partial(activation, 0),
    kept * _rows_after(spaces, 0, len(kept)),
    h,
    links.straight,
  )
  inputs = [coordinates @ spaces[0].left.T]
  if layers[0].biased:
    inputs[0] = inputs[0].at[-1].set(1.0)
  sign = jnp.sign(share(inputs[0], delta, spaces[0]))
  # Of a sample with a small part in the gradient more is rounding than of the whole.
  own = noise_in(delta @ spaces[0].right.T, spaces[0].noise, delta)
  level = jnp.maximum(jnp.max(levels), own)
  masks, active, sure, slopes = [], [], [], []
  for k in range(last):
    values, slope = activation(k, inputs[k] @ layers[k].weights)
    shown = spaces[k].columns > 0
    # Where neither of two gradients was sent, nothing tells.
    told = shown | (_rows_after(spaces, k, len(values)) > 0)
    active.append(((values != 0) | (slope != 0)) & told)
    if k:
      rate = None if links.sites[k] is None else model.rates[links.sites[k]]
      kept, delta = _kept_after(spaces[k : k + 2], delta, active[k], rate, level)
    # delta = (next delta @ weights.T) * slope, and the next delta lies in the space of its layer.
    inner = layers[k + 1].weights[: len(values)].T
    within = jnp.eye(len(inner)) if k + 1 == last else spaces[k + 1].right
    padding = jnp.zeros(len(inner)) if k + 1 == last else spaces[k + 1].padding
    small = jnp.zeros_like(shown)
    for _ in range(_TURNS):
      rows = (within @ inner) * (kept * slope)[None]
      weights = kept * spaces[k].columns
      next_delta = least_squares(rows, delta, weights, padding) @ within
      # What was kept shows once more, now that the delta is known that would be if all were. What
      # was wrong in the first place is in this delta too, so it is asked again.
      expected = (next_delta @ inner) * slope
      noise = _noise_of(delta - expected, weights, jnp.sum(1 - padding))
      small = shown & (jnp.abs(expected) < _SURE * noise)
      seen = (jnp.abs(delta) > jnp.abs(expected) / 2).astype(kept.dtype)
      # Of a small one the gradient of the next layer tells more, where there is one.
      judged = shown & ~small if k + 1 < len(spaces) else shown
      kept = jnp.where(judged, seen, kept)
    masks.append(kept)
    sure.append(active[k] & ~small)
    slopes.append(kept * slope)
    one = jnp.ones(1 if layers[k + 1].biased else 0)
    inputs.append(jnp.concatenate([kept * values, one]))
    delta = next_delta

  logits, error = inputs[last] @ layers[last].weights, jnp.zeros(())
  # Noise tilts the space that the inputs lie in, and places them there with some error.
  tilt = std * jnp.linalg.norm(coordinates / spaces[0].values)
  size = jnp.ones(())
  if links.homogeneous and loss.kind == "cross_entropy" and not loss.label_smoothing:
    size, error = fit_size(logits, delta)
    inputs, logits = [size * x for x in inputs], size * logits
  elif links.homogeneous:
    error = jnp.asarray(jnp.inf)  # of other losses the size of the image is not solved for
  label, labelled = last_delta(logits, sign * delta, loss, level)

  def judge(delta):
    deltas = [delta if loss.reduction == "sum" else delta / batch_size]
    for k in reversed(range(last)):
      inner = layers[k + 1].weights[: len(slopes[k])].T
      deltas.insert(0, (deltas[0] @ inner) * slopes[k])
    shares = jnp.stack([share(*vectors) for vectors in zip(inputs, deltas, spaces, strict=False)])
    # Taking the sample out of the gradient lowers its rank (Wedderburn 1934), if this is 1; so it
    # tells by what factor the gradient is larger than that of the loss.
    mean = jnp.mean(shares)
    misfits = [*_outside(inputs, deltas, spaces), *jnp.abs(1 - shares / mean), error]
    residual = jnp.max(jnp.stack(misfits))
    return tuple(deltas), 1 / mean, jnp.where(jnp.isfinite(residual), residual, jnp.inf)

  # If it is of another loss, it is that of no label; but what was found is rounded.
  with_label, without = judge(labelled), judge(sign * delta)
  told = with_label[-1] <= jnp.maximum(_BETTER_WITHOUT * without[-1], tolerance_of(level))
  deltas, scale, residual = jax.tree.map(lambda a, b: jnp.where(told, a, b), with_label, without)
  label, scale = jnp.where(told, label, NO_LABEL), jnp.where(told, scale, jnp.nan)
  rows = links.layers[0].inputs
  spread = size * jnp.sqrt(tilt**2 + spread**2 / rows)
  spread = jnp.hypot(spread, error * rms(inputs[0][:rows], jnp.ones(rows)))
  parts = (tuple(inputs), deltas, tuple(masks), tuple(active), tuple(sure))
  return Sample(*parts, label, scale, residual, spread, fit, level)


def _noise_of(left, weights, solved):
  """Returns the standard deviation of what is left of values after a fit, outliers apart.

  Args:
    left: f64[n].
    weights: f64[n], 1 for those that were fitted, else 0.
    solved: f[], number of unknowns of the fit.
  """
  # The geometric mean, which a few that are far too large hardly change, and which needs no sort.
  count = jnp.sum(weights)
  sizes = jnp.sum(weights * jnp.log(jnp.abs(left) + 1e-300)) / count
  return _OF_SIZES * jnp.exp(sizes) * jnp.sqrt(count / jnp.maximum(count - solved, 1))


def _rows_after(spaces, k, count):
  """Returns f64[count], which inputs of the layer after the k-th its gradient tells."""
  return spaces[k + 1].rows[:count] if k + 1 < len(spaces) else jnp.ones(count)


def _kept_after(spaces, delta, active, rate, rounding):
  """Returns what a sample kept after a layer, and its delta there without rounding elsewhere.

  Args:
    spaces: of the layer and, unless it is the last of them, of the next.
    delta: f64[n].
    active: b[n], entries that are not zero of themselves.
    rate: f[], of dropout; None if there is none.
    rounding: f[], share of the gradient that rounding changed.
  """
  kept = active.astype(delta.dtype)
  if rate is None:
    return kept, kept * delta
  least, most = bounds(jnp.sum(kept), 0.0, rate)
  zeros = split_zeros(delta, kept, jnp.maximum(least, 1), most, rounding)
  zero = zeros.zero & (zeros.gap > LEAST_GAP)
  if len(spaces) == 1:
    return kept * (1 - zero.astype(delta.dtype)), delta
  kept, direction, _ = refine(spaces[0], spaces[1], zero | ~active, ~active, rate, 0.0, rounding)
  return kept, direction * jnp.sum(direction * delta) / jnp.sum(direction**2)


@functools.partial(jax.jit, static_argnames="loss")
def last_delta(
  logits: Float[Array, " classes"],
  delta: Float[Array, " classes"],
  loss: Loss,
  rounding: Number,
) -> tuple[Integer[Array, ""], Float[Array, " classes"]]:
  """Returns the label, and the derivative of the loss by the logits.

  Args:
    logits: f64[num_classes].
    delta: f64[num_classes], the derivative, up to scale.
    loss: of the client.
    rounding: as in `complete`.

  Returns:
    Those of the label that suits `delta` best.
  """
  number = len(logits)
  # Which class it is shows in its direction.
  with usual_promotion():
    slope = jax.grad(lambda z, label: loss(z[None], label[None]))
    candidates = jax.vmap(slope, (None, 0))(logits, jnp.arange(number, dtype=jnp.int32))
  norms = jnp.linalg.norm(candidates, axis=1) + 1e-300
  fits = candidates @ delta / norms / (jnp.linalg.norm(delta) + 1e-300)
  # Of two classes that share the softmax the derivatives differ in sign alone. A gradient that
  # was turned has the other one, but that is rare.
  label = jnp.argmax(jnp.where(fits > 0, fits, -0.9 * fits))
  candidate, own = candidates[label], jnp.eye(number)[label]
  others = 1 - own
  found = delta * jnp.sum(others * candidate * delta) / (jnp.sum(others * delta**2) + 1e-300)
  # Of a class that is all but sure, 1 - softmax is rounded, and the gradient has what came of it.
  room = _UNITS * rounding * jnp.maximum(jnp.abs(candidate), own)
  return label, jnp.clip(found, candidate - room, candidate + room)


def _outside(inputs, deltas, spaces):
  """Yields how far a sample is from the spaces of the gradient, each f[] and relative."""
  for vectors in zip(inputs, deltas, spaces, strict=False):
    space = vectors[2]
    told = (vectors[0] * space.rows, vectors[1] * space.columns)
    for vector, basis in zip(told, (space.left, space.right.T), strict=True):
      coordinates = vector @ basis
      yield jnp.linalg.norm(vector - basis @ coordinates) / jnp.linalg.norm(vector)
