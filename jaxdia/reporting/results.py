"""Finished results, read back from disk: an experiment is a study of one cell."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import UnreadableFile, read_npz

COUNTS = ("attempted", "finished", "failed", "not_applicable")
_QUESTION = (
  "What could an honest-but-curious server see of the images that a client trained on,"
  " from the gradient that the client sent?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One experiment of a study; of one that is not done only the first fields are filled.

  Attributes:
    name: of its folder.
    overrides: settings in which it differs from the study's config.
    status: "done", "failed" or "pending".
    reason: why it failed.
    seconds: that it took, if known.
    directory: where its files are.
    config: as in config.json.
    manifest: as in manifest.json; empty if there is none.
    summary: as in summary.json, by attack.
    floors: metrics of guesses that need no gradient, by name of the guess.
    rows: as in results.jsonl.
  """

  name: str
  overrides: dict[str, Any]
  status: str
  reason: str | None
  seconds: float | None
  directory: pathlib.Path
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
  summary: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  floors: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def number(self, attack: str, metric: str, statistic: str) -> float | None:
    """Returns one number of the summary, or None where it has none.

    Args:
      attack: one of the summary.
      metric: of the summary's `metrics`; "oracle.METRIC" for the best restarts by the truth;
        "images" for the counts; one that ends in "_by_site", with the site as statistic; or,
        with "value" as statistic, a number such as "iip".
      statistic: "median" and the like, "ci95_low", "ci95_high", or "success_at_T": the share
        of images that are at least as close as the threshold T.
    """
    summary = self.summary[attack]
    if metric == "images":
      return summary[statistic]
    if metric.endswith("_by_site"):
      return (summary.get(metric) or {}).get(statistic)
    if statistic == "value":
      return summary.get(metric)
    if statistic.startswith("success_at_"):
      success = (summary.get("success") or {}).get(metric) or {"thresholds": [], "rate": []}
      threshold = float(statistic.removeprefix("success_at_"))
      pairs = zip(success["thresholds"], success["rate"], strict=True)
      return next((rate for t, rate in pairs if math.isclose(t, threshold, abs_tol=1e-9)), None)
    group = summary["metrics"]
    if metric.startswith("oracle."):
      group, metric = summary.get("oracle") or {}, metric.removeprefix("oracle.")
    statistics = group.get(metric) or {}
    if statistic in ("ci95_low", "ci95_high"):
      return (statistics.get("ci95") or (None, None))[statistic == "ci95_high"]
    return statistics.get(statistic)

  def rows_of(self, attack: str) -> list[dict[str, Any]]:
    """Returns the results of one attack."""
    return [row for row in self.rows if row["attack"] == attack]

  def ssim_of(self, attack: str) -> dict[int, float | None]:
    """Returns the SSIM of one attack, by place of the image in `reconstructions.npz`."""
    data = self.config["data"]
    first, count = data.get("offset") or 0, data.get("count") or 0
    return {  # all images come once for each seed of the masks
      (row.get("mask_seed") or 0) * count + row["victim"] - first: row.get("ssim")
      for row in self.rows_of(attack)
    }

  def read_images(self) -> dict[str, np.ndarray]:
    """Reads `originals`, f[N, H, W, C], and the reconstructions by attack, NaN where none.

    Raises:
      InputError: the file is missing or damaged.
    """
    path = self.directory / "reconstructions.npz"
    arrays = _read_arrays(path)
    for name in ("originals", *self.summary):
      if name not in arrays:
        raise _damaged(path, f"it lacks {name}")
      if arrays[name].ndim != 4 or arrays[name].shape != arrays["originals"].shape:
        raise _damaged(path, f"{name} has shape {arrays[name].shape}")
    return arrays

  def read_recordings(self) -> dict[str, np.ndarray]:
    """Reads `iterations`, i[K], and by attack u8[M, K, H, W, C]; empty if nothing was recorded.

    Raises:
      InputError: the file is damaged.
    """
    path = self.directory / "recordings.npz"
    if not path.is_file():
      return {}
    arrays = _read_arrays(path)
    if "iterations" not in arrays or arrays["iterations"].ndim != 1:
      raise _damaged(path, "it lacks iterations")
    for name in set(arrays) & set(self.summary):
      shape, dtype = arrays[name].shape, arrays[name].dtype
      if len(shape) != 5 or shape[1] != len(arrays["iterations"]) or dtype != np.uint8:
        raise _damaged(path, f"{name} is {dtype} of shape {shape}")
    return arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What a report is about.

  Attributes:
    title: for people.
    question: that it answers.
    manifest: of the study; empty for an experiment.
    cells: in their order, finished or not.
  """

  title: str
  question: str
  manifest: dict[str, Any]
  cells: list[Cell]

  @property
  def done(self) -> list[Cell]:
    """Returns the cells that have results."""
    return [cell for cell in self.cells if cell.status == "done"]

  @property
  def attacks(self) -> list[str]:
    """Returns the attacks of all cells, each once."""
    return list(dict.fromkeys(attack for cell in self.done for attack in cell.summary))


def read_study(workdir: pathlib.Path) -> Study:
  """Reads the results of a study or of one experiment.

  Args:
    workdir: of either.

  Raises:
    InputError: it is of neither, is not finished, or a file is damaged.
  """
  if (workdir / "study.json").is_file():
    return _read_many(workdir)
  if not (workdir / "config.json").is_file():
    raise InputError(
      f"{workdir} is not the folder of an experiment or a study: it has neither config.json nor"
      " study.json. Give the --workdir of a finished run."
    )
  cell = read_experiment(workdir)
  attacks = ", ".join(name.upper() for name in cell.summary)
  data, model = cell.config["data"], cell.config["model"]
  title = f"{attacks} against {model.get('name')} on {data.get('source')}"
  return Study(title=title, question=_QUESTION, manifest={}, cells=[cell])


def read_experiment(workdir: pathlib.Path) -> Cell:
  """Reads the results of one experiment.

  Args:
    workdir: of the experiment.

  Raises:
    InputError: it is not finished, or a file is damaged.
  """
  name = workdir.resolve().name
  fields = {"overrides": {}, "status": "done", "reason": None, "seconds": None}
  return _read_cell(Cell(name=name, directory=workdir, **fields))


def _read_many(workdir) -> Study:
  path = workdir / "study.json"
  study = _read_object(path)
  cells = []
  for number, entry in enumerate(_field(path, study, "cells", list)):
    if not isinstance(entry, dict):
      raise _damaged(path, f"cell {number} is {entry!r}")
    name = _field(path, entry, "name", str)
    cell = Cell(
      name=name,
      overrides=_field(path, entry, "overrides", dict),
      status=_field(path, entry, "status", str),
      reason=entry.get("reason"),
      seconds=entry.get("seconds"),
      directory=workdir / "cells" / name,
    )
    cells.append(_read_cell(cell) if cell.status == "done" else cell)
  return Study(
    title=_field(path, study, "title", str),
    question=_field(path, study, "question", str),
    manifest=_field(path, study, "manifest", dict),
    cells=cells,
  )


def _read_cell(cell: Cell) -> Cell:
  """Returns a finished cell with its results."""
  config_path, summary_path = cell.directory / "config.json", cell.directory / "summary.json"
  if not summary_path.is_file():
    raise InputError(
      f"{cell.directory} has no summary.json: the experiment is not finished. Run the same command"
      " again; it goes on where it was."
    )
  config = _read_object(config_path)
  for group in ("data", "model", "attacks"):
    _field(config_path, config, group, dict)
  summary = _read_object(summary_path)
  attacks = {k: v for k, v in summary.items() if isinstance(v, dict) and "attempted" in v}
  for name, attack in attacks.items():
    _check_summary(summary_path, name, attack)
  manifest_path = cell.directory / "manifest.json"
  return dataclasses.replace(
    cell,
    config=config,
    manifest=_read_object(manifest_path) if manifest_path.is_file() else {},
    summary=attacks,
    floors=summary.get("floors") or {},
    rows=_read_rows(cell.directory / "results.jsonl"),
  )


def _check_summary(path, name, summary) -> None:
  for count in COUNTS:
    _field(path, summary, count, int)
  statistics_of = _field(path, summary, "metrics", dict).items()
  if summary.get("oracle"):
    statistics_of = [*statistics_of, *_field(path, summary, "oracle", dict).items()]
  for metric, statistics in statistics_of:
    values = list(statistics.values()) if isinstance(statistics, dict) else [statistics]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    if not isinstance(statistics, dict) or not all(map(_is_number_or_none, flat)):
      raise _damaged(path, f"{metric} of {name} is {statistics!r}")
  for metric in summary:
    if metric.endswith("_by_site") and summary[metric]:
      if not all(map(_is_number_or_none, _field(path, summary, metric, dict).values())):
        raise _damaged(path, f"{metric} of {name} is {summary[metric]!r}")
  for metric, success in (summary.get("success") or {}).items():
    rates = _field(path, success, "rate", list) if isinstance(success, dict) else None
    if rates is None or len(_field(path, success, "thresholds", list)) != len(rates):
      raise _damaged(path, f"success of {name} by {metric} is {success!r}")


def is_number(value: Any) -> bool:
  """Returns whether a value of JSON is a number, which true and false are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_number_or_none(value) -> bool:
  return value is None or is_number(value)


def _read_rows(path) -> list[dict[str, Any]]:
  rows = []
  for number, line in enumerate(_read_text(path).splitlines(), 1):
    row = _parse(path, line, f"line {number}: ")
    if not isinstance(row, dict):
      raise _damaged(path, f"line {number} is {row!r}")
    _field(path, row, "attack", str)
    _field(path, row, "victim", int)
    for metric in ("mse_normalized", "ssim", "seconds"):
      if not _is_number_or_none(row.get(metric)):
        raise _damaged(path, f"line {number}: {metric} is {row[metric]!r}")
    rows.append(row)
  return rows


def _read_object(path) -> dict[str, Any]:
  value = _parse(path, _read_text(path))
  if not isinstance(value, dict):
    raise _damaged(path, f"it holds {type(value).__name__}, not an object")
  return value


def _read_text(path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise _damaged(path, first_line(error)) from error


def _parse(path, text, where=""):
  try:
    return json.loads(text)
  except ValueError as error:
    raise _damaged(path, where + first_line(error)) from error


def _read_arrays(path) -> dict[str, np.ndarray]:
  try:
    return read_npz(path)
  except UnreadableFile as error:
    raise _damaged(path, error) from error


def _field(path, value, name, kind):
  found = value.get(name)
  if not isinstance(found, kind) or isinstance(found, bool):
    raise _damaged(path, f"{name} is {found!r}; expected {kind.__name__}")
  return found


def _damaged(path, why) -> InputError:
  text = " ".join(str(why).split())
  return InputError(
    f"{path} is missing or damaged ({text[:200]}). Run the command that made this folder again;"
    " what is finished is kept."
  )
