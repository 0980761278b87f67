"""Compares a reconstruction with the secret, image by image."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Candidate
from jaxdia.client import Secret
from jaxdia.core.types import Masks, Statistics
from jaxdia.data import denormalize, normalize
from jaxdia.evaluation import metrics
from jaxdia.evaluation.masks import mask_diagnostics
from jaxdia.models import DropoutModel

_SCALED = ("mse_scaled", "psnr_scaled", "ssim_scaled")
_IMAGE_METRICS = ("mse_normalized", "mse", "psnr", "ssim", "lpips", *_SCALED, "identified")


class Evaluation(NamedTuple):
  """A reconstruction in the order of the originals, with its scores.

  Attributes:
    originals: f32[B, H, W, C], pixels in [0, 1].
    reconstructions: f32[B, H, W, C], pixels in [0, 1]; NaN where there is none.
    scores: one dictionary an image.
    order: i[B], the place that each of them has in the candidate.
  """

  originals: np.ndarray
  reconstructions: np.ndarray
  scores: list[dict[str, Any]]
  order: np.ndarray


def evaluate(
  model: DropoutModel,
  secret: Secret,
  candidate: Candidate,
  statistics: Statistics,
  labels: np.ndarray | None = None,
  *,
  found: np.ndarray | None = None,
  known_masks: Masks | None = None,
  pool: np.ndarray | None = None,
) -> Evaluation:
  """Scores the result of an attack.

  Args:
    model: the client's network.
    secret: what the attack was after.
    candidate: what it found; masks that were not searched (None) get no score.
    statistics: what normalised the images.
    labels: i[B], the labels that the attack found by itself, if it did.
    found: b[B], which images it found; the others get no score but that of their
      labels or, in a batch of one, of their mask. All if None.
    known_masks: {site: b[shape]}, the entries of the masks that it found; all if None.
    pool: f[P, H, W, C], pixels of images among which the originals are.

  Returns:
    For each image `mse_normalized` (the paper's MSE); `mse`, `psnr`, `ssim` and
    `lpips` on pixels (see `jaxdia.evaluation.lpips` for when there is none), and
    `mse_scaled`, `psnr_scaled`, `ssim_scaled` where both images are first rescaled
    to [0, 1]; `identified`, 0 or 1, whether the original is the nearest in the pool;
    `mask_accuracy` over all entries and `mask_accuracy_by_site`, `mask_auc_by_site`,
    `mask_undecided_by_site`, `mask_dropped_by_site` (see
    `jaxdia.evaluation.mask_diagnostics`); `label_accuracy`, 0 or 1. What does not
    apply is None.
  """
  originals, images = np.asarray(secret.images), np.asarray(candidate.images)
  order = metrics.assign(images, originals, found)
  images = images[order]
  pixels, found_pixels = (
    denormalize(x, statistics).astype(np.float32) for x in (originals, images)
  )
  lpips = metrics.lpips(originals.shape[-1])
  scaled, found_scaled = metrics.rescale(pixels), metrics.rescale(found_pixels)
  columns: dict[str, Any] = {
    "mse_normalized": metrics.mse(originals, images),
    "mse": metrics.mse(pixels, found_pixels),
    "psnr": metrics.psnr(pixels, found_pixels),
    "ssim": metrics.ssim(pixels, found_pixels),
    "lpips": None if lpips is None else lpips(pixels, found_pixels),
    "mse_scaled": metrics.mse(scaled, found_scaled),
    "psnr_scaled": metrics.psnr(scaled, found_scaled),
    "ssim_scaled": metrics.ssim(scaled, found_scaled),
    "identified": None
    if pool is None
    else metrics.identified(found_pixels, pixels, np.asarray(pool)),
    "mask_accuracy": None,
    "label_accuracy": None
    if labels is None
    else (np.asarray(labels)[order] == np.asarray(secret.labels)).astype(float),
  }
  by_site = {}
  if candidate.masks:
    by_site = mask_diagnostics(model, candidate.masks, secret.masks, order, known_masks)
    columns["mask_accuracy"] = _mean_accuracy(by_site)
  scores = []
  missing = np.zeros(len(originals), bool) if found is None else ~np.asarray(found)[order]
  for i in range(len(originals)):
    score = {name: None if c is None else float(c[i]) for name, c in columns.items()}
    if missing[i]:
      score |= {name: None for name in _IMAGE_METRICS}
    # Of a batch nothing says whose masks those of a missing image are.
    shown = {} if missing[i] and len(originals) > 1 else by_site
    for name in ("accuracy", "auc", "undecided", "dropped"):
      values = {site: float(v[name][i]) for site, v in shown.items() if not np.isnan(v[name][i])}
      score[f"mask_{name}_by_site"] = values or None
    if score["mask_accuracy_by_site"] is None:
      score["mask_accuracy"] = None
    scores.append(score)
  found_pixels[missing] = np.nan
  return Evaluation(pixels, found_pixels, scores, order)


def ssim_of_recording(
  secret: Secret, images: np.ndarray, order: np.ndarray, statistics: Statistics
) -> np.ndarray:
  """Returns how a reconstruction approached its originals: f[K, B] of SSIM.

  Args:
    secret: what the attack was after.
    images: f[K, B, H, W, C], normalised, in the order in which they were recorded.
    order: i[B], the matching of the end.
    statistics: what normalised the images.
  """
  originals = denormalize(np.asarray(secret.images), statistics).astype(np.float32)
  pixels = denormalize(np.asarray(images), statistics).astype(np.float32)[:, order]
  return np.stack([metrics.ssim(originals, recorded) for recorded in pixels])


def floors(
  originals: np.ndarray, pool: np.ndarray, statistics: Statistics
) -> dict[str, dict[str, float]]:
  """Returns the mean scores of guesses that know nothing of the client, for scale.

  Args:
    originals: f[N, H, W, C], pixels.
    pool: f[P, H, W, C], pixels.
    statistics: what normalises images.

  Returns:
    For `mean_image`, the mean of the pool, and `random_image`, pixels drawn uniformly, the
    mean of each metric of images.
  """
  rng = np.random.default_rng(0)
  guesses = {
    "mean_image": np.broadcast_to(np.mean(pool, axis=0), originals.shape),
    "random_image": rng.uniform(size=originals.shape),
  }
  result = {}
  for name, guess in guesses.items():
    guess = guess.astype(np.float32)
    normalized = (normalize(x, statistics) for x in (originals, guess))
    scores = {
      "mse_normalized": metrics.mse(*normalized),
      "mse": metrics.mse(originals, guess),
      "psnr": metrics.psnr(originals, guess),
      "ssim": metrics.ssim(originals, guess),
    }
    if (lpips := metrics.lpips(originals.shape[-1])) is not None:
      scores["lpips"] = lpips(originals, guess)
    result[name] = {metric: float(np.mean(values)) for metric, values in scores.items()}
  return result


def _mean_accuracy(by_site) -> np.ndarray:
  """Returns f[B], the share of right entries over all sites; 0 where none counts."""
  right = sum(np.nan_to_num(values["accuracy"]) * values["count"] for values in by_site.values())
  return right / np.maximum(sum(values["count"] for values in by_site.values()), 1)


def found_labels(candidate: Candidate, recovered: jax.Array | None) -> np.ndarray | None:
  """Returns the labels that an attack found by itself: i[B], or None if they were given.

  Args:
    candidate: its result; soft labels that it searched.
    recovered: labels that it read from the gradient, if it did.
  """
  if candidate.labels is not None:
    return np.argmax(candidate.labels, axis=-1)
  return None if recovered is None else np.asarray(recovered)
