"""Files that are either whole or not there."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from jaxdia.core.errors import first_line

# A compressed file that grows to so many bytes, and by so much, is taken to be made to fill memory.
_EXPANDED = 2**30
_TIMES_EXPANDED = 100


class UnreadableFile(Exception):
  """An npz file that is damaged or none."""


def write_atomically(
  path: pathlib.Path, write: Callable[[BinaryIO], Any], *, durable: bool = True
) -> None:
  """Writes a file beside its place and moves it there once it is whole.

  Args:
    path: where the file shall be; its folder is made if needed.
    write: called with the open binary file.
    durable: whether to wait until it would outlast a power failure.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      write(file)
      if durable:
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any, *, durable: bool = True) -> None:
  """Writes a value as indented JSON; NaN and infinity are refused, as JSON has none.

  Args:
    path: where the file shall be.
    value: dictionaries, lists, texts and numbers.
    durable: see `write_atomically`.
  """
  text = json.dumps(value, indent=2, allow_nan=False) + "\n"
  write_atomically(path, lambda file: file.write(text.encode()), durable=durable)


def write_json_lines(path: pathlib.Path, rows: Iterable[Any]) -> None:
  """Writes one JSON object a line; NaN and infinity are refused."""
  text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
  write_atomically(path, lambda file: file.write(text.encode()))


def write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes arrays as an npz file."""
  write_atomically(path, lambda file: np.savez(file, **arrays))


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all arrays of an npz file; pickled objects are refused.

  Args:
    path: of the file.

  Raises:
    UnreadableFile: it is damaged, or not an npz.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      size = sum(member.file_size for member in file.zip.infolist())
      if size > max(_EXPANDED, _TIMES_EXPANDED * path.stat().st_size):
        raise UnreadableFile(f"its arrays would take {size / 2**30:.0f} GiB")
      arrays = dict(file)
  # What numpy, zipfile and tokenize raise depends on the byte that is wrong.
  except Exception as error:
    # A single array is no context manager.
    reason = "not an npz file" if isinstance(error, TypeError) else first_line(error)
    raise UnreadableFile(reason) from error
  for name, array in arrays.items():
    if not isinstance(array, np.ndarray):
      raise UnreadableFile(f"its member {name!r} is no array")
  return arrays
