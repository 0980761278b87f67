"""Arrays that a file or a framework names, as params or a gradient of a model.

They are looked up by the names of the network's own library, by the paths of the params, and by
how other libraries call the same; layouts are turned by names alone, so that square kernels are
turned too. What had to be assumed is said in notes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path, leaves_by_path, with_leaves
from jaxdia.core.types import NamedArrays, Params
from jaxdia.models import DropoutModel, Entry, discovery
from jaxdia.models.layers import shape_before
from jaxdia.updates import layouts, problems
from jaxdia.updates.names import are_numbers, named_arrays, number_of, parts_of

# How other libraries call a leaf: PyTorch, Haiku, Keras.
_ALIASES = {
  "kernel": ("weight", "w"),
  "weight": ("kernel", "w"),
  "scale": ("weight", "gamma"),
  "bias": ("b", "beta"),
  "embedding": ("weight", "embeddings"),
}
# What files wrap params or a gradient in, and frameworks put before names; for one file may have
# several trees of the same names.
_WRAPPERS = {
  "params": {"params", "model", "state_dict", "model_state_dict", "module", "_orig_mod"},
  "gradient": {"gradient", "gradients", "grad", "grads", "module", "_orig_mod"},
}


class Fit(NamedTuple):
  """Params or a gradient, put together from arrays.

  Attributes:
    tree: like the params of the model, of NumPy arrays of the type that they came in. A leaf of
      a gradient that is None was not sent: its layer is frozen.
    frozen: paths of these leaves.
    extra: arrays that are no params, by their names, such as running averages of BatchNorm.
    notes: what was assumed, each a sentence; of frozen layers `Update` says it.
  """

  tree: Params
  frozen: tuple[str, ...]
  extra: NamedArrays
  notes: tuple[str, ...]


class _Target(NamedTuple):
  """Where an array goes, if it has this name."""

  path: Path
  axes: tuple[int, ...] | None
  foreign: bool  # named as another library would, which may have another layout


def fit(
  model: DropoutModel,
  arrays: Mapping[str, Any] | Sequence[Any],
  what: str = "params",
  *,
  by_order: bool = False,
) -> Fit:
  """Puts arrays together as params or a gradient of a model.

  Args:
    model: whose params they are.
    arrays: by name, as `read` gives them, nested or not; or a list.
    what: "params", of which none may be missing, or "gradient".
    by_order: whether to ignore the names, and to take the arrays in the order in which they come.

  Returns:
    The tree, in the form of the model's params, and what was left over or assumed.

  Raises:
    InputError: they do not fit; the message names the leaf, what was expected, and what is nearest.
  """
  if what not in _WRAPPERS:
    raise InputError(f"what is {what!r}; expected 'params' or 'gradient'.")
  arrays = named_arrays(arrays)
  if not arrays:
    raise InputError(f"the {what} have no arrays at all; expected those of {model.network.name}.")
  shape = discovery.params_shape(model.network)
  leaves = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(shape).items()}
  if by_order:
    found, taken, notes = _by_order(model, leaves, arrays, what)
  else:
    found, taken, notes = _by_name(model, leaves, arrays, what)
  extra = {name: array for name, array in arrays.items() if name not in taken}
  for path, array in found.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise InputError(
        f"the leaf {'/'.join(path)!r} of the {what} is {array.dtype}; expected floats. Undo the"
        " quantisation first."
      )
  frozen = tuple("/".join(path) for path in leaves if path not in found)
  if frozen:
    problems.check_missing(what, leaves, found, extra)
  constants = [parts_of(name) for name in model.network.constants()]
  fixed = [name for name in extra if any(parts_of(name)[-len(c) :] == c for c in constants)]
  if fixed:
    notes.append(
      f"{problems.listed(fixed)} are no params but what the network holds beside them, such as"
      " running averages."
    )
  if unknown := [name for name in extra if name not in fixed]:
    notes.append(f"no params of {model.network.name} are called {problems.listed(unknown)}.")
  tree = with_leaves(shape, {path: found.get(path) for path in leaves})
  return Fit(tree, frozen, extra, tuple(notes))


def _by_name(model, leaves, arrays, what):
  """Returns {path: array}, the names that were taken, and notes."""
  places = _places(model, leaves)
  names = {parts_of(name): name for name in arrays}
  prefix, lacking = _prefix(places, model.network.entries(), names, what)
  chosen = {}
  for parts, name in names.items():
    place = places.get((*lacking, *parts[len(prefix) :]))
    if parts[: len(prefix)] != prefix or place is None:
      continue
    if place.path not in chosen or chosen[place.path][1].foreign:
      chosen[place.path] = (name, place)
  if not chosen and are_numbers(arrays):
    raise InputError(
      f"the {what} are {len(arrays)} arrays without names; expected names such as"
      f" {'/'.join(next(iter(leaves)))!r}. If they stand in the model's order, pass by_order=True."
    )
  if not chosen:
    problems.check_missing(what, leaves, {}, arrays)
    raise InputError(problems.nothing_fits(what, leaves, arrays))
  notes = []
  if prefix:
    notes.append(f"the prefix {'.'.join(prefix)!r} was taken off the names.")
  if lacking:
    notes.append(f"the names lack the prefix {'.'.join(lacking)!r}.")
  foreign = {path: name for path, (name, place) in chosen.items() if place.foreign}
  turned = layouts.turned(foreign, leaves, arrays, notes)
  found = {}
  for path, (name, place) in chosen.items():
    axes = turned.get(path, place.axes)
    array = arrays[name]
    if array.ndim == len(leaves[path]) and axes is not None:
      array = array.transpose(axes)
    if array.shape != leaves[path]:
      raise InputError(problems.wrong_shape(what, path, leaves, name, arrays, axes))
    found[path] = array
  layouts.put_channels_last(model, [p for p in turned if turned[p] is not None], found, notes)
  return found, {name for name, _ in chosen.values()}, notes


def _places(model, leaves) -> dict[tuple[str, ...], _Target]:
  """Returns where an array goes, by the parts of its name."""
  entries = {
    parts_of(name): entry for name, entry in model.network.entries().items() if entry.path in leaves
  }
  entries |= {
    parts: Entry(path) for path in leaves if (parts := parts_of("/".join(path))) not in entries
  }
  places = {parts: _Target(*entry, foreign=False) for parts, entry in entries.items()}
  for parts, entry in entries.items():
    for alias in _ALIASES.get(parts[-1], ()) if entry.path[-1] == parts[-1] else ():
      places.setdefault((*parts[:-1], alias), _Target(entry.path, None, foreign=True))
  return places


def _prefix(places, own, names, what) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns what stands before the names in the file, and what they lack there."""
  common = _common_prefix([parts_of(name) for name in own])
  hits = defaultdict(dict)
  for parts in names:
    for i in range(len(parts)):
      for lacking in {(), common}:
        if place := places.get((*lacking, *parts[i:])):
          hits[parts[:i], lacking][place.path] = place.foreign
  if not hits:
    return (), ()

  def rank(candidate):
    prefix, lacking = candidate
    known = all(part in _WRAPPERS[what] for part in prefix)
    places = hits[candidate]
    return len(places), -sum(places.values()), known, not lacking, -len(prefix)

  ranked = sorted(hits, key=rank, reverse=True)
  best = ranked[0]
  if len(ranked) > 1 and rank(best) == rank(ranked[1]):
    first, second = (".".join(prefix) for prefix, _ in ranked[:2])
    raise InputError(
      f"the arrays hold the {what} twice, under {first!r} and under {second!r}; expected one."
      " Write those that you mean to a file of their own."
    )
  return best


def _common_prefix(names) -> tuple[str, ...]:
  first = min(names, key=len, default=())
  length = 0
  while length < len(first) - 1 and len({name[length] for name in names}) == 1:
    length += 1
  return first[:length]


def _by_order(model, leaves, arrays, what):
  """Returns {path: array}, the names that were taken, and notes.

  The order is the library's own or that of JAX's trees. Arrays between may be left out: the
  averages and counts that state dicts have among the params.
  """
  names = sorted(arrays, key=number_of) if are_numbers(arrays) else list(arrays)
  own = [entry for entry in model.network.entries().values() if entry.path in leaves]
  orders = {"of its library": own, "of JAX's trees": [Entry(path) for path in leaves]}
  fitting = {}
  for order, entries in orders.items():
    expected = [shape_before(leaves[e.path], e.axes) for e in entries]
    shapes = [arrays[name].shape for name in names]
    first = _places_in_order(shapes, expected)
    last = _places_in_order(shapes[::-1], expected[::-1])
    left_out = len(shapes) - len(expected)
    # Where they fit in two ways, the first is that of a library whose constants come last.
    is_sure = last == [len(shapes) - 1 - i for i in reversed(first or [])]
    if first is not None and (is_sure or left_out == len(model.network.constants())):
      fitting[order] = list(zip((names[i] for i in first), entries, strict=True))
  if not fitting:
    raise InputError(problems.wrong_order(what, own, leaves, names, arrays))
  order, pairs = next(iter(fitting.items()))
  found = {}
  for name, (path, axes) in pairs:
    found[path] = arrays[name] if axes is None else arrays[name].transpose(axes)
  notes = [f"the arrays were taken in the order {order}, which only their shapes confirm."]
  if any(other != pairs for other in fitting.values()):
    notes.append(f"they would fit the order {list(fitting)[1]} too.")
  return found, {name for name, _ in pairs}, notes


def _places_in_order(
  shapes: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> list[int] | None:
  """Returns the first place of each expected shape after that of the one before it."""
  places: list[int] = []
  for i, shape in enumerate(shapes):
    if len(places) < len(expected) and shape == expected[len(places)]:
      places.append(i)
  return places if len(places) == len(expected) else None
