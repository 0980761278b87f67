"""Finished trials against the truth: the rows of results.jsonl."""

from typing import Any, NamedTuple

import numpy as np

from jaxdia import data, evaluation
from jaxdia.attacks import Status
from jaxdia.client import Secret, defences
from jaxdia.closed_form import Verdict
from jaxdia.core.types import Statistics
from jaxdia.experiment import outcomes
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.network import common_rate
from jaxdia.experiment.schema import ClosedForm, Row
from jaxdia.models import DropoutModel


class Scored(NamedTuple):
  """One client's gradient against the truth.

  Attributes:
    rows: one an image.
    images: f32[B, H, W, C], pixels, in the order of the originals; NaN where there is none.
    recording: {iterations: f32[B, H, W, C]}, how they formed; pixels, in the same order.
  """

  rows: list[Row]
  images: np.ndarray
  recording: dict[int, np.ndarray]


class Facts(NamedTuple):
  """What holds for all rows of an experiment.

  Attributes:
    settings: of the experiment.
    model: the clients' network.
    victims: the images; they give statistics and names of classes.
    pool: f32[P, H, W, C], pixels among which the images are.
  """

  settings: ExperimentSettings
  model: DropoutModel
  victims: data.Victims
  pool: np.ndarray


def score(
  facts: Facts,
  attack: str,
  secret: Secret,
  outcome: outcomes.Outcome,
  *,
  number: int,
  recovered: np.ndarray | None = None,
) -> Scored:
  """Scores the finished trials of one gradient.

  Args:
    facts: of the experiment.
    attack: its name.
    secret: what the attack was after.
    outcome: what it found.
    number: of the gradient; those of the second mask seed come after all of the first.
    recovered: i[B], labels that were read from the gradient, if the attack reads them.

  Returns:
    The rows. What says nothing, as the masks of an attack that did not search them, is None.
  """
  settings, statistics = facts.settings, facts.victims.statistics
  record, size = outcome.best, settings.data.batch_size
  parts = outcome.recovery and outcome.recovery.parts
  alone = parts if record.status == Status.NO_SEARCH else None  # nothing was searched
  result = evaluation.evaluate(
    facts.model,
    secret,
    outcome.candidate,
    statistics,
    evaluation.found_labels(outcome.candidate, recovered),
    found=np.asarray(alone.verdict) > 0 if alone else None,
    known_masks=alone.known_masks if alone else None,
    pool=facts.pool,
  )
  mask_seed, client = divmod(number, settings.data.batches)
  names = facts.victims.class_names
  before = outcome.recovery_seconds
  costs = {
    "objective": None if alone else record.objective,
    "gradient_distance": None if alone or not np.isfinite(record.distance) else record.distance,
    "iterations": record.iterations,
    "best_iteration": record.best_iteration,
    "restart": record.restart,
    "seconds": round(before + record.seconds, 3),
    # L-BFGS takes more in its line search, and does not tell how many.
    "gradient_evaluations": None
    if settings.attacks[attack].optimizer == "lbfgs"
    else sum(r.iterations for r in outcome.records),
  }
  reached = _reached(secret, outcome, result.order, statistics)
  oracle = _oracle(secret, outcome, statistics)
  rows = []
  for i, scores in enumerate(result.scores):
    scores = scores | costs | _until(costs, before, reached[:, i])
    if outcome.failed:  # all but what it took
      kept = ("iterations", "best_iteration", "restart", "seconds", "gradient_evaluations")
      scores = {k: v if k in kept else None for k, v in scores.items()}
    closed = parts and describe_recovery(outcome, int(result.order[i]))
    status = "failed" if outcome.failed else record.status.name.lower()
    if alone and closed:
      status = closed.verdict
    rows.append(
      Row(
        image=settings.data.offset + client * size + i,
        client=client,
        mask_seed=mask_seed,
        label=int(secret.labels[i]),
        label_name=names[int(secret.labels[i])] if names else None,
        attack=attack,
        model=settings.model.name,
        dropout_rate=common_rate(facts.model),
        batch_size=size,
        defence=defences.describe(settings.defence),
        scores=scores,
        oracle=None if outcome.failed else oracle and {k: v[i] for k, v in oracle.items()},
        status=status,
        closed_form=closed,
        session=record.session,
      )
    )
  images = result.reconstructions
  recording = {
    n: data.denormalize(np.asarray(x), statistics)[result.order]
    for n, x in outcome.recording.items()
  }
  return Scored(rows, np.full_like(images, np.nan) if outcome.failed else images, recording)


def describe_recovery(outcome: outcomes.Outcome, number: int) -> ClosedForm:
  """Returns what of one image's result came from the closed form.

  Args:
    outcome: of an attack with a closed form.
    number: place of the image in the candidate.
  """
  recovery = outcome.recovery
  assert recovery is not None
  parts, residual = recovery.parts, float(recovery.residual[number])
  masks = {
    site: float(np.mean(known[number] if len(known) == len(parts.verdict) else known))
    for site, known in parts.known_masks.items()
  }
  return ClosedForm(
    verdict=Verdict(int(parts.verdict[number])).name.lower(),
    residual=residual if np.isfinite(residual) else None,
    reason=recovery.reason or None,
    label=bool(parts.known_labels[number]),
    masks={site: share for site, share in masks.items() if share},
    features=["/".join(path) for path, known in parts.known_features.items() if known.any()],
    seconds=round(outcome.recovery_seconds, 3),
  )


def _reached(
  secret: Secret, outcome: outcomes.Outcome, order: np.ndarray, statistics: Statistics
) -> np.ndarray:
  """Returns f[levels, B], after how many of the recorded iterations, or in the end, it was so."""
  recorded = outcome.recording | {outcome.best.iterations: outcome.candidate.images}
  images = np.stack([np.asarray(x) for x in recorded.values()])
  ssim = evaluation.ssim_of_recording(secret, images, order, statistics)
  iterations = np.asarray(list(recorded), float)[:, None]
  return np.stack(
    [
      np.min(np.where(ssim >= level, iterations, np.inf), axis=0)
      for level in evaluation.SSIM_LEVELS
    ]
  )


def _until(costs: dict[str, Any], before: float, reached: np.ndarray) -> dict[str, Any]:
  """Returns what the search took until it first was so close, for each level of SSIM."""
  columns = {}
  for level, iterations in zip(evaluation.SSIM_LEVELS, reached, strict=True):
    known = bool(np.isfinite(iterations))
    counted = known and costs["gradient_evaluations"] is not None
    share = iterations / max(costs["iterations"], 1)
    seconds = before + (costs["seconds"] - before) * share
    columns |= {
      f"iterations_to_ssim_{level}": int(iterations) if known else None,
      f"seconds_to_ssim_{level}": round(float(seconds), 3) if known else None,
      f"gradient_evaluations_to_ssim_{level}": int(iterations) if counted else None,
    }
  return columns


def _oracle(
  secret: Secret, outcome: outcomes.Outcome, statistics: Statistics
) -> dict[str, list[Any]] | None:
  """Returns the scores of the restart that the truth would choose, if there was a choice."""
  if len(outcome.images) == 1:
    return None
  found = []
  for restart, images in outcome.images.items():
    if np.isfinite(images).all():
      order = evaluation.assign(images, secret.images)
      pairs = evaluation.pair(secret.images, images[order], statistics)
      found.append((evaluation.mse(*pairs.normalized), restart, pairs))
  if not found:
    return None
  mse, restart, pairs = min(found, key=lambda one: np.mean(one[0]))
  return {
    "restart": [restart] * len(mse),
    "mse_normalized": mse.tolist(),
    "ssim": evaluation.ssim(*pairs.pixels).tolist(),
  }
