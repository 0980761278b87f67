"""Compares a reconstruction with the secret, image by image."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Candidate
from jaxdia.client import Secret
from jaxdia.data import denormalize
from jaxdia.evaluation import metrics
from jaxdia.models import DropoutModel
from jaxdia.typing import Masks, Statistics

_IMAGE_METRICS = ("mse_normalized", "mse", "psnr", "ssim", "lpips")


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

  Returns:
    For each image `mse_normalized` (the paper's MSE); `mse`, `psnr`, `ssim` and
    `lpips` on pixels (see `jaxdia.evaluation.lpips` for when there is none);
    `mask_accuracy` over all entries and `mask_accuracy_by_site`;
    `label_accuracy`, 0 or 1. What does not apply is None.
  """
  originals, images = np.asarray(secret.images), np.asarray(candidate.images)
  order = metrics.assign(images, originals, found)
  images = images[order]
  pixels, found_pixels = (
    denormalize(x, statistics).astype(np.float32) for x in (originals, images)
  )
  lpips = metrics.lpips(originals.shape[-1])
  columns: dict[str, Any] = {
    "mse_normalized": metrics.mse(originals, images),
    "mse": metrics.mse(pixels, found_pixels),
    "psnr": metrics.psnr(pixels, found_pixels),
    "ssim": metrics.ssim(pixels, found_pixels),
    "lpips": None if lpips is None else lpips(pixels, found_pixels),
    "mask_accuracy": None,
    "label_accuracy": None
    if labels is None
    else (np.asarray(labels)[order] == np.asarray(secret.labels)).astype(float),
  }
  by_site = {}
  if candidate.masks:
    by_site = metrics.mask_accuracy(model, candidate.masks, secret.masks, order, known_masks)
    columns["mask_accuracy"] = _weighted_mean(by_site, known_masks or secret.masks)
  scores = []
  missing = np.zeros(len(originals), bool) if found is None else ~np.asarray(found)[order]
  for i in range(len(originals)):
    score = {name: None if c is None else float(c[i]) for name, c in columns.items()}
    masks = {s: float(a[i]) for s, a in by_site.items() if not np.isnan(a[i])}
    if missing[i]:
      score |= {name: None for name in _IMAGE_METRICS}
      if len(originals) > 1:  # then nothing says whose masks these are
        masks = {}
    score["mask_accuracy_by_site"] = masks or None
    score["mask_accuracy"] = score["mask_accuracy"] if masks else None
    scores.append(score)
  found_pixels[missing] = np.nan
  return Evaluation(pixels, found_pixels, scores, order)


def _weighted_mean(by_site, known):
  """Returns f[B], the mean over sites, by the number of entries that count in each."""
  values = np.asarray(list(by_site.values()))
  sizes = np.asarray([np.size(known[site]) for site in by_site], float)
  weights = np.where(np.isnan(values), 0, sizes[:, None])
  total = np.maximum(weights.sum(axis=0), 1)
  return np.sum(np.where(np.isnan(values), 0, values) * weights, axis=0) / total


def found_labels(candidate: Candidate, recovered: jax.Array | None) -> np.ndarray | None:
  """Returns the labels that an attack found by itself: i[B], or None if they were given.

  Args:
    candidate: its result; soft labels that it searched.
    recovered: labels that it read from the gradient, if it did.
  """
  if candidate.labels is not None:
    return np.argmax(candidate.labels, axis=-1)
  return None if recovered is None else np.asarray(recovered)
