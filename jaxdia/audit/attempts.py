"""What is tried on an update, and how its results are held against it."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia import attacks, evaluation
from jaxdia.attacks import Attack, State, Status, complete
from jaxdia.audit.proof import Proof, prove
from jaxdia.audit.schema import VERDICTS, Attempt
from jaxdia.client import Observation
from jaxdia.closed_form import Recovery, Verdict, recover, recover_labels
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.types import Key, Statistics
from jaxdia.models import DropoutModel

# What a search found is likely if it leaves no more than this share of the update unexplained; and
# nothing if it leaves more than the second.
LIKELY = 0.03
PARTIAL = 0.5
# Besides, another search must have found it: likely and partial from this SSIM on.
_AGREE = (0.8, 0.4)
# A trial takes at least so long, whatever is left.
_LEAST_SECONDS = 1.0
# Of running averages that came with an update; docs/models.md has what it is worth.
_AVERAGE_WEIGHT = 0.1
# Folded into the key of an update, for searches; closed forms use the key itself.
_SEARCH = 1


class Rebuilt(NamedTuple):
  """What an attempt found of a batch.

  Attributes:
    by: the attempt that found each image.
    images: f[B, H, W, C], normalised.
    verdicts: of each image, a key of `jaxdia.audit.schema.VERDICTS`.
    residuals: f[B], NaN where there is no image.
    reasons: for each image.
    labels: i[B], NO_LABEL where nothing tells one.
    known_labels: b[B], those that are certain.
    masks: {site: known share}.
    factor: of the update, if it is known.
  """

  by: list[str]
  images: Float[np.ndarray, "batch height width channels"]
  verdicts: list[str]
  residuals: Float[np.ndarray, " batch"]
  reasons: list[str]
  labels: Integer[np.ndarray, " batch"]
  known_labels: Bool[np.ndarray, " batch"]
  masks: dict[str, float]
  factor: float | None


def by_algebra(
  key: Key, model: DropoutModel, observation: Observation, rounding: float
) -> tuple[Attempt, Recovery | None, Rebuilt | None]:
  """Tries what linear algebra gives.

  Args:
    key: random key.
    model: the network.
    observation: the update.
    rounding: share of it that rounding changed.

  Returns:
    What came of it, and what was found; None if it does not apply to the network.
  """
  start = time.monotonic()
  try:
    recovery = recover(key, model, observation, rounding)
  except InputError as error:
    attempt = Attempt(
      name="closed form", outcome=first_line(error), seconds=time.monotonic() - start
    )
    return attempt, None, None
  found = _found_by_algebra(recovery)
  whole = _whole(model, observation, recovery)
  if whole is not None and whole.of_sent > LIKELY:
    text = f"its equations hold, but the whole batch leaves {whole.of_sent:.1%} unexplained"
    found = found._replace(
      verdicts=["partial"] * len(found.verdicts), reasons=[text] * len(found.reasons)
    )
  attempt = Attempt(
    name="closed form",
    outcome=recovery.summary(),
    seconds=time.monotonic() - start,
    residual=whole and whole.residual,
  )
  factor = whole.factor if whole and whole.residual < LIKELY else None
  if factor is None and np.isfinite(recovery.scale):
    factor = float(recovery.scale)
  return attempt, recovery, found._replace(factor=factor)


def _whole(model, observation, recovery: Recovery) -> Proof | None:
  """Holds a whole batch that was recovered against the whole update.

  Where masks or labels are not known, or need not be, as those of units that a ReLU silences, it
  may explain the update nevertheless; if it does not, that says nothing of the images.
  """
  parts = recovery.parts
  if not np.all(recovery.determined):
    return None
  labels = np.maximum(parts.labels, 0)  # of those that nothing tells, any
  proof = prove(model, observation, parts.masks, parts.images, labels)
  masks_known = all(np.all(known) for known in parts.known_masks.values())
  is_whole = masks_known and bool(np.all(parts.known_labels))
  return proof if is_whole or proof.residual < LIKELY else None


def _found_by_algebra(recovery: Recovery) -> Rebuilt:
  parts = recovery.parts
  names = {Verdict.EXACT: "certain", Verdict.APPROXIMATE: "partial", Verdict.NOT_APPLICABLE: "none"}
  verdicts = [names[Verdict(int(v))] for v in np.asarray(parts.verdict)]
  # What rounding alone keeps from being exact is no less certain.
  verdicts = np.where(recovery.determined, "certain", verdicts).tolist()
  verdicts = [
    "none" if verdict == "partial" and not r <= PARTIAL else verdict
    for verdict, r in zip(verdicts, recovery.residual, strict=True)
  ]
  known_to = [
    f", its pixels known to about {e:.1e} (normalised)" if e > 0 else ""
    for e in np.atleast_1d(recovery.error)
  ]
  reasons = [
    f"its part of the gradient is determined by linear equations, and left unexplained to {r:.1e}"
    + known
    if verdict == "certain"
    else recovery.reason
    for verdict, r, known in zip(verdicts, recovery.residual, known_to, strict=True)
  ]
  return Rebuilt(
    by=["closed form"] * len(verdicts),
    images=np.asarray(parts.images),
    verdicts=verdicts,
    residuals=np.asarray(recovery.residual),
    reasons=reasons,
    labels=np.asarray(parts.labels),
    known_labels=np.asarray(parts.known_labels),
    masks={site: float(np.mean(known)) for site, known in parts.known_masks.items()},
    factor=None,
  )


def by_search(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  recovery: Recovery | None,
  seconds: float,
  say: Callable[[str], None],
) -> tuple[Attempt, Rebuilt]:
  """Searches images, masks and labels, at least twice from other starts.

  Masks and images together can explain an update in more than one way. So that a result explains
  it says little; that two searches end at the same image says more.

  Args:
    key: random key.
    model: the network.
    observation: the update.
    recovery: what linear algebra gave; where it gave anything, the search starts from there, but
      only one from images that are not certain.
    seconds: for all trials, compilation apart; the first may take half of it.
    say: called with a line after each trial.

  Returns:
    What came of it, and what was found.
  """
  start, left = time.monotonic(), seconds
  name, attack = choose_attack(model, observation, recovery)
  # Compiles, which is no part of the time.
  attacks.solve(key, attack, observation, recovery=_of_certain(recovery), seconds=0)
  trials: list[State] = []
  while len(trials) < 2 or (left > 0 and not all(map(_is_done, trials[:2]))):
    begun = time.monotonic()
    state = attacks.solve(
      jax.random.fold_in(jax.random.fold_in(key, _SEARCH), len(trials)),
      attack,
      observation,
      recovery=_of_certain(recovery) if trials else recovery,
      seconds=max(left if trials else seconds / 2, _LEAST_SECONDS),
    )
    trials = sorted([*trials, state], key=_objective)
    say(f"{name}: trial {len(trials)} ended at objective {float(state.best.objective):.2e}")
    left -= time.monotonic() - begun
  agreement = _agreement(observation, *trials[:2])
  found = _found_by_search(name, model, observation, trials[0], agreement)
  residual = float(found.residuals[0])
  attempt = Attempt(
    name=name,
    outcome=(
      f"{len(trials)} trials, of which the best leaves {residual:.1%} of the update unexplained,"
      f" and the best two agree to a mean SSIM of {np.mean(agreement):.2f}"
    ),
    seconds=time.monotonic() - start,
    residual=residual if math.isfinite(residual) else None,
    iterations=sum(int(trial.iteration) for trial in trials),
  )
  return attempt, found


def _of_certain(recovery: Recovery | None) -> Recovery | None:
  """Returns it without images that are not certain, from which no more than one search may start.

  Those that are keep their places in all trials, so that no other image is found in one of them.
  """
  if recovery is None:
    return None
  verdict = np.asarray(recovery.parts.verdict)
  certain = (verdict == Verdict.EXACT) | recovery.determined
  verdict = np.where(certain, verdict, Verdict.NOT_APPLICABLE)
  return recovery._replace(parts=recovery.parts._replace(verdict=verdict.astype(np.int32)))


def _objective(trial: State) -> float:
  objective = float(trial.best.objective)
  return objective if math.isfinite(objective) else math.inf


def _is_done(trial: State) -> bool:
  return int(trial.status) == Status.CONVERGED


def _agreement(observation: Observation, best: State, second: State) -> np.ndarray:
  """Returns f[B], the SSIM of each image of a trial with the one of another that is nearest."""
  images, others = (np.asarray(trial.best.candidate.images) for trial in (best, second))
  others = others[evaluation.assign(others, images)]
  statistics = Statistics(np.asarray(observation.mean), np.asarray(observation.std))
  ssim = np.asarray(evaluation.ssim(*evaluation.pair(images, others, statistics).pixels))
  return np.where(np.isfinite(ssim), ssim, 0.0)


def _found_by_search(name, model, observation, best: State, agreement: np.ndarray) -> Rebuilt:
  candidate = best.best.candidate
  masks, labels = complete(candidate, best.known)
  proof = prove(model, observation, masks, candidate.images, labels)
  verdicts = np.full(observation.batch_size, "none", object)
  verdicts[(agreement >= _AGREE[1]) & (proof.residual <= PARTIAL)] = "partial"
  verdicts[(agreement >= _AGREE[0]) & (proof.residual <= LIKELY)] = "likely"
  size = observation.batch_size
  labels = np.asarray(labels)
  return Rebuilt(
    by=[name] * size,
    images=np.asarray(candidate.images),
    verdicts=list(verdicts),
    residuals=np.full(size, proof.residual),
    reasons=[
      f"the batch leaves {proof.residual:.1%} of the update unexplained, and a search from another"
      f" start found this image to an SSIM of {ssim:.2f}"
      for ssim in agreement
    ],
    labels=labels if labels.ndim == 1 else labels.argmax(axis=1),
    known_labels=np.zeros(size, bool),
    masks={},
    # Labels that were searched have a part in it.
    factor=proof.factor if "likely" in verdicts and candidate.labels is None else None,
  )


def choose_attack(
  model: DropoutModel, observation: Observation, recovery: Recovery | None
) -> tuple[str, Attack]:
  """Chooses the search for what is known of an update.

  Args:
    model: the network.
    observation: the update.
    recovery: what linear algebra gave.

  Returns:
    The name of the attack, and the attack.
  """
  labels = "given"
  if observation.labels is None:
    labels = "recovered" if can_read_labels(model, observation) else "free"
  name, known = "dia" if model.rates else "ig", False
  if labels != "free" and recovery is not None and _gave_something(recovery):
    name, known = "hybrid", all(map(np.all, recovery.parts.known_masks.values()))
  settings = {"labels": labels, "average_weight": _AVERAGE_WEIGHT if observation.averages else None}
  if model.convolutions and model.rates and not known:
    name += "_tv"
    settings["schedule"] = "plateau"  # as nobody knows how many iterations there is time for
  return name, attacks.create(name, model, **settings)


def can_read_labels(model: DropoutModel, observation: Observation) -> bool:
  """Returns whether the gradient tells labels: of a frozen classifier or some losses it does not.

  Args:
    model: the network.
    observation: the update.
  """
  try:
    recover_labels(model, observation)
  except InputError:
    return False
  return True


def _gave_something(recovery: Recovery) -> bool:
  parts = recovery.parts
  return bool(np.any(parts.verdict)) or any(map(np.any, parts.known_features.values()))


def better(one: Rebuilt, other: Rebuilt) -> Rebuilt:
  """Returns of each image what is surer; of two that explain a part, that of the search.

  Args:
    one: of a closed form.
    other: of a search, which keeps the images of the closed form in their places.
  """
  order = list(VERDICTS)
  pick = np.array(
    [
      order.index(b) < order.index(a) or a == b == "partial"
      for a, b in zip(one.verdicts, other.verdicts, strict=True)
    ]
  )

  def each(name):
    pairs = zip(pick, getattr(one, name), getattr(other, name), strict=True)
    return [b if picked else a for picked, a, b in pairs]

  return one._replace(
    by=each("by"),
    images=np.where(pick[:, None, None, None], other.images, one.images),
    verdicts=each("verdicts"),
    residuals=np.where(pick, other.residuals, one.residuals),
    reasons=each("reasons"),
    labels=np.where(pick, other.labels, one.labels),
    factor=other.factor if one.factor is None else one.factor,
  )
