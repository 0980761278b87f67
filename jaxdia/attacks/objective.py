"""The objective that the search minimises."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdia.attacks.protocol import Candidate, Known
from jaxdia.attacks.settings import AttackSettings
from jaxdia.client import LocalUpdate, Observation, defences
from jaxdia.closed_form import Parts
from jaxdia.core.types import Images, Labels, Masks, Scalar
from jaxdia.gradients import DISTANCES, Method, Prepared, compare, prepare, suits
from jaxdia.models import DropoutModel, averages_after


class Terms(NamedTuple):
  """The unweighted terms of the objective, each f[]."""

  distance: Scalar
  total_variation: Scalar
  mask_prior: Scalar
  feature_distance: Scalar
  average_distance: Scalar


def total_variation(images: Images) -> Scalar:
  """Returns the anisotropic total variation: mean |dx| + mean |dy|.

  Args:
    images: f[B, H, W, C].

  Returns:
    f[]; a direction in which an image is one pixel wide adds 0.
  """
  terms = [jnp.abs(jnp.diff(images, axis=axis)) for axis in (1, 2)]
  zero = jnp.zeros((), images.dtype)
  return sum((jnp.mean(term) if term.size else zero for term in terms), zero)


def mask_prior(model: DropoutModel, masks: Masks) -> Scalar:
  """Returns how far the share of dropped entries is from the rate, summed over sites.

  It is Σ |(1 - mean(m)) - rate|, the regulariser of DIA (Scheliga et al. 2023,
  eq. 3).

  Args:
    model: whose sites give the rates.
    masks: {site: f[shape]}.

  Returns:
    f[], at least 0.
  """

  def deviation(mask, rate):
    # Counted in entries, a mask of zeros and ones that meets the rate gives exactly 0; there
    # the derivative is 0, as it is in PyTorch, where jnp.abs would give 1.
    kept = mask.size * (1 - rate)
    whole = jnp.round(kept)  # a rate that is an array is rounded, and so may be a whole number
    close = jnp.abs(kept - whole) <= 2 * jnp.finfo(mask.dtype).eps * mask.size
    excess = jnp.where(close, whole, kept) - jnp.sum(mask)
    return excess * jax.lax.stop_gradient(jnp.sign(excess)) / mask.size

  deviations = (deviation(masks[site.name], site.rate) for site in model.sites)
  return sum(deviations, jnp.asarray(0.0))  # of no type of its own


def _mask_prior(model: DropoutModel, local: LocalUpdate | None, masks: Masks | None) -> Scalar:
  """Returns the prior of masks, its mean over local steps; 0 if none are searched."""
  if not masks:
    return jnp.asarray(0.0)
  if local is None:
    return mask_prior(model, masks)
  return jnp.mean(jax.vmap(lambda of_step: mask_prior(model, of_step))(masks))


def feature_distance(
  model: DropoutModel, observation: Observation | Prepared, candidate: Candidate, parts: Parts
) -> Scalar:
  """Returns how far the inputs of layers are from those that were recovered.

  Args:
    model: the network.
    observation: gives the parameters.
    candidate: with images and masks.
    parts: with the features.

  Returns:
    f[], the mean over the recovered features of |a - f|² / |f|².
  """
  layers = (*model.dense(observation.batch_size), *model.convolutions)
  layers = [x for x in layers if x.path in parts.features]
  dtype = candidate.images.dtype
  # Recovered are the features of layers with a row an image, in one call.
  taps = {x.path: (jnp.zeros((observation.batch_size, x.outputs), dtype),) for x in layers}
  _, inputs = model.apply_tapped(observation.params, candidate.masks, candidate.images, taps)
  total, count = jnp.zeros((), dtype), jnp.zeros((), dtype)
  for path, features in parts.features.items():
    known = parts.known_features[path]
    difference = jnp.sum((inputs[path][0] - features) ** 2, axis=1)
    size = jnp.sum(features**2, axis=1)
    total += jnp.sum(jnp.where(known, difference / jnp.where(known, size, 1), 0))
    count += jnp.sum(known)
  return total / jnp.maximum(count, 1)


def average_distance(
  model: DropoutModel, observation: Observation | Prepared, masks: Masks | None, images: Images
) -> Scalar:
  """Returns how far the running averages after a step are from those that the client sent.

  Args:
    model: the network.
    observation: gives the parameters, and the averages before and after the step.
    masks: of the step.
    images: f[B, H, W, C], normalised.

  Returns:
    f[], the mean over the arrays of |a - a'|² / |a - b|², b being the averages before the step, so
    that the momentum of the averages has no part in it. Arrays that did not change are left out.
  """
  assert observation.averages is not None  # checked at the start of the search
  before = {name: pair.before for name, pair in observation.averages.items()}
  found = averages_after(model, observation.params, masks, images, before)
  total, count = jnp.zeros((), images.dtype), jnp.zeros((), images.dtype)
  for name, pair in observation.averages.items():
    size = jnp.sum((pair.after - pair.before) ** 2)
    off = jnp.sum((pair.after - found[name].astype(images.dtype)) ** 2)
    total += jnp.where(size > 0, off / jnp.where(size > 0, size, 1), 0)
    count += size > 0
  return total / jnp.maximum(count, 1)


def complete(candidate: Candidate, known: Known) -> tuple[Masks | None, Labels]:
  """Returns the masks and labels under which a candidate's gradient is taken.

  Args:
    candidate: the searched parts.
    known: the fixed parts.

  Returns:
    Masks, None where they are neither, which is the evaluation mode; and labels, or their
    probabilities.
  """
  masks = candidate.masks if candidate.masks is not None else known.masks
  labels = known.labels if candidate.labels is None else jax.nn.softmax(candidate.labels)
  assert labels is not None  # an attack holds fixed what it does not search
  return masks, labels


def prepare_for(
  model: DropoutModel,
  settings: AttackSettings,
  observation: Observation,
  method: Method = "auto",
  compress: bool = True,
) -> Prepared:
  """Prepares an observation as an attack compares it.

  Args:
    model: the network.
    settings: of the attack, of which distance and defence have a part in it.
    observation: of one client.
    method: see `jaxdia.gradients.choose_layers`.
    compress: see `jaxdia.gradients.prepare`.
  """
  if settings.defence == "ignored":
    observation = dataclasses.replace(observation, defence=defences.identity)
  return prepare(model, observation, suits(settings.distance, method), compress)


def objective(
  model: DropoutModel,
  settings: AttackSettings,
  observation: Observation | Prepared,
  candidate: Candidate,
  known: Known,
) -> tuple[Scalar, Terms]:
  """Returns the objective of a candidate: distance and weighted priors.

  Args:
    model: the network.
    settings: the distance and the weights, which may be traced.
    observation: gives the parameters and the client's gradient; one that is not prepared is
      compared with without thin factors, which need concrete values.
    candidate: the searched parts.
    known: the fixed parts.

  Returns:
    f[], and its unweighted terms. The mask prior counts only where masks are
    searched, the features only where some were recovered.
  """
  if not isinstance(observation, Prepared):
    observation = prepare_for(model, settings, observation, compress=False)
  masks, labels = complete(candidate, known)
  given = (model, observation.params, observation.target)
  batch = (masks, candidate.images, labels)
  facts = (observation.loss, observation.local, observation.defence)
  comparison = compare(*given, *batch, *facts)
  zero = jnp.zeros((), candidate.images.dtype)
  parts = known.parts
  weight = settings.feature_weight if parts is not None and parts.features else None
  terms = Terms(
    distance=DISTANCES[settings.distance](comparison),
    total_variation=total_variation(candidate.images),
    mask_prior=_mask_prior(model, observation.local, candidate.masks),
    feature_distance=feature_distance(model, observation, candidate, parts)
    if weight is not None
    else zero,
    average_distance=average_distance(model, observation, masks, candidate.images)
    if settings.average_weight is not None
    else zero,
  )
  value = (
    terms.distance
    + settings.tv_weight * terms.total_variation
    + settings.mask_weight * terms.mask_prior
  )
  if weight is not None:
    value += weight * terms.feature_distance
  if settings.average_weight is not None:
    value += settings.average_weight * terms.average_distance
  return value, terms
