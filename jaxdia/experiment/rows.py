"""Finished trials against the truth: the rows of results.jsonl."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdia import data, evaluation
from jaxdia.attacks import Status
from jaxdia.client import Secret, defences
from jaxdia.closed_form import Verdict
from jaxdia.core.types import HostImages, Labels, Statistics
from jaxdia.experiment import outcomes
from jaxdia.experiment.clients import Clients
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.network import common_rate
from jaxdia.experiment.schema import RecoverySummary, Row


def score(
  settings: ExperimentSettings,
  clients: Clients,
  attack: str,
  outcome: outcomes.Outcome,
  number: int,
  recovered: Labels | None,
) -> list[Row]:
  """Scores the finished trials of one gradient.

  Args:
    settings: of the experiment.
    clients: that are attacked.
    attack: its name.
    outcome: what it found.
    number: of the gradient; those of the second mask seed come after all of the first.
    recovered: i[B], labels that were read from the gradient, if the attack reads them.

  Returns:
    A row for each image. What says nothing, as the masks of an attack that did not search them,
    is None.
  """
  secret, statistics, alone = clients.secrets[number], clients.data.statistics, outcome.alone
  result = evaluation.evaluate(
    clients.model,
    secret,
    outcome.candidate,
    statistics,
    evaluation.found_labels(outcome.candidate, recovered),
    found=outcome.found,
    known_masks=alone and alone.known_masks,
    pool=clients.pool,
    local=clients.local,
  )
  reached = _reached(secret, outcome, result.order, statistics)
  oracle = None if outcome.failed else _oracle(secret, outcome, statistics)
  names, costs = clients.data.class_names, costs_of(settings, attack, outcome)
  mask_seed, client = divmod(number, settings.data.batches)
  rows = []
  for i, image in enumerate(images_of(settings, number)):
    scores = result.scores[i] | costs | _until(costs, outcome.recovery_seconds, reached[:, i])
    if outcome.failed:  # all but what it took
      scores = dict.fromkeys(scores) | costs
    label = int(secret.labels[i])
    closed = outcome.recovery and describe_recovery(outcome, int(result.order[i]))
    status = "failed" if outcome.failed else outcome.best.status.name.lower()
    rows.append(
      Row(
        image=image,
        client=client,
        mask_seed=mask_seed,
        label=label,
        label_name=names[label] if names else None,
        attack=attack,
        model=settings.model.name,
        dropout_rate=common_rate(clients.model),
        batch_size=settings.data.batch_size,
        defence=defences.describe(settings.defence),
        scores=scores,
        oracle=oracle and {k: v[i] for k, v in oracle.items()},
        status=closed.verdict if alone and closed else status,
        closed_form=closed,
        session=outcome.best.session,
      )
    )
  return rows


def images_of(settings: ExperimentSettings, number: int) -> range:
  """Returns which images of the source are those of a gradient.

  Args:
    settings: of the experiment.
    number: of the gradient.
  """
  size = settings.data.batch_size
  first = settings.data.offset + number % settings.data.batches * size
  return range(first, first + size)


def costs_of(
  settings: ExperimentSettings, attack: str, outcome: outcomes.Outcome
) -> dict[str, Any]:
  """Returns the scores that the finished trials of a gradient have without the truth.

  Args:
    settings: of the experiment.
    attack: its name.
    outcome: what it found.
  """
  record = outcome.best
  searched = record.status != Status.NO_SEARCH and not outcome.failed
  return {
    "objective": record.objective if searched else None,
    "gradient_distance": record.distance if searched and np.isfinite(record.distance) else None,
    "iterations": record.iterations,
    "best_iteration": record.best_iteration,
    "restart": record.restart,
    "seconds": round(outcome.recovery_seconds + record.seconds, 3),
    # L-BFGS takes more in its line search, and does not tell how many.
    "gradient_evaluations": None
    if settings.attacks[attack].optimizer == "lbfgs"
    else sum(r.iterations for r in outcome.records),
  }


def rows_before(
  before: Mapping[tuple[int | None, int], Row],
  settings: ExperimentSettings,
  attack: str,
  outcome: outcomes.Outcome,
  number: int,
) -> list[Row] | None:
  """Returns the rows that were made of these very trials; None if they are not all there.

  Args:
    before: rows that there are, by mask seed and image.
    settings: of the experiment.
    attack: its name.
    outcome: what it found.
    number: of the gradient.
  """
  mask_seed = number // settings.data.batches
  rows = [before.get((mask_seed, image)) for image in images_of(settings, number)]
  costs = costs_of(settings, attack, outcome).items()
  scored = {name for name, m in evaluation.REGISTRY.items() if m.of != "attack"}
  found = [
    row
    for row in rows
    if row is not None
    and row.session == outcome.best.session
    and costs <= row.scores.items()
    and scored <= row.scores.keys()
  ]
  return found if len(found) == len(rows) else None


def in_order(
  clients: Clients, outcome: outcomes.Outcome, number: int
) -> tuple[HostImages, dict[int, HostImages]]:
  """Returns what was found of a gradient, in the order of the originals.

  Args:
    clients: that are attacked.
    outcome: what was found.
    number: of the gradient.

  Returns:
    f[B, H, W, C], pixels; NaN where there is none. And {iterations: f[B, H, W, C]}, how they
    formed.
  """
  candidate, found = np.asarray(outcome.candidate.images), outcome.found
  order = evaluation.assign(candidate, clients.batch(number)[0], found)

  def pixels(images):
    return data.denormalize(np.asarray(images), clients.data.statistics)[order]

  images = pixels(candidate)
  missing = np.full(len(order), outcome.failed) if found is None else ~found[order]
  images[missing] = np.nan
  return images, {n: pixels(x) for n, x in outcome.recording.items()}


def describe_recovery(outcome: outcomes.Outcome, number: int) -> RecoverySummary:
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
  return RecoverySummary(
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
    # Of the time of an attack without steps, which is none, an infinite share has no value.
    share = iterations / max(costs["iterations"], 1) if known else 1.0
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
