"""What a client does to its gradient before it sends it: gradient in, gradient out.

A defence is a file here. It names itself in `DEFENCES = {name: factory}`; the factory takes its
settings as keyword arguments, refuses those that it cannot take, and returns a `Defence`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from jaxdia.client.defences.none import Defence, identity
from jaxdia.core.errors import unknown

__all__ = ["DEFENCES", "Defence", "create", "identity"]

DEFENCES: dict[str, Callable[..., Defence]] = {}
for _file in sorted(info.name for info in pkgutil.iter_modules(__path__)):
  DEFENCES |= importlib.import_module(f"{__name__}.{_file}").DEFENCES


def create(name: str, **settings: Any) -> Defence:
  """Creates a defence by name.

  Args:
    name: a key of `DEFENCES`.
    **settings: of its factory.

  Raises:
    InputError: unknown name or setting, or a value that it cannot take.
  """
  if name not in DEFENCES:
    raise unknown("defence", name, DEFENCES)
  known = list(inspect.signature(DEFENCES[name]).parameters)
  for setting in settings:
    if setting not in known:
      raise unknown(f"setting of the defence {name}:", setting, known)
  return DEFENCES[name](**settings)
