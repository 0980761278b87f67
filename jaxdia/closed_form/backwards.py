"""What the gradients of convolutions tell, given the inputs of the dense layer behind them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation
from jaxdia.closed_form.convolutions import Before, cotangent_before, solve
from jaxdia.closed_form.found import EXACT, Found
from jaxdia.closed_form.kernel_equations import After
from jaxdia.closed_form.sparse import bounds
from jaxdia.closed_form.structure import LayerChain
from jaxdia.core.types import Gradient
from jaxdia.gradients import layer_gradient
from jaxdia.models import DropoutModel

# Images that leave more than this of their equations are none.
_MOST_LEFT = 0.1
# An input of a convolution within so many standard deviations was dropped, beyond so many kept. In
# a LeNet those that were dropped were within 4.6, and the others beyond 70.
_ROUNDING = (6.0, 15.0)
# Of so many in between, all answers are tried.
_MOST_UNCLEAR = 2


def use_convolutions(
  model: DropoutModel,
  chain: LayerChain,
  convolutions: LayerChain,
  observation: Observation,
  gradient: Gradient,
  found: Found,
) -> str:
  """Goes on from the inputs of the first dense layer, which must be known of all images.

  Args:
    model: the network.
    chain: its dense layers.
    convolutions: before them.
    observation: of the client.
    gradient: of it, f64.
    found: where images, features and masks are noted.

  Returns:
    Why there is not more, or nothing.
  """
  after = chain.layers[0]
  if not (found.parts.known_features[after.path] & (found.residual <= found.tolerance)).all():
    return ""
  rates = model.rates
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), observation.params)
  values = found.parts.features[after.path]
  # The gradient of the kernel is the sum of the outer products of values and deltas.
  delta = np.linalg.lstsq(values.T, layer_gradient(gradient, after.path)["kernel"], rcond=None)[0]
  cotangent = delta @ layer_gradient(params, after.path)["kernel"].T
  source = chain.inputs[0]
  choices = [np.ones(values.shape)]
  if source.site is not None:
    rows = [found.kept_features(row, rates[source.site]) for row in values]
    stood_out = [row for row in rows if row is not None]
    choices = [np.stack(stood_out)] if len(stood_out) == len(rows) else []
  pixels = None
  for layer, earlier in zip(
    reversed(convolutions.layers), reversed(convolutions.inputs), strict=True
  ):
    name = "/".join(layer.path)
    if not choices:
      return f"what was dropped after {name} does not stand out"
    if layer is convolutions.layers[0] and convolutions.pixels is not None and earlier.site is None:
      pixels = convolutions.pixels[0]
    tried = [After(kept * values, kept, cotangent) for kept in choices]
    found_with = [solve(model, layer, after, params, gradient, known, pixels) for known in tried]
    residuals = np.sort([before.residual for before in found_with])
    before, known = min(zip(found_with, tried, strict=True), key=lambda pair: pair[0].residual)
    if len(tried) > 1 and residuals[0] < residuals[1] / 3:
      _note_masks(found, source, known.kept)
    sure = before.error <= EXACT
    if pixels is not None and before.residual <= _MOST_LEFT:
      for number, inputs in enumerate(before.inputs):
        image = np.zeros(inputs.size)
        image[pixels] = inputs
        image = image.reshape(found.parts.images.shape[1:])
        residual = before.error if sure else before.residual
        found.residual[number] = max(found.residual[number], residual)
        found.set_image(number, image, residual, sure)
    if not sure:
      return _why_unsure(before, name)
    values = before.inputs
    for number, inputs in enumerate(values):
      found.set_features(layer.path, number, inputs)
    cotangent = np.asarray(cotangent_before(model, layer, after, params, known, values))
    after, source = layer, earlier
    choices = [np.ones(values.shape)]
    if source.site is not None:
      choices = _kept_inputs(before, rates[source.site])
    if choices:
      agreed = np.all(np.stack(choices) == choices[0], axis=0)
      _note_masks(found, source, choices[0], agreed)
  return "the first of the convolutions is not fed with pixels" if pixels is None else ""


def _why_unsure(before: Before, name: str) -> str:
  if before.equations < before.inputs.size and not np.isfinite(before.residual):
    return (
      f"{before.equations:,} equations are too few for the {before.inputs.size:,} inputs of {name}"
    )
  found_to = f"to {before.error:.1e}" if np.isfinite(before.error) else "in part"
  return (
    f"{before.equations:,} equations determine the {before.inputs.size:,} inputs of {name}"
    f" {found_to} (residual {before.residual:.1e})"
  )


def _note_masks(found: Found, source, kept: np.ndarray, known: np.ndarray | bool = True) -> None:
  """Notes what all images kept, where it is known."""
  if source.entries is None:
    return
  for number, (one, told) in enumerate(zip(kept, np.broadcast_to(known, kept.shape), strict=True)):
    found.set_mask(source.site, number, source.entries, one, told)


def _kept_inputs(before: Before, rate) -> list[np.ndarray]:
  """Returns which inputs of a convolution may have been kept: one answer, a few, or none."""
  sizes = np.abs(before.inputs) / before.spread
  unclear = np.flatnonzero((sizes > _ROUNDING[0]) & (sizes < _ROUNDING[1]))
  kept = sizes > _ROUNDING[0]
  least, most = map(float, bounds(float(sizes.shape[1]), 0.0, rate))
  dropped = np.sum(~kept, axis=1)
  if np.any((dropped < least) | (dropped > most)) or unclear.size > _MOST_UNCLEAR:
    return []
  answers = []
  for values in itertools.product((1.0, 0.0), repeat=unclear.size):
    answer = kept.astype(float)
    answer.flat[unclear] = values
    answers.append(answer)
  return answers
