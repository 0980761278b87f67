"""How the report writes names, numbers and settings."""

import json
import shlex
from typing import Any

from jaxdia import evaluation
from jaxdia.evaluation import Metric
from jaxdia.experiment.table import format_number


def metric(name: str) -> Metric:
  """Returns a metric as it is shown, also one of the best restarts by the truth: oracle.METRIC."""
  shown = evaluation.find(name.removeprefix("oracle."))
  if name == shown.name:
    return shown
  meaning = "of the restarts that the truth would choose; no attacker can choose so"
  label = f"{shown.label}, best restart"
  return Metric(name=name, label=label, meaning=meaning, unit=shown.unit)


def number(name: str, value: float | None) -> str:
  """Returns a number of a metric as text, rounded.

  Args:
    name: of the metric.
    value: None if there is none.
  """
  return format_number(name, "", value)


def text(value: Any) -> str:
  """Returns the value of a setting as text: strings as they are, all else as JSON."""
  return value if isinstance(value, str) else json.dumps(value)


def command(value: Any) -> str | None:
  """Returns the command of a manifest as it is typed, or None if it was not recorded."""
  return shlex.join(map(str, value)) if isinstance(value, list) else value


def attack_label(name: str) -> str:
  """Returns the name of an attack as it is written in the report."""
  return name.upper().replace("_", " ")


def is_number(value: Any) -> bool:
  """Returns whether a value of JSON is a number, which true and false are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)
