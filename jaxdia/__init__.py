"""Gradient inversion under dropout: what a server could see of a client's data."""

import importlib
from typing import Any

from jaxdia.core.errors import InputError as InputError

__version__ = "0.1.0"

_ROOMS = (
  *("attacks", "audit", "client", "closed_form", "data", "engine", "evaluation", "experiment"),
  *("gradients", "models", "report", "study", "updates"),
)


def __getattr__(name: str) -> Any:
  if name in _ROOMS:  # imported when it is first used, as most need none of the rest
    return importlib.import_module(f"jaxdia.{name}")
  raise AttributeError(f"module 'jaxdia' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*globals(), *_ROOMS]
