"""Finished trials on disk: the best candidate of each batch, and how each restart went."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxdia.attacks import Candidate, Status
from jaxdia.closed_form import Parts, Recovery
from jaxdia.core.errors import InputError
from jaxdia.core.files import UnreadableFile, read_npz, write_npz
from jaxdia.core.types import Masks
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


class Origin(NamedTuple):
  """What of a result a closed form gave; images in the order of the candidate.

  Attributes:
    verdict: i[B], a `jaxdia.closed_form.Verdict` on each image.
    residual: f[B], NaN where nothing was recovered.
    labels: i[B].
    known_labels: b[B], which of them belong to the image in their place.
    known_masks: {site: b[shape]}.
    features: dense layers, by path, whose inputs were recovered for some image.
    reason: why there is not more; empty if all is exact.
    seconds: that it took.
  """

  verdict: np.ndarray
  residual: np.ndarray
  labels: np.ndarray
  known_labels: np.ndarray
  known_masks: Masks
  features: tuple[str, ...]
  reason: str
  seconds: float


class Outcome(NamedTuple):
  """The finished trials of one observation.

  Attributes:
    candidate: of the trial with the best objective.
    records: of all finished trials.
    images: {restart: f[B, H, W, C]}, the best of each trial.
    recording: {iterations: f[B, H, W, C]}, the best ones after so many, of the
      trial with the best objective.
    origin: for an attack with a closed form.
  """

  candidate: Candidate
  records: tuple[Record, ...]
  images: dict[int, np.ndarray]
  recording: dict[int, np.ndarray]
  origin: Origin | None = None

  @property
  def best(self) -> Record:
    """Returns the record of the trial with the best objective."""
    return min(self.records, key=lambda record: record.objective)

  @property
  def failed(self) -> bool:
    """Returns whether no trial ever measured a finite objective."""
    return not np.isfinite(self.best.objective)


def origin(recovery: Recovery, seconds: float) -> Origin:
  """Returns what is kept of a closed form besides images and masks.

  Args:
    recovery: its result.
    seconds: that it took.
  """
  parts = recovery.parts
  return Origin(
    verdict=np.asarray(parts.verdict),
    residual=np.asarray(recovery.residual),
    labels=np.asarray(parts.labels),
    known_labels=np.asarray(parts.known_labels),
    known_masks={site: np.asarray(known) for site, known in parts.known_masks.items()},
    features=tuple("/".join(path) for path, known in parts.known_features.items() if known.any()),
    reason=recovery.reason,
    seconds=seconds,
  )


def merge(outcome: Outcome | None, trial: Trial, session: int = 0) -> Outcome:
  """Returns an outcome with one more trial.

  Args:
    outcome: of the trials before; None if there were none.
    trial: of the same observation.
    session: that ran it.
  """
  record = Record(
    trial.job.restart,
    trial.objective,
    trial.distance,
    trial.iterations,
    trial.best_iteration,
    trial.status,
    trial.seconds,
    session,
  )
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
  if outcome.origin is not None:
    for name, value in outcome.origin._asdict().items():
      if name == "known_masks":
        arrays |= {f"origin/masks/{site}": known for site, known in value.items()}
      else:
        arrays[f"origin/{name}"] = np.asarray(value, str) if name == "features" else value
  _write(path, arrays)


def _write(path: pathlib.Path, arrays: dict[str, Any]) -> None:
  # The names once more, so that none can be lost without being missed.
  write_npz(path, arrays | {"names": np.asarray(sorted(arrays))})


def _read(path: pathlib.Path, what: str) -> dict[str, np.ndarray] | None:
  if not path.exists():
    return None
  try:
    arrays = read_npz(path)
    if sorted(set(arrays) - {"names"}) != arrays.get("names", np.array([])).tolist():
      raise UnreadableFile("arrays are missing")
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
  arrays = {name: value for name, value in recovery._asdict().items() if name != "parts"}
  arrays["seconds"] = seconds
  for name, value in recovery.parts._asdict().items():
    if isinstance(value, dict):
      keys = {key: key if isinstance(key, str) else "/".join(key) for key in value}
      arrays |= {f"{name}/{keys[key]}": array for key, array in value.items()}
    else:
      arrays[name] = value
  _write(path, arrays)


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
  if arrays is None:
    return None
  fields = {}
  for name in Parts._fields:
    if name in arrays:
      fields[name] = arrays[name]
      continue
    inside = {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}
    by_path = name in ("features", "known_features")
    fields[name] = {tuple(k.split("/")) if by_path else k: v for k, v in inside.items()}
  recovery = Recovery(
    Parts(**fields),
    arrays["residual"],
    str(arrays["reason"]),
    float(arrays["scale"]),
    arrays["error"],
  )
  return recovery, float(arrays["seconds"])


def load(path: pathlib.Path) -> Outcome | None:
  """Reads what `save` wrote; None if there is no file.

  Raises:
    InputError: the file is damaged.
  """
  arrays = _read(path, "finished result")
  if arrays is None:
    return None
  masks = {k.removeprefix("masks/"): v for k, v in arrays.items() if k.startswith("masks/")}
  records = tuple(
    Record(int(r[0]), r[1], r[2], int(r[3]), int(r[4]), Status(int(r[5])), r[6], int(r[7]))
    for r in arrays["records"].tolist()
  )
  candidate = Candidate(arrays["images"], masks or None, arrays.get("labels"))
  images = {r.restart: x for r, x in zip(records, arrays["restarts"], strict=True)}
  recording = dict(zip(arrays["iterations"].tolist(), arrays["recording"], strict=True))
  return Outcome(candidate, records, images, recording, _load_origin(arrays))


def _load_origin(arrays) -> Origin | None:
  if "origin/verdict" not in arrays:
    return None
  prefix = "origin/masks/"
  known = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
  fields = {n: arrays[f"origin/{n}"] for n in Origin._fields if n != "known_masks"}
  fields |= {
    "features": tuple(fields["features"].tolist()),
    "reason": str(fields["reason"]),
    "seconds": float(fields["seconds"]),
  }
  return Origin(known_masks=known, **fields)
