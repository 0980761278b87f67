"""Checks arrays against their annotations while the tests run; see conftest.py."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
  """Lets beartype check the arguments and results of a function that are annotated as arrays.

  Not the others, which pyright follows: at run time an int serves for a float, and in tests a
  stand-in for a model. Nor what makes an object, which refuses by itself what does not fit.
  """
  annotations = getattr(function, "__annotations__", {})
  arrays = {name: kind for name, kind in annotations.items() if "jaxtyping." in repr(kind)}
  if not arrays or function.__qualname__.endswith("__init__"):
    return function
  function.__annotations__ = arrays
  return beartype(function)
