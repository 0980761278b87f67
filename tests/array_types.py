"""Checks arrays against their annotations while the tests run; see conftest.py."""

import typing
from collections.abc import Callable, Sequence
from typing import Any

from beartype import beartype


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
  """Lets beartype check the arguments and results of a function that are annotated as arrays.

  Not the others, which pyright follows: at run time an int serves for a float, and in tests a
  stand-in for a model. Nor what may be a list instead, which a function looks at by itself, and
  refuses in a line. Nor what makes an object, which refuses by itself what does not fit.
  """
  annotations = getattr(function, "__annotations__", {})
  arrays = {name: kind for name, kind in annotations.items() if _is_array(kind)}
  if not arrays or function.__qualname__.endswith("__init__"):
    return function
  function.__annotations__ = arrays
  return beartype(function)


def _is_array(kind: Any) -> bool:
  return "jaxtyping." in repr(kind) and Sequence[Any] not in typing.get_args(kind)
