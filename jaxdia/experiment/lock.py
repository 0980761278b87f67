"""One process at a time in a work directory."""

import datetime
import json
import os
import pathlib
import platform

import filelock

from jaxdia.core.errors import InputError
from jaxdia.core.files import write_json


class Lock:
  """A lock on a folder that the operating system drops when its process ends, however it ends.

  The file `lock` stays behind; it means nothing by itself. `lock.json` says who holds it.
  """

  def __init__(self, folder: pathlib.Path):
    """Locks nothing yet.

    Args:
      folder: that one process shall have for itself.
    """
    self._folder = folder
    self._lock = filelock.FileLock(folder / "lock", timeout=0)

  def acquire(self) -> None:
    """Takes the lock, and removes half-written files that a killed process left.

    Raises:
      InputError: another process has it, or the folder cannot be written.
    """
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._lock.acquire()
    except filelock.Timeout:
      raise InputError(
        f"the work directory {self._folder} is in use{self._holder()}. Wait for it to end, stop it,"
        " or choose another --workdir."
      ) from None
    except OSError as error:
      raise cannot_write(self._folder, error) from error
    for pattern in (".*.tmp", "checkpoint/.*.tmp", "trials/*/.*.tmp"):
      for left in self._folder.glob(pattern):
        left.unlink(missing_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": platform.node(), "since": now}
    try:
      write_json(self._folder / "lock.json", holder)
    except OSError as error:
      self._lock.release()
      raise cannot_write(self._folder, error) from error

  def release(self) -> None:
    """Gives the lock back; nothing happens if it is not held."""
    if self._lock.is_locked:
      (self._folder / "lock.json").unlink(missing_ok=True)
      self._lock.release()

  def _holder(self) -> str:
    """Returns who holds the lock, for a message."""
    try:
      who = json.loads((self._folder / "lock.json").read_text())
      return f" by process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      return " by another process"


def cannot_write(folder: pathlib.Path, error: OSError) -> InputError:
  """Returns the error for a work directory in which nothing can be written.

  Args:
    folder: the work directory.
    error: what the system said.
  """
  return InputError(
    f"cannot write in the work directory {folder} ({error}). Choose another --workdir."
  )
