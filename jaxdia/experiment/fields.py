"""Fields of a config that a user wrote: looked at before they become settings."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxdia.core.errors import InputError, check_count, unknown


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


def split_names(what: str, names: str, known: Iterable[str]) -> list[str]:
  """Returns names that are given with commas between.

  Args:
    what: they stand for.
    names: of the config, in its field config.attack.name.
    known: those that exist.

  Raises:
    InputError: one does not, or is given twice.
  """
  given = [name.strip() for name in names.split(",")]
  check_names(what, given, known)
  if len(set(given)) < len(given):
    raise InputError(f"config.attack.name is {','.join(given)!r}; expected each attack once.")
  return given


def check_batches(count: int, batch_size: int, things: str) -> None:
  """Refuses images, or texts, that cannot be cut into batches of one size.

  Args:
    count: of them.
    batch_size: of a client.
    things: what they are.

  Raises:
    InputError: they cannot.
  """
  for name, value in (("count", count), ("batch_size", batch_size)):
    check_count(f"config.data.{name}", value, 1)
  if count % batch_size:
    raise InputError(
      f"config.data.count={count} {things} cannot be cut into batches of"
      f" config.data.batch_size={batch_size}; make the count a multiple of it."
    )


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
