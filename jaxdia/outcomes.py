"""Finished trials on disk: the best candidate of each batch, and how each restart went."""

import pathlib
from typing import NamedTuple

import numpy as np

from jaxdia.attacks import Candidate, Status
from jaxdia.engine import Trial
from jaxdia.errors import InputError
from jaxdia.files import UnreadableFile, read_npz, write_npz


class Record(NamedTuple):
  """How one trial went; see `jaxdia.engine.Trial`."""

  restart: int
  objective: float
  distance: float
  iterations: int
  best_iteration: int
  status: Status
  seconds: float


class Outcome(NamedTuple):
  """The finished trials of one observation.

  Attributes:
    candidate: of the trial with the best objective.
    records: of all finished trials.
  """

  candidate: Candidate
  records: tuple[Record, ...]

  @property
  def best(self) -> Record:
    """Returns the record of the trial with the best objective."""
    return min(self.records, key=lambda record: record.objective)

  @property
  def failed(self) -> bool:
    """Returns whether no trial ever measured a finite objective."""
    return not np.isfinite(self.best.objective)


def merge(outcome: Outcome | None, trial: Trial) -> Outcome:
  """Returns an outcome with one more trial.

  Args:
    outcome: of the trials before; None if there were none.
    trial: of the same observation.
  """
  record = Record(
    trial.job.restart,
    trial.objective,
    trial.distance,
    trial.iterations,
    trial.best_iteration,
    trial.status,
    trial.seconds,
  )
  if outcome is None:
    return Outcome(trial.candidate, (record,))
  better = record.objective < outcome.best.objective
  candidate = trial.candidate if better else outcome.candidate
  return Outcome(candidate, (*outcome.records, record))


def save(path: pathlib.Path, outcome: Outcome) -> None:
  """Writes an outcome atomically as an npz file."""
  candidate = outcome.candidate
  arrays = {"images": candidate.images, "records": np.asarray(outcome.records, np.float64)}
  if candidate.labels is not None:
    arrays["labels"] = candidate.labels
  arrays |= {f"masks/{site}": mask for site, mask in (candidate.masks or {}).items()}
  # The names once more, so that none can be lost without being missed.
  write_npz(path, arrays | {"names": np.asarray(sorted(arrays))})


def load(path: pathlib.Path) -> Outcome | None:
  """Reads what `save` wrote; None if there is no file.

  Raises:
    InputError: the file is damaged.
  """
  if not path.exists():
    return None
  try:
    arrays = read_npz(path)
    if sorted(set(arrays) - {"names"}) != arrays.get("names", np.array([])).tolist():
      raise UnreadableFile("arrays are missing")
  except UnreadableFile as error:
    raise InputError(
      f"the finished result {path} is damaged ({error}). Delete it to run these trials again; all"
      " others are kept."
    ) from error
  masks = {k.removeprefix("masks/"): v for k, v in arrays.items() if k.startswith("masks/")}
  records = tuple(
    Record(int(r[0]), r[1], r[2], int(r[3]), int(r[4]), Status(int(r[5])), r[6])
    for r in arrays["records"].tolist()
  )
  return Outcome(Candidate(arrays["images"], masks or None, arrays.get("labels")), records)
