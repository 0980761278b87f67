"""What a client does to its gradient before it sends it: gradient in, gradient out.

A defence is a file here: a frozen dataclass that is called with a key and a gradient, and whose
fields are its settings, checked where it is made. The file names it in `DEFENCES = {name: class}`.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any

from jaxdia.client.defences.none import Defence, Identity, identity
from jaxdia.core.errors import InputError, unknown

__all__ = ["DEFENCES", "Defence", "Identity", "create", "describe", "identity", "to_json"]

DEFENCES: dict[str, type] = {}
for _file in sorted(info.name for info in pkgutil.iter_modules(__path__)):
  DEFENCES |= importlib.import_module(f"{__name__}.{_file}").DEFENCES


def create(name: str, **settings: Any) -> Defence:
  """Creates a defence by name.

  Args:
    name: a key of `DEFENCES`.
    **settings: fields of its class.

  Raises:
    InputError: unknown name or setting, or a value that it cannot take.
  """
  if name not in DEFENCES:
    raise unknown("defence", name, DEFENCES)
  known = [field.name for field in dataclasses.fields(DEFENCES[name])]
  for setting in settings:
    if not known:
      raise InputError(f"{setting} is set, but the defence {name} takes no settings. Leave it out.")
    if setting not in known:
      raise unknown(f"setting of the defence {name}:", setting, known)
  return DEFENCES[name](**settings)


def to_json(defence: Any) -> dict[str, Any]:
  """Returns name and settings of a defence that `create` made.

  Args:
    defence: of a class in `DEFENCES`.
  """
  name = next(name for name, kind in DEFENCES.items() if type(defence) is kind)
  return {"name": name} | dataclasses.asdict(defence)


def describe(defence: Any) -> str:
  """Returns name and settings of a defence that `create` made, for people to read.

  Args:
    defence: of a class in `DEFENCES`.
  """
  name, *settings = to_json(defence).items()
  listed = ", ".join(f"{field}={value}" for field, value in settings)
  return f"{name[1]}({listed})" if settings else name[1]
