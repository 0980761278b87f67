"""Finished results, read back from disk: an experiment is a study of one cell."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Integer, Shaped

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import UnreadableFile, read_npz
from jaxdia.experiment.schema import (
  AttackSummary,
  Config,
  Row,
  StudyCell,
  StudyFile,
  Summary,
  decode,
)

_QUESTION = (
  "What could an honest-but-curious server see of the images that a client trained on,"
  " from the gradient that the client sent?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellResults:
  """One experiment of a study; of one that is not done only the first fields are filled.

  Attributes:
    entry: what the study says of it: name, overrides, status, reason, seconds.
    directory: where its files are.
    config: as in config.json.
    manifest: as in manifest.json; empty if there is none.
    summary: as in summary.json, by attack.
    floors: metrics of guesses that need no gradient, by name of the guess.
    rows: as in results.jsonl.
  """

  entry: StudyCell
  directory: pathlib.Path
  config: Config = Config(data={}, model={}, attacks={})
  manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
  summary: dict[str, AttackSummary] = dataclasses.field(default_factory=dict)
  floors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  rows: list[Row] = dataclasses.field(default_factory=list)

  @property
  def name(self) -> str:
    """Name of its folder."""
    return self.entry.name

  def rows_of(self, attack: str) -> list[Row]:
    """Returns the results of one attack."""
    return [row for row in self.rows if row.attack == attack]

  def ssim_of(self, attack: str) -> dict[int, float | None]:
    """Returns the SSIM of one attack, by place of the image in `reconstructions.npz`."""
    first, count = self.config.data.get("offset") or 0, self.config.data.get("count") or 0
    return {  # all images come once for each seed of the masks
      (row.mask_seed or 0) * count + row.image - first: row.score("ssim")
      for row in self.rows_of(attack)
    }

  def read_images(self) -> dict[str, Shaped[np.ndarray, "images ..."]]:
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

  def read_recordings(self) -> dict[str, Integer[np.ndarray, "..."]]:
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
class StudyResults:
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
  cells: list[CellResults]

  @property
  def done(self) -> list[CellResults]:
    """Returns the cells that have results."""
    return [cell for cell in self.cells if cell.entry.status == "done"]

  @property
  def attacks(self) -> list[str]:
    """Returns the attacks of all cells, each once."""
    return list(dict.fromkeys(attack for cell in self.done for attack in cell.summary))


def read_study(workdir: pathlib.Path) -> StudyResults:
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
  data, model = cell.config.data, cell.config.model
  title = f"{attacks} against {model.get('name')} on {data.get('source')}"
  return StudyResults(title=title, question=_QUESTION, manifest={}, cells=[cell])


def read_experiment(workdir: pathlib.Path) -> CellResults:
  """Reads the results of one experiment.

  Args:
    workdir: of the experiment.

  Raises:
    InputError: it is not finished, or a file is damaged.
  """
  entry = StudyCell(name=workdir.resolve().name, overrides={}, status="done")
  return _read_cell(entry, workdir)


def _read_many(workdir: pathlib.Path) -> StudyResults:
  study = _read(workdir / "study.json", lambda value: msgspec.convert(value, StudyFile))
  folders = [(entry, workdir / "cells" / entry.name) for entry in study.cells]
  cells = [
    _read_cell(entry, folder)
    if entry.status == "done"
    else CellResults(entry=entry, directory=folder)
    for entry, folder in folders
  ]
  return StudyResults(
    title=study.title, question=study.question, manifest=study.manifest, cells=cells
  )


def _read_cell(entry: StudyCell, folder: pathlib.Path) -> CellResults:
  """Returns a finished cell with its results."""
  if not (folder / "summary.json").is_file():
    raise InputError(
      f"{folder} has no summary.json: the experiment is not finished. Run the same command"
      " again; it goes on where it was."
    )
  config = _read(folder / "config.json", lambda value: msgspec.convert(value, Config))
  summary = _read(folder / "summary.json", Summary.from_json)
  manifest: dict[str, Any] = {}
  if (folder / "manifest.json").is_file():
    as_object = lambda value: msgspec.convert(value, dict[str, Any])  # noqa: E731
    manifest = _read(folder / "manifest.json", as_object)
  path = folder / "results.jsonl"
  lines = enumerate(_bytes(path).splitlines(), 1)
  rows = [_parse(path, line, Row.from_json, f"line {number}: ") for number, line in lines]
  return CellResults(
    entry=entry,
    directory=folder,
    config=config,
    manifest=manifest,
    summary=summary.attacks,
    floors=summary.floors,
    rows=rows,
  )


def _read(path: pathlib.Path, convert: Callable[[Any], Any]) -> Any:
  return _parse(path, _bytes(path), convert)


def _bytes(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise _damaged(path, first_line(error)) from error


def _parse(path: pathlib.Path, text: bytes, convert: Callable[[Any], Any], where: str = "") -> Any:
  try:
    return convert(decode(text))
  except msgspec.DecodeError as error:
    raise _damaged(path, where + first_line(error)) from error


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return read_npz(path)
  except UnreadableFile as error:
    raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, why: Any) -> InputError:
  text = " ".join(str(why).split())
  return InputError(
    f"{path} is missing or damaged ({text[:200]}). Run the command that made this folder again;"
    " what is finished is kept."
  )
