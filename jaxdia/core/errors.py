"""The error for wrong input, and the wording that all of its messages share."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, cast


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


def kind_of(value: object) -> str:
  """Returns what a value of a wrong kind is, for a message: a text as it is, else its type."""
  return repr(value) if isinstance(value, str) else f"of type {type(value).__name__}"


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its type if it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def check_number(
  name: str, value: object, is_valid: Callable[[float], bool], expected: str
) -> float:
  """Returns a number of any kind as a float.

  Args:
    name: what the message calls it.
    value: that was given; NumPy's and JAX's numbers are numbers too.
    is_valid: tells of a number whether it can be used.
    expected: of the message.

  Raises:
    InputError: it is no number, not finite, or not valid.
  """
  number = _own(value)
  is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
  if not is_number or not math.isfinite(number) or not is_valid(number):
    raise InputError(f"{name} is {value!r}; expected {expected}.")
  return float(number)


def check_count(name: str, value: object, least: int, most: int | None = None) -> int:
  """Returns an integer of any kind as an int.

  Args:
    name: what the message calls it.
    value: that was given; NumPy's and JAX's integers are integers too.
    least: the least that can be used.
    most: the largest, if there is one.

  Raises:
    InputError: it is no integer, or out of range.
  """
  count = _own(value)
  is_integer = isinstance(count, numbers.Integral) and not isinstance(count, bool)
  if not is_integer or int(count) < least or (most is not None and int(count) > most):
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} is {value!r}; expected an integer {span}.")
  return int(count)


def _own(value: object) -> Any:
  """Returns the number of Python's own that an array without axes holds, and all else as it is."""
  if getattr(value, "shape", None) != () or not hasattr(value, "item"):
    return value
  try:
    return cast(Any, value).item()
  except Exception:  # an array that JAX traces has no value
    return value
