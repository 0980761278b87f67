"""The audit of one update: diagnosis, then what can be tried on it."""

from collections.abc import Callable
from typing import NamedTuple

from jaxdia.audit.attempts import Found, better, by_algebra, by_search
from jaxdia.audit.diagnosis import TURNED, diagnose, negative, tells_sign
from jaxdia.audit.schema import VERDICTS, Attempt, Finding
from jaxdia.client import Observation
from jaxdia.core.types import Key
from jaxdia.models import DropoutModel, evaluation_mode

# The largest deviation of a factor from 1 that is not worth a word.
_NEARLY_1 = 1e-2


class Outcome(NamedTuple):
  """What an audit found of one update.

  Attributes:
    findings: of the diagnosis.
    attempts: in their order.
    found: the best of them; None if nothing could be tried.
  """

  findings: list[Finding]
  attempts: list[Attempt]
  found: Found | None


def audit(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  *,
  seconds: float = 60.0,
  training: bool = True,
  rounding: float = 0.0,
  say: Callable[[str], None] = print,
) -> Outcome:
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
    InputError: no layer of the gradient can be used.
  """
  diagnosis = diagnose(model, observation, rounding)
  findings = list(diagnosis.findings)
  for finding in findings:
    say(f"{finding.name}: {finding.text}")
  if diagnosis.stops:
    return Outcome(findings, [], None)
  on = training if diagnosis.training is None else diagnosis.training
  if on and not training:
    text = "units are zero as dropout leaves them: the gradient was computed in training mode."
    findings.append(Finding(name="training mode", effect="mended", text=text))
  model = model if on else evaluation_mode(model)
  seen = diagnosis.observation
  # Each of these may be what the client computed; the stated one is tried first.
  guesses = [([], seen)] if tells_sign(model, seen) else [([], seen), ([TURNED], negative(seen))]
  attempts, best, mended = [], None, []
  for changes, one in guesses:
    found = _try(key, model, one, seconds / len(guesses), attempts, say)
    if found is not None and (best is None or _sureness(found) > _sureness(best)):
      best, mended = found, changes
    if best is not None and {"certain", "likely"} & set(best.verdicts):
      break
  findings += mended
  if best is not None and best.factor is not None:
    findings += _factor(best.factor, observation.batch_size)
  return Outcome(findings, attempts, best)


def _try(
  key: Key,
  model: DropoutModel,
  observation: Observation,
  seconds: float,
  attempts: list[Attempt],
  say: Callable[[str], None],
) -> Found | None:
  """Tries linear algebra, then a search for what that leaves; notes each attempt."""
  attempt, recovery, found = by_algebra(key, model, observation)
  attempts.append(attempt)
  say(f"closed form: {attempt.outcome}")
  if seconds > 0 and not (found and set(found.verdicts) == {"certain"}):
    say(f"searching for about {seconds:g} s")
    attempt, searched = by_search(key, model, observation, recovery, seconds, say)
    attempts.append(attempt)
    say(f"{attempt.name}: {attempt.outcome}")
    found = searched if found is None else better(found, searched)
  return found


def _sureness(found: Found) -> int:
  """Returns a number that is larger for results with surer images."""
  order = list(VERDICTS)
  return -sum(order.index(verdict) for verdict in found.verdicts)


def _factor(factor: float, batch_size: int) -> list[Finding]:
  """Returns what a factor of the whole gradient tells."""
  turned = [TURNED] if factor < 0 else []
  size = abs(factor)
  if abs(size - 1) <= _NEARLY_1:
    return turned
  causes = "another learning rate, a loss of another scale, or clipping"
  if batch_size > 1 and abs(size - batch_size) <= _NEARLY_1 * batch_size:
    causes = "the loss was summed over the batch, not averaged"
  text = f"the update is {size:.4g} times the gradient of the stated loss: {causes}."
  return [*turned, Finding(name="factor", effect="mended", text=text, value=size)]
