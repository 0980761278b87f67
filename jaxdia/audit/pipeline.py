"""The audit of one update: diagnosis, then what can be tried on it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from jaxdia.audit.attempts import Rebuilt, better, by_algebra, by_search
from jaxdia.audit.diagnosis import TURNED, diagnose, negative, tells_sign
from jaxdia.audit.schema import VERDICTS, Attempt, Finding
from jaxdia.client import Observation
from jaxdia.core.types import Key
from jaxdia.models import DropoutModel, evaluation_mode

# The largest deviation of a factor from 1 that is not worth a word.
_NEARLY_1 = 1e-2
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
  seen = diagnosis.observation
  if not diagnosis.training:
    model, seen = evaluation_mode(model), dataclasses.replace(seen, averages=None)
  # Each of these may be what the client computed; the stated one is tried first.
  signs = (1,) if tells_sign(model, seen) else (1, -1)
  attempts: list[Attempt] = []
  best, turned = None, False
  for sign in signs:
    if sign < 0:
      say("nothing sure was found; the opposite sign is tried")
    guess = seen if sign > 0 else negative(seen)
    made: list[Attempt] = []
    found = _try(key, model, guess, diagnosis.rounding, seconds / len(signs), made, say)
    attempts += made if sign > 0 else [_of_the_opposite(attempt) for attempt in made]
    if found is not None and (best is None or _sureness(found) > _sureness(best)):
      best, turned = found, sign < 0
    if best is not None and _is_sure(best):
      break
  if best is not None and best.factor is not None:
    turned ^= best.factor < 0
    findings += _factor(abs(best.factor), observation)
  if turned and best is not None:
    findings.append(TURNED if "certain" in best.verdicts else _MAYBE_TURNED)
  return AuditResult(findings, attempts, best)


def _try(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  rounding: float,
  seconds: float,
  attempts: list[Attempt],
  say: Callable[[str], None],
) -> Rebuilt | None:
  """Tries linear algebra, then a search for what that leaves; notes each attempt."""
  attempt, recovery, found = by_algebra(key, model, observation, rounding)
  attempts.append(attempt)
  say(f"closed form: {attempt.outcome}")
  if seconds > 0 and not (found and set(found.verdicts) == {"certain"}):
    compared = f", comparing {len(observation.averages)} averages" if observation.averages else ""
    say(f"searching for about {seconds:g} s{compared}")
    attempt, searched = by_search(key, model, observation, recovery, seconds, say)
    attempts.append(attempt)
    say(f"{attempt.name}: {attempt.outcome}")
    found = searched if found is None else better(found, searched)
  return found


def _of_the_opposite(attempt: Attempt) -> Attempt:
  return msgspec.structs.replace(attempt, outcome=f"of the opposite sign: {attempt.outcome}")


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
