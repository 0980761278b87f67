"""What a gradient tells of the one image of its batch, outside of chains of dense layers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation
from jaxdia.closed_form.chain import last_delta
from jaxdia.closed_form.convolutions import Before, cotangent_before, solve
from jaxdia.closed_form.first_layer import find_first_layer, read_inputs
from jaxdia.closed_form.found import EXACT, Found
from jaxdia.closed_form.kernel_equations import After
from jaxdia.closed_form.patches import Patching, solve_patches
from jaxdia.closed_form.sparse import bounds
from jaxdia.closed_form.structure import Chain
from jaxdia.core.trees import leaves_by_path
from jaxdia.core.types import Gradient
from jaxdia.gradients import layer_gradient
from jaxdia.models import DropoutModel

# An image that leaves more than this of its equations is none.
_MOST_LEFT = 0.1
# An input of a convolution within so many standard deviations was dropped, beyond so many kept. In
# a LeNet those that were dropped were within 4.6, and the others beyond 70.
_ROUNDING = (6.0, 15.0)
# Of so many in between, all answers are tried.
_MOST_UNCLEAR = 2


def use_patches(patching: Patching, gradient: Gradient, found: Found) -> str:
  """Notes the image that patches tell; returns how well, or why not."""
  patches = solve_patches(patching, gradient)
  if patches is None:
    return "there are more patches than outputs of their embedding, or their gradients coincide"
  found.residual[0] = patches.residual
  if not patches.residual < 1:
    return "the gradient is not that of one image"
  found.set_image(0, patches.image.reshape(found.parts.images.shape[1:]), patches.residual)
  if patches.kept is not None and patches.residual <= found.tolerance:
    found.set_mask(patching.site, 0, np.arange(patches.kept.size), patches.kept)
  return f"the patches leave {patches.residual:.1e} of their gradient unexplained"


def use_first_layer(model: DropoutModel, gradient: Gradient, found: Found) -> str:
  """Notes the image that a first dense layer with a bias tells; returns why there is not more."""
  layer = find_first_layer(model.network)
  if layer is None:
    return ""
  read, name = layer.read(leaves_by_path(gradient)), layer.name
  if read is None:  # a frozen layer, or one of which a part was sent
    return ""
  error = np.linalg.norm(read.errors) / max(np.linalg.norm(read.values), 1e-300)
  if not (read.residual < 1 and error < 1):
    return f"the gradient of {name} is not that of one image"
  known, values, site = layer.factors != 0, read.values, layer.source.site
  if site is not None:
    kept = found.kept_features(values, model.rates[site])
    values = values * (1 - model.rates[site])
    if kept is not None:
      known &= kept > 0
      if read.residual <= found.tolerance:
        found.set_mask(site, 0, layer.source.entries, kept)
  pixels, factors = layer.pixels[known], layer.factors[known]
  image, seen = np.zeros((2, found.parts.images[0].size))
  image[pixels] = (values[known] - layer.shifts[known]) / factors
  seen[pixels] = 1
  found.residual[0] = read.residual
  found.error[0] = np.sqrt(np.mean(np.square(read.errors[known] / factors)))
  whole = bool(seen.all()) and (site is None or kept is not None)
  sure = whole and read.checked and error <= found.tolerance
  found.set_image(0, image.reshape(found.parts.images.shape[1:]), read.residual, sure)
  if whole and not read.checked:
    return f"too few outputs of {name} have a gradient to tell whether it is that of one image"
  if seen.all() and not whole:
    return f"which pixels were dropped before {name} does not stand out"
  if not whole:
    return f"of the pixels before {name} {np.mean(seen == 0):.0%} were dropped, and are unknown"
  return f"{name} tells the pixels up to a standard error of {found.error[0]:.1e}"


def use_classifier(
  chain: Chain, observation: Observation, gradient: Gradient, rates: dict[str, float], found: Found
) -> str:
  """Notes the inputs of the last layer, of one image."""
  path = chain.layers[0].path
  layer = layer_gradient(gradient, path)
  if observation.batch_size > 1 or "bias" not in layer:
    return "a single dense layer tells its inputs for one image, and if it has a bias"
  # Unlike in `read_inputs` pruned entries count, as features that are 0 tell of dropout.
  delta = layer["bias"]
  features = layer["kernel"] @ delta / max(delta @ delta, 1e-300)
  left = np.linalg.norm(np.outer(features, delta) - layer["kernel"])
  residual = float(left / max(np.linalg.norm(layer["kernel"]), 1e-300))
  found.residual[0] = residual
  if residual < 1:
    found.set_features(path, 0, features)
  if residual <= found.tolerance and chain.inputs[0].site is not None:
    site = chain.inputs[0].site
    kept = found.kept_features(features, rates[site])
    if kept is not None:
      found.set_mask(site, 0, chain.inputs[0].entries, kept)
  return "the classifier is fed with features, not with pixels"


def scale_by_classifier(
  model: DropoutModel, observation: Observation, gradient: Gradient, tolerance: float
) -> float:
  """Returns by which factor the gradient of one image exceeds that of the loss; NaN if unknown."""
  leaves = {} if model.classifier is None else layer_gradient(gradient, model.classifier)
  if set(leaves) != {"kernel", "bias"}:
    return math.nan
  read = read_inputs(leaves["kernel"].reshape(-1, leaves["bias"].size), leaves["bias"])
  params = layer_gradient(observation.params, model.classifier)
  kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
  logits = read.values @ kernel.reshape(-1, bias.size) + bias
  rounding = float(np.finfo(observation.dtype).eps)
  delta = np.asarray(last_delta(logits, jnp.asarray(leaves["bias"]), observation.loss, rounding)[1])
  scale = delta @ leaves["bias"] / (delta @ delta)
  misfit = np.linalg.norm(scale * delta - leaves["bias"]) / np.linalg.norm(leaves["bias"])
  return float(scale) if max(read.residual, misfit) <= tolerance else math.nan


def use_convolutions(
  model: DropoutModel,
  chain: Chain,
  convolutions: Chain,
  observation: Observation,
  gradient: Gradient,
  found: Found,
) -> str:
  """Goes on from the inputs of the first dense layer; returns why there is not more, or nothing."""
  after = chain.layers[0]
  if not (found.parts.known_features[after.path][0] and found.residual[0] <= found.tolerance):
    return ""
  rates = model.rates
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), observation.params)
  values = found.parts.features[after.path][0]
  # The gradient of the kernel is the outer product of values and delta.
  delta = values @ layer_gradient(gradient, after.path)["kernel"] / (values @ values)
  cotangent = layer_gradient(params, after.path)["kernel"] @ delta
  source = chain.inputs[0]
  choices = [np.ones(values.size)]
  if source.site is not None:
    kept = found.kept_features(values, rates[source.site])
    choices = [] if kept is None else [kept]
  for layer, earlier in zip(
    reversed(convolutions.layers), reversed(convolutions.inputs), strict=True
  ):
    name = "/".join(layer.path)
    if not choices:
      return f"what was dropped after {name} does not stand out"
    last = layer is convolutions.layers[0]
    pixels = last and convolutions.pixels is not None and earlier.site is None
    of_image = convolutions.pixels[0] if pixels and convolutions.pixels is not None else None
    tried = [After(kept * values, kept, cotangent) for kept in choices]
    found_with = [solve(model, layer, after, params, gradient, known, of_image) for known in tried]
    residuals = np.sort([before.residual for before in found_with])
    before, known = min(zip(found_with, tried, strict=True), key=lambda pair: pair[0].residual)
    if len(tried) > 1 and residuals[0] < residuals[1] / 3:
      found.set_mask(source.site, 0, source.entries, known.kept)
    sure = before.error <= EXACT
    if pixels and convolutions.pixels is not None and before.residual <= _MOST_LEFT:
      image = np.zeros(before.inputs.size)
      image[convolutions.pixels[0]] = before.inputs
      image = image.reshape(found.parts.images.shape[1:])
      residual = before.error if sure else before.residual
      found.residual[0] = max(found.residual[0], residual)
      found.set_image(0, image, residual, sure)
    if not sure:
      found_to = f"to {before.error:.1e}" if np.isfinite(before.error) else "in part"
      return (
        f"{before.equations:,} equations determine the {before.inputs.size:,} inputs of {name}"
        f" {found_to} (residual {before.residual:.1e})"
      )
    values = before.inputs
    found.set_features(layer.path, 0, values)
    cotangent = np.asarray(cotangent_before(model, layer, after, params, known, values))
    after, source = layer, earlier
    choices = [np.ones(values.size)]
    if source.site is not None:
      choices = _kept_inputs(before, rates[source.site])
    if choices and source.entries is not None:
      agreed = np.all(np.stack(choices) == choices[0], axis=0)
      found.set_mask(source.site, 0, np.where(agreed, source.entries, -1), choices[0])
  return "the first of the convolutions is not fed with pixels" if not pixels else ""


def _kept_inputs(before: Before, rate) -> list[np.ndarray]:
  """Returns which inputs of a convolution may have been kept: one answer, a few, or none."""
  sizes = np.abs(before.inputs) / before.spread
  least, most = bounds(float(sizes.size), 0.0, rate)
  unclear = np.flatnonzero((sizes > _ROUNDING[0]) & (sizes < _ROUNDING[1]))
  kept = sizes > _ROUNDING[0]
  if not least <= float(np.sum(~kept)) <= most or unclear.size > _MOST_UNCLEAR:
    return []
  answers = []
  for values in itertools.product((1.0, 0.0), repeat=unclear.size):
    answer = kept.astype(float)
    answer[unclear] = values
    answers.append(answer)
  return answers
