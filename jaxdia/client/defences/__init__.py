"""What a client does to its gradient before it sends it: gradient in, gradient out.

A defence is a class in a file here, see `Defence`, whose fields are its settings, checked where it
is made. The file names it in `DEFENCES = {name: class}`. Several make a `Chain`.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any

from jaxdia.client.defences.base import Defence, Identity, Step, as_defence, identity
from jaxdia.client.defences.chain import Chain
from jaxdia.core.errors import InputError, unknown

__all__ = [
  "DEFENCES",
  "Chain",
  "Defence",
  "Identity",
  "Step",
  "as_defence",
  "create",
  "describe",
  "identity",
  "to_json",
]

DEFENCES: dict[str, type[Defence]] = {}
for _file in sorted(info.name for info in pkgutil.iter_modules(__path__)):
  DEFENCES |= getattr(importlib.import_module(f"{__name__}.{_file}"), "DEFENCES", {})


def create(name: str, **settings: Any) -> Defence:
  """Creates a defence by name, or a chain of several.

  Args:
    name: a key of `DEFENCES`, or several with commas between, in the order in which the client
      applies them.
    **settings: fields of their classes.

  Raises:
    InputError: unknown name or setting, a value that it cannot take, a defence that is named twice,
      or a setting that two of them have.
  """
  names = [one.strip() for one in name.split(",")]
  for one in names:
    if one not in DEFENCES:
      raise unknown("defence", one, DEFENCES)
  if len(set(names)) < len(names):
    raise InputError(
      f"the defences are {name!r}; expected each of them once. A chain of equal ones is made in"
      " code: defences.Chain((...))."
    )
  fields = {one: [field.name for field in dataclasses.fields(DEFENCES[one])] for one in names}
  for setting in settings:
    owners = [one for one in names if setting in fields[one]]
    if not any(fields.values()):
      raise InputError(f"{setting} is set, but the defence {name} takes no settings. Leave it out.")
    if not owners:
      raise unknown(f"setting of the defence {name}:", setting, sum(fields.values(), []))
    if len(owners) > 1:
      raise InputError(
        f"{setting} is a setting of {' and of '.join(owners)}, which are both in the chain"
        f" {name!r}, so it is not known whose it is. Leave one of them out, or make the chain in"
        " code: defences.Chain((...))."
      )
  made = [
    DEFENCES[one](**{field: settings[field] for field in fields[one] if field in settings})
    for one in names
  ]
  return made[0] if len(made) == 1 else Chain(tuple(made))


def to_json(defence: Any) -> dict[str, Any]:
  """Returns name and settings of a defence that `create` made.

  Args:
    defence: of a class in `DEFENCES`, or a chain of such.
  """
  links = defence.defences if isinstance(defence, Chain) else (defence,)
  names = [next(name for name, kind in DEFENCES.items() if type(one) is kind) for one in links]
  settings = {field: value for one in links for field, value in dataclasses.asdict(one).items()}
  return {"name": ",".join(names)} | settings


def describe(defence: Any) -> str:
  """Returns name and settings of a defence that `create` made, for people to read.

  Args:
    defence: of a class in `DEFENCES`, or a chain of such.
  """
  if isinstance(defence, Chain):
    return ", then ".join(map(describe, defence.defences))
  name, *settings = to_json(defence).items()
  listed = ", ".join(f"{field}={value}" for field, value in settings)
  return f"{name[1]}({listed})" if settings else name[1]
