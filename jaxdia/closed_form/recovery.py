"""What a gradient gives away without a search, for any network whose structure allows it."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation
from jaxdia.closed_form import batch as batches
from jaxdia.closed_form.chain import last_delta
from jaxdia.closed_form.convolutions import Before, cotangent_before, solve
from jaxdia.closed_form.first_layer import find_first_layer, read_inputs
from jaxdia.closed_form.first_step import place_in_steps
from jaxdia.closed_form.found import EXACT, OF_ROUNDING, Found
from jaxdia.closed_form.kernel_equations import After
from jaxdia.closed_form.labels import check_sign
from jaxdia.closed_form.parts import NO_LABEL, Recovery, Verdict
from jaxdia.closed_form.patches import find_patching, solve_patches
from jaxdia.closed_form.sparse import LEAST_GAP, bounds, split_zeros
from jaxdia.closed_form.structure import Chain, find_chain, find_convolutions, mixes_images
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.trees import Path, leaves_by_path
from jaxdia.core.types import Key
from jaxdia.gradients import find_rounding, layer_gradient
from jaxdia.models import DropoutModel

# A gradient with so much outside the rank of its batch is not the sum of that many samples.
_MOST_NOISE = 0.1
# An input of a convolution within so many standard deviations was dropped, beyond so many kept. In
# a LeNet those that were dropped were within 4.6, and the others beyond 70.
_ROUNDING = (6.0, 15.0)
# Of so many in between, all answers are tried.
_MOST_UNCLEAR = 2


def recover(
  key: Key, model: DropoutModel, observation: Observation, rounding: float = 0.0
) -> Recovery:
  """Recovers what linear algebra can from one client's gradient.

  Structures are looked for by calling the network: dense layers up to the logits with
  elementwise functions and dropout between them, whose inputs, be they pixels or features,
  are told by the zeros that dropout left (`chain.py`, `sparse.py`); and, for a single image,
  the convolutions before such layers (`convolutions.py`), patches with a position embedding
  (`patches.py`), and a first dense layer with a bias, whatever comes after it
  (`first_layer.py`). Computed in float64, whatever the type of the gradient.

  Args:
    key: random key, of the starts of the search for sparse factors.
    model: the network.
    observation: of one client, with concrete values.
    rounding: share of the gradient that is known to be rounding, as `updates` says it of weights.
      Values that all fit into half precision are seen without it. Beyond `MOST_ROUNDING` no image
      is called exact; what fits up to this rounding is approximate, with its error.

  Returns:
    What was recovered, of the gradient's type, on the host. Labels that are neither granted nor
    can be read (see `recover_labels`) are NO_LABEL, and not among the known ones. Of several local
    steps, see `place_in_steps`.

  Raises:
    InputError: the gradient has the opposite sign; see `check_sign`.
  """
  check_sign(model, observation)
  with jax.enable_x64(True):
    if observation.local is None:
      return _recover(key, model, observation, rounding)
    as_gradient = dataclasses.replace(observation, local=None)
    found = _recover(key, model, as_gradient, rounding)
    return place_in_steps(model, observation, found)


def _recover(key, model, observation, rounding) -> Recovery:
  size = observation.batch_size
  gradient = jax.tree.map(lambda x: np.asarray(x, np.float64), observation.gradient)
  rounding = max(rounding, find_rounding(gradient).level)
  found = Found(model, observation, rounding)
  try:
    chain = find_chain(model.network)
  except InputError as error:
    return found.recovery(first_line(error))
  if chain is not None and chain.pixels is None:
    # Of every client, so that all results have the same form.
    convolutions = find_convolutions(model.network, chain.layers[0]) if size == 1 else None
    for layer in (*chain.layers, *(convolutions.layers if convolutions else ())):
      found.declare_features(layer)
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
    return found.recovery("the gradient has NaN or infinite entries")
  frozen = _frozen(chain, observation.params, gradient)
  reason = _why_no_chain(model)
  if frozen:
    reason = f"the layer {'/'.join(frozen[0])} is frozen: no gradient of it was sent, or a part"
  elif chain is not None:
    reason = _use_chain(key, model, chain, observation, gradient, found)
    if size == 1 and chain.pixels is None and convolutions is not None:
      known = (model, chain, convolutions)
      reason = _use_convolutions(*known, observation, gradient, found) or reason
  if chain is None or frozen or chain.pixels is None:
    patching = find_patching(model.network)
    if patching is not None and size == 1:
      reason = _use_patches(patching, gradient, found)
    elif patching is not None:
      reason = "patches of a batch of more than one image are summed over the images"
  if size == 1 and found.parts.verdict[0] != Verdict.EXACT:
    reason = _use_first_layer(model, gradient, found) or reason
  if size == 1 and np.isnan(found.scale):
    found.scale = _scale_by_classifier(model, observation, gradient, found.tolerance)
  if (found.parts.verdict != Verdict.EXACT).any() and mixes_images(model.network):
    reason = f"the images of a batch are normalised together (BatchNorm); {reason}"
  return found.recovery(reason)


def _frozen(chain: Chain | None, params, gradient) -> list[Path]:
  """Returns the paths of layers of a chain of whose gradient something is needed and missing."""
  if chain is None:
    return []
  # Of three layers or more the last is passed by its weights alone.
  needed = chain.layers if len(chain.layers) < 3 else chain.layers[:-1]
  return [
    layer.path
    for layer in needed
    if set(layer_gradient(gradient, layer.path)) != set(layer_gradient(params, layer.path))
  ]


def _why_no_chain(model: DropoutModel) -> str:
  if not model.dense(1):
    return "no plain dense layers are known of the network, and it has no patch embedding"
  return (
    "the logits are not the outputs of a plain dense layer as they are (something follows it, or it"
    " is of a kind that is not seen), and there is no patch embedding"
  )


def _use_patches(patching, gradient, found) -> str:
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


def _use_first_layer(model, gradient, found) -> str:
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
    kept = _kept_features(values, model.rates[site], found)
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


def _use_chain(key, model, chain: Chain, observation, gradient, found) -> str:
  """Notes what the dense layers tell; returns why there is not more."""
  size = observation.batch_size
  rates = model.rates
  if len(chain.layers) == 1:
    return _use_classifier(chain, observation, gradient, rates, found)
  if size > 1 and chain.inputs[1].site is None and not chain.links[0].silent:
    return (
      "without dropout or a ReLU after its first dense layer, the samples of a batch cannot be told"
      " apart"
    )
  narrowest = min(
    min(layer.inputs, layer.outputs) for layer in chain.layers[: max(2, len(chain.layers) - 1)]
  )
  if size > 1 and size >= narrowest:
    return f"a layer of width {narrowest} cannot hold {size} samples apart"
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), observation.params)
  # No more than the tolerance allows for.
  rounding = min(found.rounding, found.tolerance / OF_ROUNDING)
  rounding = max(rounding, float(np.finfo(observation.dtype).eps))
  result = batches.solve(
    key, model, chain, params, gradient, size, _MOST_NOISE, observation.loss, rounding
  )
  samples = result.samples
  count = 0 if samples is None else len(samples.label)
  if samples is not None and np.min(samples.residual) <= found.tolerance:
    told = samples.scale[(samples.residual <= found.tolerance) & np.isfinite(samples.scale)]
    found.scale = float(np.median(told)) if told.size else math.nan
  for i in range(count):
    assert samples is not None  # they are counted
    inputs, residual = samples.inputs[0][i], samples.residual[i]
    features = inputs[: chain.layers[0].inputs]
    _note_inputs(chain, found, i, features, residual)
    if not residual <= found.tolerance:
      continue
    if samples.label[i] != NO_LABEL:
      found.set_label(i, int(samples.label[i]))
    else:
      found.note = (
        "the labels are not told: the derivative by the logits is not that of the loss"
        f" {observation.loss.name} for any of them"
      )
    for k, kept in enumerate(samples.kept):
      source = chain.inputs[k + 1]
      if source.entries is not None:
        entries = np.where(samples.active[k][i], source.entries, -1)
        found.set_mask(source.site, i, entries, kept[i])
      if chain.pixels is None:
        path = chain.layers[k + 1].path
        found.set_features(path, i, samples.inputs[k + 1][i][: chain.layers[k + 1].inputs])
    if chain.inputs[0].site is not None:
      kept = _kept_features(features, rates[chain.inputs[0].site], found)
      if kept is not None:
        found.set_mask(chain.inputs[0].site, i, chain.inputs[0].entries, kept)
  if result.copies is not None and result.copies.residual <= found.tolerance:
    inputs, residual, number = result.copies
    for i in range(count, min(count + number, size)):
      _note_inputs(chain, found, i, inputs[: chain.layers[0].inputs], residual)
    found.note = f"{number} of the images coincide; their masks and labels are not told"
  elif count < size and result.rank < size:
    return (
      f"the gradient of a layer has rank {result.rank}, of a batch of {size}: some of its images"
      " coincide or are blank, and cannot be told apart, or the batch was smaller"
    )
  if result.noise > _MOST_NOISE:
    return f"the gradient is not that of {size} image(s): {result.noise:.1e} of it lies outside"
  if count < size:
    return (
      f"{size - count} of {size} samples were not found: there are too few zeros to tell them"
      f" apart, or the gradient is not that of the loss {observation.loss.name} of such a batch"
    )
  if chain.pixels is None:
    return "the first of the dense layers is fed with features, not with pixels"
  return "some images leave more of the gradient unexplained than rounding does"


def _note_inputs(chain, found, number, features, residual) -> None:
  """Notes the inputs of the first layer of a chain."""
  found.residual[number] = residual
  if chain.pixels is None:
    found.set_features(chain.layers[0].path, number, features)
    return
  image = np.zeros(features.size)
  image[chain.pixels[0]] = features
  found.set_image(number, image.reshape(found.parts.images.shape[1:]), residual)


def _use_classifier(chain, observation, gradient, rates, found) -> str:
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
    kept = _kept_features(features, rates[site], found)
    if kept is not None:
      found.set_mask(site, 0, chain.inputs[0].entries, kept)
  return "the classifier is fed with features, not with pixels"


def _scale_by_classifier(model, observation, gradient, tolerance) -> float:
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


def _use_convolutions(
  model, chain: Chain, convolutions: Chain, observation, gradient, found
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
    kept = _kept_features(values, rates[source.site], found)
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
    if pixels and convolutions.pixels is not None and before.residual <= _MOST_NOISE:
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


def _kept_features(features, rate, found):
  """Returns which inputs of a layer were kept, if those that were dropped stand out."""
  least, most = bounds(features.size, 1.0, rate)
  zeros = split_zeros(features, np.ones(features.size), least, most, found.rounding)
  return 1.0 - np.asarray(zeros.zero) if zeros.gap > LEAST_GAP else None
