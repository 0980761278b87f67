"""What a gradient gives away without a search, for any network whose structure allows it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import rel_entr

from jaxdia.client import Observation
from jaxdia.closed_form import batch as batches
from jaxdia.closed_form.backwards import use_convolutions
from jaxdia.closed_form.first_step import place_in_steps
from jaxdia.closed_form.found import Found
from jaxdia.closed_form.labels import check_sign
from jaxdia.closed_form.parts import NO_LABEL, Recovery, Verdict
from jaxdia.closed_form.patch_batches import use_patch_batch
from jaxdia.closed_form.patches import find_patching
from jaxdia.closed_form.single import (
  scale_by_classifier,
  use_classifier,
  use_first_layer,
  use_patches,
)
from jaxdia.closed_form.sparse import MOST_ROUNDING
from jaxdia.closed_form.structure import LayerChain, find_chain, find_convolutions, mixes_images
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.transfers import with_transfers
from jaxdia.core.trees import Path
from jaxdia.core.types import Key, check_key
from jaxdia.gradients import find_rounding, layer_gradient
from jaxdia.models import DropoutModel

# A gradient with so much outside the rank of its batch is not the sum of that many samples.
_MOST_NOISE = 0.1
# Masks of a probability below e^-20 are not those of their rate, by Chernoff's bound.
_MOST_SURPRISE = 20


@with_transfers
def recover(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  rounding: float = 0.0,
  noise: float | None = None,
) -> Recovery:
  """Recovers what linear algebra can from one client's gradient.

  Structures are looked for by calling the network: dense layers up to the logits with
  elementwise functions and dropout between them, whose inputs, be they pixels or features,
  are told by the zeros that dropout left (`chain.py`, `sparse.py`); the convolutions before such
  layers (`convolutions.py`); and, for a single image, patches with a position embedding
  (`patches.py`), and a first dense layer with a bias, whatever comes after it
  (`first_layer.py`). Computed in float64, whatever the type of the gradient.

  Args:
    key: random key, of the starts of the search for sparse factors.
    model: the network.
    observation: of one client, with concrete values.
    rounding: share of the gradient that is known to be rounding, as `updates` says it of weights.
      Values that all fit into half precision are seen without it. Beyond `MOST_ROUNDING` no image
      is called exact; what fits up to this rounding is approximate, with its error.
    noise: standard deviation of noise on every entry of the gradient, if it is known; where None,
      it is estimated from what lies outside of the rank of the batch (`noise.py`). It counts as
      rounding of the same share.

  Returns:
    What was recovered, of the gradient's type, on the host. Labels that are neither granted nor
    can be read (see `recover_labels`) are NO_LABEL, and not among the known ones. Of several local
    steps, see `place_in_steps`.

  Raises:
    InputError: the gradient has the opposite sign, or is of another model; see `check_sign`. Or the
      key is none.
  """
  check_key(key)
  check_sign(model, observation)
  with jax.enable_x64(True):
    if observation.local is None:
      return _recover(key, model, observation, rounding, noise)
    as_gradient = dataclasses.replace(observation, local=None)
    found = _recover(key, model, as_gradient, rounding, noise)
    return place_in_steps(model, observation, found)


def _recover(key, model, observation, rounding, noise) -> Recovery:
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
    convolutions = find_convolutions(model.network, chain.layers[0])
    for layer in (*chain.layers, *(convolutions.layers if convolutions else ())):
      found.declare_features(layer)
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
    return found.recovery("the gradient has NaN or infinite entries")
  frozen = _frozen(chain, observation.params, gradient)
  reason = _why_no_chain(model)
  if frozen:
    reason = f"the layer {'/'.join(frozen[0])} is frozen: no gradient of it was sent, or a part"
  elif chain is not None:
    reason = _use_chain(key, model, chain, observation, gradient, found, noise)
    if chain.pixels is None and convolutions is not None:
      known = (model, chain, convolutions)
      reason = use_convolutions(*known, observation, gradient, found) or reason
  if chain is None or frozen or chain.pixels is None:
    patching = find_patching(model.network)
    if patching is not None and size == 1:
      reason = use_patches(patching, gradient, found)
    elif patching is not None:
      reason = use_patch_batch(model, patching, observation, gradient, found)
  if size == 1 and found.parts.verdict[0] != Verdict.EXACT:
    reason = use_first_layer(model, gradient, found) or reason
  if size == 1 and np.isnan(found.scale):
    found.scale = scale_by_classifier(model, observation, gradient, found.tolerance)
  reason = _doubt_masks(chain, model.rates, found) or reason
  if (found.parts.verdict != Verdict.EXACT).any() and mixes_images(model.network):
    reason = f"the images of a batch are normalised together (BatchNorm); {reason}"
  return found.recovery(reason)


def _doubt_masks(chain: LayerChain | None, rates: dict[str, float], found: Found) -> str:
  """Takes back masks that cannot be those of their rate; returns why, if images go with them.

  Twice the image behind masks of half the size has the same gradient, if twice the inputs of a
  network are twice its logits. So the masks alone tell the size of its image: there a client in
  evaluation mode, or of another rate, would give an image that is as surely wrong.
  """
  for site, known in found.parts.known_masks.items():
    if not known.any():
      continue
    count, rate = int(np.sum(known)), float(rates[site])
    kept = float(np.mean(found.parts.masks[site][known]))
    if count * (rel_entr(kept, 1 - rate) + rel_entr(1 - kept, rate)) <= _MOST_SURPRISE:
      continue
    found.forget_mask(site, 1 - rate)
    found.note = (
      f"of the {count} known entries of the mask {site} {kept:.0%} are kept, which dropout of rate"
      f" {rate:g} does not do by chance: the client computed in evaluation mode, or at another rate"
    )
    if chain is not None and chain.homogeneous:
      found.doubt_scale()
      found.note += ", and images are known up to a factor"
      return found.note
  return ""


def _frozen(chain: LayerChain | None, params, gradient) -> list[Path]:
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


def _use_chain(key, model, chain: LayerChain, observation, gradient, found, noise) -> str:
  """Notes what the dense layers tell; returns why there is not more."""
  size = observation.batch_size
  rates = model.rates
  if len(chain.layers) == 1:
    return use_classifier(chain, observation, gradient, rates, found)
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
  rounding = max(found.rounding, float(np.finfo(observation.dtype).eps))
  result = batches.solve(
    key, model, chain, params, gradient, size, _MOST_NOISE, observation.loss, rounding, noise
  )
  found.set_rounding(result.level)
  found.pruned = result.pruned
  samples = result.samples
  count = 0 if samples is None else len(samples.label)
  if samples is not None and np.min(samples.residual) <= found.tolerance:
    told = samples.scale[(samples.residual <= found.tolerance) & np.isfinite(samples.scale)]
    found.scale = float(np.median(told)) if told.size else math.nan
  for i in range(count):
    assert samples is not None  # they are counted
    inputs, residual = samples.inputs[0][i], samples.residual[i]
    features = inputs[: chain.layers[0].inputs]
    if (found.pruned or found.rounding > MOST_ROUNDING) and residual <= found.tolerance:
      found.error[i] = samples.error[i]
    _note_inputs(chain, found, i, features, residual, bool(np.all(result.told)))
    if not residual <= found.tolerance:
      continue
    if samples.label[i] != NO_LABEL:
      found.set_label(i, int(samples.label[i]))
    elif not found.pruned:
      found.note = (
        "the labels are not told: the derivative by the logits is not that of the loss"
        f" {observation.loss.name} for any of them"
      )
    for k, kept in enumerate(samples.kept):
      source = chain.inputs[k + 1]
      if source.entries is not None:
        entries = np.where(samples.active[k][i], source.entries, -1)
        found.set_mask(source.site, i, entries, kept[i], samples.sure[k][i])
      if chain.pixels is None:
        path = chain.layers[k + 1].path
        found.set_features(path, i, samples.inputs[k + 1][i][: chain.layers[k + 1].inputs])
    if chain.inputs[0].site is not None:
      kept = found.kept_features(features, rates[chain.inputs[0].site])
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
  if found.pruned:
    return (
      f"a part of the gradient was not sent; {np.mean(result.told):.0%} of the inputs of its first"
      " layer are told by what was"
    )
  if chain.pixels is None:
    return "the first of the dense layers is fed with features, not with pixels"
  return "some images leave more of the gradient unexplained than rounding does"


def _note_inputs(chain, found, number, features, residual, determined=True) -> None:
  """Notes the inputs of the first layer of a chain."""
  found.residual[number] = residual
  if chain.pixels is None:
    found.set_features(chain.layers[0].path, number, features)
    return
  image = np.zeros(features.size)
  image[chain.pixels[0]] = features
  found.set_image(number, image.reshape(found.parts.images.shape[1:]), residual, determined)
