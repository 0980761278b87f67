"""What a gradient tells of the one image of its batch, outside of chains of dense layers."""

import math

import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation
from jaxdia.closed_form.chain import last_delta
from jaxdia.closed_form.first_layer import find_first_layer, read_inputs
from jaxdia.closed_form.found import Found
from jaxdia.closed_form.last_layer import find_last_layer
from jaxdia.closed_form.patches import Patching, solve_patches
from jaxdia.closed_form.structure import LayerChain
from jaxdia.core.trees import leaves_by_path
from jaxdia.core.types import Gradient
from jaxdia.gradients import layer_gradient
from jaxdia.models import DropoutModel


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
  chain: LayerChain,
  observation: Observation,
  gradient: Gradient,
  rates: dict[str, float],
  found: Found,
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
  last, num_classes = find_last_layer(model.network), model.num_classes
  leaves = {} if last is None else last.read(gradient, num_classes)
  if last is None or set(leaves) != {"kernel", "bias"}:
    return math.nan
  read = read_inputs(leaves["kernel"], leaves["bias"])
  params = last.read(observation.params, num_classes)
  kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
  logits = read.values @ kernel + bias
  rounding = float(np.finfo(observation.dtype).eps)
  delta = np.asarray(last_delta(logits, jnp.asarray(leaves["bias"]), observation.loss, rounding)[1])
  scale = delta @ leaves["bias"] / (delta @ delta)
  misfit = np.linalg.norm(scale * delta - leaves["bias"]) / np.linalg.norm(leaves["bias"])
  return float(scale) if max(read.residual, misfit) <= tolerance else math.nan
