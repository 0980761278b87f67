"""Fields of a config that a user wrote: looked at before they become settings."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxdia.core.errors import InputError, unknown


def plain(value: Any) -> Any:
  """Returns a value with tuples for sequences, and Python's numbers for those of numpy.

  Args:
    value: of a config; dictionaries are looked into.
  """
  if isinstance(value, dict):
    return {name: plain(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return tuple(map(plain, value))
  return value.item() if isinstance(value, np.generic) else value


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
  """Refuses names of a config that do not exist.

  Args:
    what: they stand for.
    given: in the config.
    known: those that exist.

  Raises:
    InputError: one does not.
  """
  for name in given:
    if name not in known:
      raise unknown(what, name, known)


def pop_group(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """Takes a group of fields out of a config.

  Args:
    fields: of the config, changed in place.
    name: of the group.

  Raises:
    InputError: it is no group, or missing.
  """
  group = fields.pop(name, None)
  if not isinstance(group, dict):
    raise InputError(f"config.{name} is {group!r}; expected a group of fields.")
  return group


def make_settings(kind: type, group: str, fields: dict[str, Any]) -> Any:
  """Returns a group of fields as the dataclass that it becomes.

  Args:
    kind: the dataclass.
    group: its name in the config.
    fields: of it.

  Raises:
    InputError: a field that does not exist, or a value that it cannot take.
  """
  known = [f.name for f in dataclasses.fields(kind)]
  check_names(f"field of config.{group}:", fields, known)
  return kind(**fields)
