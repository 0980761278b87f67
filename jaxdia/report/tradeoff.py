"""What protection costs: test accuracy against the most that leaked."""

from typing import NamedTuple

from jaxdia.report.results import CellResults, StudyResults
from jaxdia.report.words import text

# What leaks is measured by it.
METRIC = "ssim"
# These are no part of how clients train: an attacker chooses among them.
_CHOSEN_BY_ATTACKER = ("attack.", "training.attacked_after", "seed")


class Point(NamedTuple):
  """One way to train.

  Attributes:
    settings: that tell it from the others, as text.
    accuracy: on images for tests, after the training.
    leakage: the largest median SSIM of an attack at any time of the training that was attacked. A
      better attack may see more.
    attack: which.
    best: whether no other is as accurate and leaks less, or leaks as little and is more accurate.
  """

  settings: str
  accuracy: float
  leakage: float
  attack: str
  best: bool


def find_tradeoff(study: StudyResults) -> list[Point]:
  """Returns a point for each way to train of which the accuracy was measured, or none for one way.

  Args:
    study: of which cells may be missing.
  """
  found: dict[str, list[tuple[float, float, str]]] = {}
  told = _told(study)
  for cell in study.done:
    for attack, summary in cell.summary.items():
      leakage = summary.number(METRIC, "median")
      if summary.accuracy is not None and leakage is not None:
        found.setdefault(_of_clients(cell, told), []).append((leakage, summary.accuracy, attack))
  most = {settings: max(values) for settings, values in found.items()}
  points = [
    Point(settings, accuracy, leakage, attack, _is_best(accuracy, leakage, most.values()))
    for settings, (leakage, accuracy, attack) in most.items()
  ]
  return sorted(points, key=lambda point: point.accuracy) if len(points) > 1 else []


def _of_clients(cell: CellResults, told: set[str]) -> str:
  """Returns the settings of a cell that tell its clients from others, as text."""
  return ", ".join(
    text(value) if name == "defence.name" else f"{name.rpartition('.')[2]} {text(value)}"
    for name, value in cell.entry.overrides.items()
    if name in told
  )


def _told(study: StudyResults) -> set[str]:
  """Returns the settings of clients that have several values."""
  values: dict[str, set[str]] = {}
  for cell in study.done:
    for name, value in cell.entry.overrides.items():
      values.setdefault(name, set()).add(text(value))
  several = {name for name, found in values.items() if len(found) > 1}
  return {name for name in several if not name.startswith(_CHOSEN_BY_ATTACKER)}


def _is_best(accuracy, leakage, others) -> bool:
  return not any(
    (other_leakage <= leakage and other_accuracy > accuracy)
    or (other_leakage < leakage and other_accuracy >= accuracy)
    for other_leakage, other_accuracy, _ in others
  )
