"""Finished trials against the truth: the rows of results.jsonl."""

from typing import Any, NamedTuple

import numpy as np

from jaxdia import data, evaluation
from jaxdia.attacks import Status
from jaxdia.client import Secret
from jaxdia.experiment import outcomes
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.network import common_rate
from jaxdia.models import DropoutModel


class Scored(NamedTuple):
  """One batch against the truth.

  Attributes:
    rows: one an image, as in results.jsonl.
    images: f32[B, H, W, C], pixels, in the order of the originals; NaN where there is none.
    recording: {iterations: f32[B, H, W, C]}, how they formed; pixels, in the same order.
  """

  rows: list[dict[str, Any]]
  images: np.ndarray
  recording: dict[int, np.ndarray]


def score(
  settings: ExperimentSettings,
  model: DropoutModel,
  name: str,
  number: int,
  secret: Secret,
  outcome: outcomes.Outcome,
  victims: data.Victims,
  pool: np.ndarray,
  recovered: np.ndarray | None,
) -> Scored:
  """Scores the finished trials of one gradient.

  Args:
    settings: of the experiment.
    model: the client's network.
    name: of the attack.
    number: of the gradient; those of the second mask seed come after all of the first.
    secret: what the attack was after.
    outcome: what it found.
    victims: give the statistics.
    pool: f32[P, H, W, C], pixels among which the victims are.
    recovered: i[B], labels that were read from the gradient, if the attack reads them.

  Returns:
    The rows. What says nothing, as the masks of an attack that did not search them, is None.
  """
  size = settings.data.batch_size
  mask_seed, batch = divmod(number, settings.data.count // size)
  record, origin = outcome.best, outcome.origin
  alone = record.status == Status.NO_SEARCH
  result = evaluation.evaluate(
    model,
    secret,
    outcome.candidate,
    victims.statistics,
    evaluation.found_labels(outcome.candidate, recovered),
    found=origin.verdict > 0 if alone else None,
    known_masks=origin.known_masks if alone else None,
    pool=pool,
  )
  seconds = record.seconds + (origin.seconds if origin else 0)
  steps = sum(r.iterations for r in outcome.records)
  reached = _reached(secret, outcome, result.order, victims.statistics)
  oracle = _oracle(secret, outcome, victims.statistics)
  rows = []
  for i, scores in enumerate(result.scores):
    row = {
      "victim": settings.data.offset + batch * size + i,
      "batch": batch,
      "mask_seed": mask_seed,
      "label": int(secret.labels[i]),
      "attack": name,
      "model": settings.model.name,
      "dropout_rate": common_rate(model),
      "batch_size": size,
    }
    row |= {key: None if outcome.failed else value for key, value in scores.items()}
    row |= {
      "objective": None if outcome.failed or alone else record.objective,
      "gradient_distance": None if outcome.failed or alone else record.distance,
      "iterations": record.iterations,
      "best_iteration": record.best_iteration,
      "restart": record.restart,
      "seconds": round(seconds, 3),
      # L-BFGS takes more in its line search, and does not tell how many.
      "gradient_evaluations": None if settings.attacks[name].optimizer == "lbfgs" else steps,
    }
    for level, iterations in zip(evaluation.SSIM_LEVELS, reached[:, i], strict=True):
      known = bool(np.isfinite(iterations)) and not outcome.failed
      row[f"iterations_to_ssim_{level}"] = int(iterations) if known else None
      until = None
      if known:
        share = float(iterations) / max(record.iterations, 1)
        until = round(seconds - record.seconds + record.seconds * share, 3)
      row[f"seconds_to_ssim_{level}"] = until
      row[f"gradient_evaluations_to_ssim_{level}"] = (
        int(iterations) if known and row["gradient_evaluations"] is not None else None
      )
    row["oracle"] = (
      None if oracle is None or outcome.failed else {k: v[i] for k, v in oracle.items()}
    )
    row["status"] = "failed" if outcome.failed else record.status.name.lower()
    row["closed_form"] = None
    if origin is not None:
      row["closed_form"] = outcomes.describe_origin(origin, int(result.order[i]))
    if alone:
      row["status"] = row["closed_form"]["verdict"]
    rows.append(row)
  images = (
    np.full_like(result.reconstructions, np.nan) if outcome.failed else result.reconstructions
  )
  recording = {
    n: data.denormalize(x, victims.statistics)[result.order] for n, x in outcome.recording.items()
  }
  return Scored(rows, images, recording)


def _reached(secret, outcome, order, statistics) -> np.ndarray:
  """Returns f[levels, B], after how many of the recorded iterations, or in the end, it was so."""
  reached = np.full((len(evaluation.SSIM_LEVELS), len(order)), np.inf)
  recorded = outcome.recording | {outcome.best.iterations: outcome.candidate.images}
  images = np.stack([np.asarray(x) for x in recorded.values()])
  ssim = evaluation.ssim_of_recording(secret, images, order, statistics)
  iterations = np.asarray(list(recorded), float)[:, None]
  for k, level in enumerate(evaluation.SSIM_LEVELS):
    reached[k] = np.min(np.where(ssim >= level, iterations, np.inf), axis=0)
  return reached


def _oracle(secret, outcome, statistics) -> dict[str, list] | None:
  """Returns the scores of the restart that the truth would choose, if there was a choice."""
  if len(outcome.images) == 1:
    return None
  best = None
  for restart, images in outcome.images.items():
    if not np.isfinite(images).all():
      continue
    order = evaluation.assign(images, np.asarray(secret.images))
    mse = evaluation.mse(np.asarray(secret.images), images[order])
    if best is None or np.mean(mse) < np.mean(best[1]):
      best = restart, mse, images[order]
  if best is None:
    return None
  restart, mse, images = best
  pixels = [
    data.denormalize(np.asarray(x), statistics).astype(np.float32) for x in (secret.images, images)
  ]
  ssim = evaluation.ssim(*pixels)
  return {
    "restart": [restart] * len(mse),
    "mse_normalized": [float(x) for x in mse],
    "ssim": [float(x) for x in ssim],
  }
