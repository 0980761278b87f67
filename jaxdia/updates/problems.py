"""What messages say of arrays that do not fit: the leaf, what was expected, what is nearest."""

import difflib
from collections.abc import Iterable

from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path
from jaxdia.core.types import NamedArrays
from jaxdia.models import Entry
from jaxdia.models.layers import shape_before
from jaxdia.updates.names import parts_of

_MOST_LISTED = 3
# How libraries call the state of a normalisation, whose shape is that of its params.
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance", "mean", "var")


def listed(names: Iterable[str]) -> str:
  """Returns a few of the names, and how many there are."""
  names = list(names)
  text = ", ".join(repr(name) for name in names[:_MOST_LISTED])
  return text if len(names) <= _MOST_LISTED else f"{text}, ... ({len(names)})"


def nearest(path: Path, shape: tuple[int, ...], arrays: NamedArrays) -> str:
  """Returns the arrays that may be meant: of the same shape, turned or not, and of like names."""
  name = "/".join(path)
  same = [key for key, array in arrays.items() if _same(array.shape, shape)]
  near = difflib.get_close_matches(name, same, _MOST_LISTED, cutoff=0)
  near += difflib.get_close_matches(name, [key for key in arrays if key not in same], _MOST_LISTED)
  return ", ".join(f"{key!r} {arrays[key].shape}" for key in near[:_MOST_LISTED])


def check_missing(
  what: str,
  leaves: dict[Path, tuple[int, ...]],
  found: dict[Path, object],
  extra: NamedArrays,
) -> None:
  """Refuses missing leaves, but for frozen layers of a gradient.

  Args:
    what: "params" or "gradient".
    leaves: {path: shape} of the params.
    found: those that are there.
    extra: arrays that were not taken.

  Raises:
    InputError: params lack a leaf, or a gradient lacks one and has an array of that shape which
      fits nowhere, so that rather its name is wrong.
  """
  for path, shape in leaves.items():
    if path in found:
      continue
    candidates = {k: a for k, a in extra.items() if parts_of(k)[-1] not in _STATISTICS}
    is_misnamed = any(_same(array.shape, shape) for array in candidates.values())
    if what == "gradient" and not is_misnamed:
      continue
    near = nearest(path, shape, candidates)
    raise InputError(
      f"the {what} lack{'s' if what == 'gradient' else ''} the leaf {'/'.join(path)!r} of shape"
      f" {shape}; {f'nearest are {near}' if near else 'no array is near it'}. Rename the arrays as"
      " the params are, or pass by_order=True if their order is the same."
    )


def nothing_fits(what: str, leaves: dict[Path, tuple[int, ...]], arrays: NamedArrays) -> str:
  """Returns what to say where no array fits by its name or by its shape."""
  return (
    f"no array of the {what} has a name or a shape of this model: it has"
    f" {listed('/'.join(path) for path in leaves)}, and the arrays are {listed(arrays)}. They are"
    " of another network."
  )


def wrong_shape(
  what: str,
  path: Path,
  leaves: dict[Path, tuple[int, ...]],
  name: str,
  arrays: NamedArrays,
  axes: tuple[int, ...] | None,
) -> str:
  """Returns what to say of an array that has the name of a leaf, but another shape."""
  shape, expected = arrays[name].shape, shape_before(leaves[path], axes)
  others = {key: a for key, a in arrays.items() if key != name and a.shape == expected}
  if len(shape) > 1 and shape == expected[::-1]:
    mend = "It is transposed: turn it."
  elif near := nearest(
    path, leaves[path], {k: a for k, a in others.items() if a.shape == expected}
  ):
    mend = f"Of that shape are {near}."
  else:
    mend = "It is of another network, or of other sizes: create the model as the client did."
  return (
    f"the array {name!r} of the {what} has shape {shape}; expected {expected} for the leaf"
    f" {'/'.join(path)!r}. {mend}"
  )


def wrong_order(
  what: str,
  entries: list[Entry],
  leaves: dict[Path, tuple[int, ...]],
  names: list[str],
  arrays: NamedArrays,
) -> str:
  """Returns what to say of arrays whose order does not fit."""
  expected = [shape_before(leaves[entry.path], entry.axes) for entry in entries]
  shapes = [arrays[name].shape for name in names]
  if len(shapes) != len(expected):
    return (
      f"the {what} are {len(shapes)} arrays; expected {len(expected)} to take them by order, one"
      f" for each of {listed('/'.join(entry.path) for entry in entries)}. Pass them by name."
    )
  i = next(i for i, shape in enumerate(shapes) if shape != expected[i])
  return (
    f"array {i} of the {what}, {names[i]!r}, has shape {shapes[i]}; expected {expected[i]} for"
    f" {'/'.join(entries[i].path)!r} by order. Pass them by name, or in the order of"
    " model.network.entries()."
  )


def _same(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
  return sorted(shape) == sorted(other)
