"""The audit of one update: diagnosis, then what can be tried on it."""

from collections.abc import Callable
from typing import NamedTuple

from jaxdia.audit.attempts import Found, better, by_algebra, by_search
from jaxdia.audit.diagnosis import diagnose
from jaxdia.audit.schema import Attempt, Finding
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
  attempt, recovery, found = by_algebra(key, model, diagnosis.observation)
  attempts = [attempt]
  say(f"closed form: {attempt.outcome}")
  if seconds > 0 and not (found and all(v == "certain" for v in found.verdicts)):
    say(f"searching for about {seconds:g} s")
    attempt, searched = by_search(key, model, diagnosis.observation, recovery, seconds, say)
    attempts.append(attempt)
    say(f"{attempt.name}: {attempt.outcome}")
    found = searched if found is None else better(found, searched)
  if found is not None and found.factor is not None:
    findings += _factor(found.factor, observation.batch_size)
  return Outcome(findings, attempts, found)


def _factor(factor: float, batch_size: int) -> list[Finding]:
  if abs(factor - 1) <= _NEARLY_1:
    return []
  causes = "another learning rate, a loss of another scale, or clipping"
  if batch_size > 1 and abs(factor - batch_size) <= _NEARLY_1 * batch_size:
    causes = "the loss was summed over the batch, not averaged"
  text = f"the update is {factor:.4g} times the gradient of the stated loss: {causes}."
  return [Finding(name="factor", effect="mended", text=text, value=factor)]
