"""Finished trials on disk: the best candidate of each batch, and how each restart went."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxdia.attacks import Candidate, Status
from jaxdia.closed_form import Parts, Recovery
from jaxdia.core.errors import InputError
from jaxdia.core.files import UnreadableFile, read_npz, write_npz
from jaxdia.core.types import HostImages
from jaxdia.engine import Trial


class Record(NamedTuple):
  """How one trial went, and in which session; see `jaxdia.engine.Trial`."""

  restart: int
  objective: float
  distance: float
  iterations: int
  best_iteration: int
  status: Status
  seconds: float
  session: int = 0


class Outcome(NamedTuple):
  """The finished trials of one observation.

  Attributes:
    candidate: of the trial with the best objective.
    records: of all finished trials.
    images: {restart: f[B, H, W, C]}, the best of each trial.
    recording: {iterations: f[B, H, W, C]}, the best ones after so many, of the
      trial with the best objective.
    recovery: for an attack with a closed form; once on disk, without features.
    recovery_seconds: that it took.
    alone: what linear algebra gave, if that is the whole result (`Attack.has_verdicts`); not on
      disk.
  """

  candidate: Candidate
  records: tuple[Record, ...]
  images: dict[int, HostImages]
  recording: dict[int, HostImages]
  recovery: Recovery | None = None
  recovery_seconds: float = 0.0
  alone: Parts | None = None

  @property
  def best(self) -> Record:
    """Returns the record of the trial with the best objective."""
    return min(self.records, key=lambda record: record.objective)

  @property
  def failed(self) -> bool:
    """Returns whether no trial ever measured a finite objective."""
    return not np.isfinite(self.best.objective)

  @property
  def found(self) -> Bool[np.ndarray, " batch"] | None:
    """Returns b[B], which images of the candidate are there; None if all are."""
    return None if self.alone is None else np.asarray(self.alone.verdict) > 0


def merge(outcome: Outcome | None, trial: Trial, session: int = 0) -> Outcome:
  """Returns an outcome with one more trial.

  Args:
    outcome: of the trials before; None if there were none.
    trial: of the same observation.
    session: that ran it.
  """
  shared = {name: getattr(trial, name) for name in Record._fields if name in Trial._fields}
  record = Record(restart=trial.job.restart, session=session, **shared)
  images = {record.restart: np.asarray(trial.candidate.images)}
  if outcome is None:
    return Outcome(trial.candidate, (record,), images, trial.recording)
  if record.objective < outcome.best.objective:
    outcome = outcome._replace(candidate=trial.candidate, recording=trial.recording)
  return outcome._replace(records=(*outcome.records, record), images=outcome.images | images)


def save(path: pathlib.Path, outcome: Outcome) -> None:
  """Writes an outcome atomically as an npz file."""
  candidate = outcome.candidate
  arrays: dict[str, Any] = {
    "images": candidate.images,
    "recording": np.asarray(list(outcome.recording.values())),
    "iterations": np.asarray(list(outcome.recording), np.int32),
    "restarts": np.stack([outcome.images[record.restart] for record in outcome.records]),
    "records": np.asarray(outcome.records, np.float64),
  }
  if candidate.labels is not None:
    arrays["labels"] = candidate.labels
  arrays |= {f"masks/{site}": mask for site, mask in (candidate.masks or {}).items()}
  if outcome.recovery is not None:
    recovery = outcome.recovery._replace(parts=outcome.recovery.parts._replace(features={}))
    kept = _to_arrays(recovery, outcome.recovery_seconds)
    arrays |= {f"recovery/{name}": value for name, value in kept.items()}
  _write(path, arrays)


def _write(path: pathlib.Path, arrays: dict[str, Any]) -> None:
  # What they are once more, so that none can be lost or be another without being missed.
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  write_npz(path, arrays | {"names": np.asarray(_forms(arrays))})


def _forms(arrays: Mapping[str, np.ndarray]) -> list[str]:
  """Returns the names of arrays with their types and shapes."""
  return sorted(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())


def _read(path: pathlib.Path, what: str) -> dict[str, np.ndarray] | None:
  if not path.exists():
    return None
  try:
    arrays = read_npz(path)
    names = arrays.pop("names", np.array([])).tolist()
    if names not in (_forms(arrays), sorted(arrays)):  # the names alone, before 0.2
      raise UnreadableFile("arrays are missing, or others")
  except UnreadableFile as error:
    raise InputError(
      f"the {what} {path} is damaged ({error}). Delete it to compute it again; all others are kept."
    ) from error
  return arrays


def save_recovery(path: pathlib.Path, recovery: Recovery, seconds: float) -> None:
  """Writes a closed form atomically as an npz file.

  Args:
    path: of the file.
    recovery: the closed form.
    seconds: that it took.
  """
  _write(path, _to_arrays(recovery, seconds))


def load_recovery(path: pathlib.Path) -> tuple[Recovery, float] | None:
  """Reads what `save_recovery` wrote; None if there is no file.

  Args:
    path: of the file.

  Returns:
    The closed form, and the seconds that it took.

  Raises:
    InputError: the file is damaged.
  """
  arrays = _read(path, "closed form")
  return None if arrays is None else _from_arrays(arrays)


def _to_arrays(recovery: Recovery, seconds: float) -> dict[str, Any]:
  """Returns a closed form as arrays by name; what is by site or layer has that after a slash."""
  arrays: dict[str, Any] = {"seconds": seconds}
  for name, value in (recovery._asdict() | recovery.parts._asdict()).items():
    if isinstance(value, dict):
      keys = {key: key if isinstance(key, str) else "/".join(key) for key in value}
      arrays |= {f"{name}/{keys[key]}": array for key, array in value.items()}
    elif name != "parts":
      arrays[name] = value
  return arrays


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[Recovery, float]:
  """Returns what `_to_arrays` was given."""
  fields: dict[str, Any] = {}
  for name in Parts._fields:
    by_path = name in ("features", "known_features")
    inside = _inside(arrays, name)
    nested = {tuple(k.split("/")) if by_path else k: v for k, v in inside.items()}
    fields[name] = arrays.get(name, nested)
  # Older files lack some, which have defaults.
  rest = {name: arrays[name] for name in Recovery._fields if name in arrays}
  numbers = {name: value if value.ndim else value.item() for name, value in rest.items()}
  return Recovery(parts=Parts(**fields), **numbers), arrays["seconds"].item()


def _inside(arrays: Mapping[str, np.ndarray], group: str) -> dict[str, np.ndarray]:
  """Returns the arrays whose names begin with a group and a slash, without these."""
  prefix = f"{group}/"
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def load(path: pathlib.Path) -> Outcome | None:
  """Reads what `save` wrote; None if there is no file.

  Raises:
    InputError: the file is damaged.
  """
  arrays = _read(path, "finished result")
  if arrays is None:
    return None
  kinds = Record.__annotations__.values()
  records = tuple(
    Record(*(kind(x) for kind, x in zip(kinds, record, strict=True)))
    for record in arrays["records"].tolist()
  )
  candidate = Candidate(arrays["images"], _inside(arrays, "masks") or None, arrays.get("labels"))
  images = {r.restart: x for r, x in zip(records, arrays["restarts"], strict=True)}
  recording = dict(zip(arrays["iterations"].tolist(), arrays["recording"], strict=True))
  recovered = _inside(arrays, "recovery")
  recovery = _from_arrays(recovered) if recovered else (None, 0.0)
  return Outcome(candidate, records, images, recording, *recovery)
