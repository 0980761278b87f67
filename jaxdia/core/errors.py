"""The error for wrong input, and the wording that all of its messages share."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """Input that cannot be used; the message names the value and the fix."""


def unknown(what: str, value: object, known: Iterable[str]) -> InputError:
  """Returns the error for a name that is not one of `known`.

  Args:
    what: what the name stands for, such as "attack".
    value: the name that was given.
    known: the names that exist.

  Returns:
    The error, to be raised by the caller. It suggests the nearest name.
  """
  known = list(known)
  near = difflib.get_close_matches(str(value), known, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return InputError(f"Unknown {what} {value!r}.{hint} Choose one of: {', '.join(known)}.")


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its type if it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
