"""Compares a reconstruction with the secret, image by image."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.attacks import Candidate
from jaxdia.client import LocalUpdate, Secret
from jaxdia.core.errors import InputError
from jaxdia.core.transfers import with_transfers
from jaxdia.core.trees import is_traced
from jaxdia.core.types import Array, Images, Masks, Statistics
from jaxdia.data import denormalize, normalize
from jaxdia.evaluation import metrics
from jaxdia.evaluation.masks import mask_diagnostics
from jaxdia.evaluation.matching import assign
from jaxdia.evaluation.metric import Pairs, Scores
from jaxdia.models import DropoutModel

# Images that floors are computed of at once, which bounds the memory of it.
_AT_ONCE = 256


class Evaluation(NamedTuple):
  """A reconstruction in the order of the originals, with its scores.

  Attributes:
    originals: f32[B, H, W, C], pixels in [0, 1].
    reconstructions: f32[B, H, W, C], pixels in [0, 1]; NaN where there is none.
    scores: one dictionary an image.
    order: i[B], the place that each of them has in the candidate.
  """

  originals: Images
  reconstructions: Images
  scores: list[dict[str, Any]]
  order: Integer[Array, " batch"]


@with_transfers
def evaluate(
  model: DropoutModel,
  secret: Secret,
  candidate: Candidate,
  statistics: Statistics,
  labels: Integer[Array, " batch"] | None = None,
  *,
  found: Bool[Array, " batch"] | None = None,
  known_masks: Masks | None = None,
  pool: Float[Array, "pool height width channels"] | None = None,
  local: LocalUpdate | None = None,
) -> Evaluation:
  """Scores the result of an attack.

  Args:
    model: the client's network.
    secret: what the attack was after; masks that nobody knows (None) score nothing.
    candidate: what it found; masks that were not searched (None) get no score.
    statistics: what normalised the images.
    labels: i[B], the labels that the attack found by itself, if it did; less than 0 where it
      found none.
    found: b[B], which images it found; the others get no score but that of their
      labels or, in a batch of one, of their mask. All if None.
    known_masks: {site: b[shape]}, the entries of the masks that it found; all if None.
    pool: f[P, H, W, C], pixels of images among which the originals are.
    local: local steps of the client, of which the masks are; None for one step.

  Returns:
    For each image all metrics of images in `jaxdia.evaluation.REGISTRY`; `mask_accuracy`
    over all entries and `mask_accuracy_by_site`, `mask_auc_by_site`,
    `mask_undecided_by_site`, `mask_dropped_by_site` (see
    `jaxdia.evaluation.mask_diagnostics`); `label_accuracy`, 0 or 1. What does not
    apply, or is no finite number, is None.

  Raises:
    InputError: the secret or the candidate is none, has no values, or they do not fit together.
  """
  _check_kinds(secret, candidate)
  originals, images = as_float(secret.images), as_float(candidate.images)
  if originals.shape != images.shape:
    raise InputError(
      f"the secret has images of shape {originals.shape}, and the candidate of {images.shape};"
      " expected the same. They may be of other clients, or of another model."
    )
  order = assign(images, originals, found)
  pairs = pair(originals, images[order], statistics, pool)
  columns: dict[str, Any] = image_scores(pairs)
  columns["label_accuracy"] = None
  if labels is not None:
    found_labels = np.asarray(labels)[order]
    right = found_labels == np.asarray(secret.labels)
    columns["label_accuracy"] = np.where(found_labels < 0, np.nan, right)
  by_site = {}
  if candidate.masks and secret.masks is not None:
    by_site = mask_diagnostics(model, candidate.masks, secret.masks, order, known_masks, local)
  columns["mask_accuracy"] = _mean_accuracy(by_site) if by_site else None
  of_images = [name for name, metric in metrics.REGISTRY.items() if metric.function]
  scores = []
  missing = np.zeros(len(originals), bool) if found is None else ~np.asarray(found)[order]
  for i in range(len(originals)):
    score: dict[str, Any] = {n: None if c is None else _finite(c[i]) for n, c in columns.items()}
    if missing[i]:
      score |= dict.fromkeys(of_images)
    # Of a batch nothing says whose masks those of a missing image are.
    shown = {} if missing[i] and len(originals) > 1 else by_site
    for name in ("accuracy", "auc", "undecided", "dropped"):
      values = {site: float(v[name][i]) for site, v in shown.items() if not np.isnan(v[name][i])}
      score[f"mask_{name}_by_site"] = values or None
    if score["mask_accuracy_by_site"] is None:
      score["mask_accuracy"] = None
    scores.append(score)
  reconstructions = np.where(missing[:, None, None, None], np.nan, pairs.reconstructions)
  return Evaluation(pairs.originals, reconstructions, scores, order)


def _check_kinds(secret: Any, candidate: Any) -> None:
  """Refuses what is no secret or no candidate."""
  if not isinstance(secret, Secret):
    raise InputError(
      f"the secret is of type {type(secret).__name__}; expected a jaxdia.client.Secret, the second"
      " of the two that observe returns, or Secret(images, labels, None)."
    )
  if not isinstance(candidate, Candidate):
    raise InputError(
      f"the candidate is of type {type(candidate).__name__}; expected an attacks.Candidate, such as"
      " state.best.candidate of a state, or trial.candidate of a trial."
    )
  if is_traced((secret, candidate)):
    raise InputError(
      "the secret or the candidate is traced, as inside of jax.jit or jax.vmap; expected values, as"
      " scores are computed on the host. Evaluate outside."
    )


def as_float(array: Any) -> Float[np.ndarray, "..."]:
  """Returns a host array of a type in which numpy and scipy compute; bfloat16 is none."""
  array = np.asarray(array)
  return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def pair(
  originals: Images,
  images: Images,
  statistics: Statistics,
  pool: Float[Array, "pool height width channels"] | None = None,
) -> Pairs:
  """Returns what the metrics of images are given.

  Args:
    originals: f[B, H, W, C], normalised.
    images: f[B, H, W, C], normalised, in the same order.
    statistics: what normalised them.
    pool: f[P, H, W, C], pixels, if there is one.
  """
  normalized = as_float(originals), as_float(images)
  first, second = (denormalize(x, statistics).astype(np.float32) for x in normalized)
  return Pairs(first, second, normalized, None if pool is None else np.asarray(pool))


def image_scores(pairs: Pairs) -> dict[str, Scores | None]:
  """Returns by name what all metrics of images say: f[B], None where one does not apply."""
  return {
    name: metric.function(pairs) for name, metric in metrics.REGISTRY.items() if metric.function
  }


def ssim_of_recording(
  secret: Secret,
  images: Float[Array, "recorded batch height width channels"],
  order: Integer[Array, " batch"],
  statistics: Statistics,
) -> Float[np.ndarray, "recorded batch"]:
  """Returns how a reconstruction approached its originals: f[K, B] of SSIM.

  Args:
    secret: what the attack was after.
    images: f[K, B, H, W, C], normalised, in the order in which they were recorded.
    order: i[B], the matching of the end.
    statistics: what normalised the images.
  """
  recorded = as_float(images)[:, order]
  originals = np.broadcast_to(as_float(secret.images), recorded.shape)
  flat = [x.reshape(-1, *recorded.shape[2:]) for x in (originals, recorded)]
  return metrics.ssim(*pair(flat[0], flat[1], statistics).pixels).reshape(recorded.shape[:2])


def floors(
  originals: Images, pool: Float[Array, "pool height width channels"], statistics: Statistics
) -> dict[str, dict[str, float]]:
  """Returns the mean scores of guesses that know nothing of the client, for scale.

  Args:
    originals: f[N, H, W, C], pixels.
    pool: f[P, H, W, C], pixels.
    statistics: what normalises images.

  Returns:
    For `mean_image`, the mean of the pool, and `random_image`, pixels drawn uniformly, the
    mean of each metric of images that needs no pool.
  """
  rng, mean_image = np.random.default_rng(0), np.mean(pool, axis=0)
  found: dict[str, dict[str, list[np.ndarray]]] = {"mean_image": {}, "random_image": {}}
  for start in range(0, len(originals), _AT_ONCE):
    some = originals[start : start + _AT_ONCE]
    guesses = (np.broadcast_to(mean_image, some.shape), rng.uniform(size=some.shape))
    for scores, guess in zip(found.values(), guesses, strict=True):
      guess = guess.astype(np.float32)
      normalized = tuple(normalize(x, statistics) for x in (some, guess))
      for name, values in image_scores(Pairs(some, guess, normalized)).items():
        if values is not None:
          scores.setdefault(name, []).append(values)
  means = {
    guess: {name: _finite(np.mean(np.concatenate(parts))) for name, parts in scores.items()}
    for guess, scores in found.items()
  }
  return {
    guess: {name: mean for name, mean in of_guess.items() if mean is not None}
    for guess, of_guess in means.items()
  }


def found_labels(
  candidate: Candidate, recovered: Integer[Array, " batch"] | None
) -> Integer[np.ndarray, " batch"] | None:
  """Returns the labels that an attack found by itself: i[B], or None if they were given.

  Args:
    candidate: its result; soft labels that it searched.
    recovered: labels that it read from the gradient, if it did.
  """
  if candidate.labels is not None:
    return np.argmax(candidate.labels, axis=-1)
  return None if recovered is None else np.asarray(recovered)


def _finite(value: Any) -> float | None:
  return float(value) if np.isfinite(value) else None


def _mean_accuracy(by_site: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
  """Returns f[B], the share of right entries over all sites; 0 where none counts."""
  right = sum(np.nan_to_num(values["accuracy"]) * values["count"] for values in by_site.values())
  return right / np.maximum(sum(values["count"] for values in by_site.values()), 1)
