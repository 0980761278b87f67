"""What a user names by its import path: a network or a loss of their own."""

import importlib
import types
from typing import Any

from jaxdia.core.errors import InputError, first_line, unknown


def module_of(path: str, field: str, example: str) -> types.ModuleType:
  """Returns the module of an import path.

  Args:
    path: "package.module:attribute".
    field: of the config that it was given in, for messages.
    example: of such a path.

  Raises:
    InputError: the path is none, or its module cannot be imported.
  """
  name, _, attribute = path.partition(":")
  if not name or not attribute:
    raise InputError(
      f"{field} is {path!r}; expected a module, a colon and what is in it, such as {example}."
    )
  try:
    return importlib.import_module(name)
  except Exception as error:  # whatever the user's file raises
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    missing = absent is not None and f"{name}.".startswith(f"{absent}.")
    reason = f"there is no module {absent!r}" if missing else reason_of(error)
    hint = " It is looked for in the current folder and among installed packages." * missing
    raise InputError(f"cannot import {field}={path}: {reason}.{hint}") from error


def find(path: str, field: str, example: str) -> Any:
  """Returns what an import path names.

  Args:
    path: "package.module:attribute".
    field: of the config that it was given in, for messages.
    example: of such a path.

  Raises:
    InputError: its module cannot be imported, or there is nothing of the name in it.
  """
  found, attribute = module_of(path, field, example), path.partition(":")[2]
  for name in attribute.split("."):
    if not hasattr(found, name):
      known = [known for known in vars(found) if not known.startswith("_")]
      raise unknown(f"attribute of {field}={path}:", name, known)
    found = getattr(found, name)
  return found


def reason_of(error: Exception) -> str:
  """Returns what a message says of an error that a user's own code raised.

  Args:
    error: of any kind.
  """
  if isinstance(error, InputError):
    return str(error).removesuffix(".")
  return f"{type(error).__name__}: {first_line(error)}".removesuffix(".")
