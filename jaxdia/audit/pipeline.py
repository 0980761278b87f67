"""The audit of one update: diagnosis, then what can be tried on it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from jaxdia.audit.attempts import LIKELY, Rebuilt, better, by_algebra, by_search
from jaxdia.audit.diagnosis import TURNED, diagnose, negative, tells_sign
from jaxdia.audit.mode import mode_finding
from jaxdia.audit.schema import VERDICTS, Attempt, Finding
from jaxdia.client import Observation
from jaxdia.closed_form import Recovery
from jaxdia.core.types import Key
from jaxdia.models import DropoutModel, evaluation_mode

# The largest deviation of a factor from 1 that is not worth a word.
_NEARLY_1 = 1e-2
# Where the mode does not show, a search in the stated one has this share of the time.
_OF_STATED = 0.75
_MAYBE_TURNED = Finding(
  name="sign",
  effect="noted",
  text="which sign of the update is right does not show; more was found with the opposite one, as"
  " of new weights minus old ones.",
)


class AuditResult(NamedTuple):
  """What an audit found of one update.

  Attributes:
    findings: of the diagnosis.
    attempts: in their order.
    found: the best of them; None if nothing could be tried.
  """

  findings: list[Finding]
  attempts: list[Attempt]
  found: Rebuilt | None


def audit(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  *,
  seconds: float = 60.0,
  training: bool = True,
  rounding: float = 0.0,
  say: Callable[[str], None] = print,
) -> AuditResult:
  """Audits one update: diagnosis, linear algebra, and a search for what that leaves.

  Args:
    key: random key.
    model: the network, in training mode.
    observation: params, gradient and what else the server knows; the gradient as it came.
    seconds: for the search; 0 for none.
    training: whether the client is said to have dropout on.
    rounding: share of the gradient that is known to be rounding.
    say: called with what a person should read meanwhile.

  Returns:
    What was found.

  Raises:
    InputError: no layer of the gradient can be used, or weights are not finite.
  """
  diagnosis = diagnose(model, observation, rounding, training=training)
  findings = list(diagnosis.findings)
  for finding in findings:
    say(f"{finding.name}: {finding.text}")
  if diagnosis.stops:
    return AuditResult(findings, [], None)
  seen, stated = diagnosis.observation, diagnosis.training
  # Each of these may be what the client computed; the stated one is tried first.
  signs = (1,) if tells_sign(model, seen) else (1, -1)
  modes = (stated,)
  if not diagnosis.mode_shows and evaluation_mode(model) is not model:
    modes = (stated, not stated)
  attempts: list[Attempt] = []
  best, turned, mode = None, False, stated
  for training, sign in itertools.product(modes, signs):
    if training not in modes:  # which has shown meanwhile
      break
    others = ["the opposite sign"] * (sign < 0) + [_mode_name(training)] * (training != stated)
    other = " in ".join(others)
    if other:
      say(f"nothing sure was found; {other} is tried")
    guess = seen if sign > 0 else negative(seen)
    tried = model
    if not training:
      tried, guess = evaluation_mode(model), dataclasses.replace(guess, averages=None)
    attempt, recovery, found = by_algebra(key, tried, guess, diagnosis.rounding)
    made = [attempt]
    say(f"closed form: {attempt.outcome}")
    if _tells_masks(recovery):
      modes = (training,)
    if seconds > 0 and not (found and set(found.verdicts) == {"certain"}):
      share = 1.0 if len(modes) == 1 else _OF_STATED if training == stated else 1 - _OF_STATED
      budget = seconds * share / len(signs)
      attempt, found = _search(key, tried, guess, recovery, found, budget, say)
      made.append(attempt)
    attempts += [_of(other, attempt) for attempt in made] if other else made
    if found is not None and (best is None or _sureness(found) > _sureness(best)):
      best, turned, mode = found, sign < 0, training
    if best is not None and _is_sure(best):
      break
  if best is not None and mode != stated:
    findings.append(_other_mode(mode, best))
  elif best is not None and not diagnosis.mode_shows and _needs_no_masks(best, attempts):
    findings.append(mode_finding(False, "the images explain the whole update without dropout"))
  if best is not None and best.factor is not None:
    turned ^= best.factor < 0
    if "noise" not in {finding.name for finding in findings}:  # which is a part of that factor
      findings += _factor(abs(best.factor), observation)
  if turned and best is not None:
    findings.append(TURNED if "certain" in best.verdicts else _MAYBE_TURNED)
  return AuditResult(findings, attempts, best)


def _search(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  recovery: Recovery | None,
  found: Rebuilt | None,
  seconds: float,
  say: Callable[[str], None],
) -> tuple[Attempt, Rebuilt]:
  """Searches what linear algebra leaves; returns the attempt, and the surer of both results."""
  compared = f", comparing {len(observation.averages)} averages" if observation.averages else ""
  say(f"searching for about {seconds:g} s{compared}")
  attempt, searched = by_search(key, model, observation, recovery, seconds, say)
  say(f"{attempt.name}: {attempt.outcome}")
  return attempt, searched if found is None else better(found, searched)


def _tells_masks(recovery: Recovery | None) -> bool:
  """Returns whether masks are known, which are then such as dropout draws: it was on."""
  return recovery is not None and any(map(np.any, recovery.parts.known_masks.values()))


def _of(other: str, attempt: Attempt) -> Attempt:
  return msgspec.structs.replace(attempt, outcome=f"of {other}: {attempt.outcome}")


def _mode_name(training: bool) -> str:
  return "training mode" if training else "evaluation mode"


def _other_mode(training: bool, found: Rebuilt) -> Finding:
  """Returns what is said of a mode in which more was found than in the stated one."""
  if _is_sure(found):
    return mode_finding(training, "only so the update is explained")
  text = f"which mode is right does not show; more was found in {_mode_name(training)}."
  return Finding(name=_mode_name(training), effect="noted", text=text)


def _needs_no_masks(found: Rebuilt, attempts: list[Attempt]) -> bool:
  """Returns whether a whole update is explained by images behind masks of which none is known.

  Those are then the expected ones, with which a network computes as in evaluation mode.
  """
  shares, residual = found.masks.values(), attempts[0].residual
  return bool(shares) and not any(shares) and residual is not None and residual < LIKELY


def _is_sure(found: Rebuilt) -> bool:
  return bool({"certain", "likely"} & set(found.verdicts))


def _sureness(found: Rebuilt) -> int:
  """Returns a number that is larger for results with surer images."""
  order = list(VERDICTS)
  return -sum(order.index(verdict) for verdict in found.verdicts)


def _factor(size: float, observation: Observation) -> list[Finding]:
  """Returns what a factor of the whole gradient tells."""
  if abs(size - 1) <= _NEARLY_1:
    return []
  batch_size, loss = observation.batch_size, observation.loss
  causes = "another learning rate or batch size, a loss of another scale, or clipping"
  by_size = {"mean": (batch_size, "summed over the batch, not averaged")}
  by_size["sum"] = (1 / batch_size, "averaged over the batch, not summed")
  expected, text = by_size[loss.reduction]
  if batch_size > 1 and abs(size - expected) <= _NEARLY_1 * expected:
    causes = f"most likely the loss was {text}"
  text = f"the update is {size:.4g} times the gradient of the stated loss: {causes}."
  return [Finding(name="factor", effect="mended", text=text, value=size)]
