"""Files that are either whole or not there."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from jaxdia.core.errors import first_line
from jaxdia.core.types import NamedArrays

# A compressed file that grows to so many bytes, and by so much, is taken to be made to fill memory.
_EXPANDED = 2**30
_TIMES_EXPANDED = 100


class UnreadableFile(Exception):
  """An npz file that is damaged or none."""


class UnwritableFile(OSError):
  """A file that cannot be written, as on a full disk; unlike the system's error it names it."""

  def __str__(self) -> str:
    """Returns the file, and what the system said."""
    return f"{self.filename}: {self.strerror}"


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Lets an error of the system tell the file that is being written."""
  try:
    yield
  except OSError as error:
    raise UnwritableFile(error.errno, error.strerror or str(error), str(path)) from error


def write_atomically(
  path: pathlib.Path, write: Callable[[BinaryIO], Any], *, durable: bool = True
) -> None:
  """Writes a file beside its place and moves it there once it is whole.

  Args:
    path: where the file shall be; its folder is made if needed.
    write: called with the open binary file.
    durable: whether to wait until it would outlast a power failure.

  Raises:
    UnwritableFile: what the system does not let be written.
  """
  with _naming(path):
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


def append_json_lines(path: pathlib.Path, rows: Iterable[Any]) -> None:
  """Adds one JSON object a line to a file; an interruption may leave a part of what is added.

  Args:
    path: of the file, which need not exist.
    rows: dictionaries; NaN and infinity are refused.

  Raises:
    UnwritableFile: what the system does not let be written.
  """
  with _naming(path), open(path, "a") as file:
    file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_regular(path: pathlib.Path) -> bytes:
  """Reads a file whole; a pipe or a device is refused, as it may have no end.

  Args:
    path: of the file.

  Raises:
    OSError: there is none, or it cannot be read.
  """
  if path.exists() and not path.is_file():
    what = "is a folder" if path.is_dir() else "is no regular file"
    raise OSError(errno.EINVAL, what, str(path))
  return path.read_bytes()


def write_npz(path: pathlib.Path, arrays: NamedArrays) -> None:
  """Writes arrays as an npz file."""
  write_atomically(path, lambda file: np.savez(file, **arrays))


def read_npz(path: pathlib.Path) -> NamedArrays:
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
