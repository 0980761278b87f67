"""Compares a reconstruction with the secret, image by image."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Candidate
from jaxdia.client import Secret
from jaxdia.data import denormalize
from jaxdia.evaluation import metrics
from jaxdia.models import DropoutModel
from jaxdia.typing import Statistics


class Evaluation(NamedTuple):
  """A reconstruction in the order of the originals, with its scores.

  Attributes:
    originals: f32[B, H, W, C], pixels in [0, 1].
    reconstructions: f32[B, H, W, C], pixels in [0, 1].
    scores: one dictionary an image.
  """

  originals: np.ndarray
  reconstructions: np.ndarray
  scores: list[dict[str, Any]]


def evaluate(
  model: DropoutModel,
  secret: Secret,
  candidate: Candidate,
  statistics: Statistics,
  labels: np.ndarray | None = None,
) -> Evaluation:
  """Scores the result of an attack.

  Args:
    model: the client's network.
    secret: what the attack was after.
    candidate: what it found; masks that were not searched (None) get no score.
    statistics: what normalised the images.
    labels: i[B], the labels that the attack found by itself, if it did.

  Returns:
    For each image `mse_normalized` (the paper's MSE); `mse`, `psnr`, `ssim` and
    `lpips` on pixels (see `jaxdia.evaluation.lpips` for when there is none);
    `mask_accuracy` over all entries and `mask_accuracy_by_site`;
    `label_accuracy`, 0 or 1. What does not apply is None.
  """
  originals, found = np.asarray(secret.images), np.asarray(candidate.images)
  order = metrics.assign(found, originals)
  found = found[order]
  pixels, found_pixels = (
    denormalize(images, statistics).astype(np.float32) for images in (originals, found)
  )
  lpips = metrics.lpips(originals.shape[-1])
  columns: dict[str, Any] = {
    "mse_normalized": metrics.mse(originals, found),
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
    by_site = metrics.mask_accuracy(model, candidate.masks, secret.masks, order)
    sizes = [np.size(secret.masks[site]) for site in by_site]
    columns["mask_accuracy"] = np.average(list(by_site.values()), axis=0, weights=sizes)
  scores = []
  for i in range(len(originals)):
    score = {name: None if c is None else float(c[i]) for name, c in columns.items()}
    score["mask_accuracy_by_site"] = {s: float(a[i]) for s, a in by_site.items()} or None
    scores.append(score)
  return Evaluation(pixels, found_pixels, scores)


def found_labels(candidate: Candidate, recovered: jax.Array | None) -> np.ndarray | None:
  """Returns the labels that an attack found by itself: i[B], or None if they were given.

  Args:
    candidate: its result; soft labels that it searched.
    recovered: labels that it read from the gradient, if it did.
  """
  if candidate.labels is not None:
    return np.argmax(candidate.labels, axis=-1)
  return None if recovered is None else np.asarray(recovered)
