"""A library's own arrays, by the names that it has for them, and as params."""

import copy
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from jaxdia.core.errors import InputError, unknown
from jaxdia.core.trees import digest, leaves_by_path, path_of
from jaxdia.core.types import Array, Key, NamedArrays, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network
from jaxdia.models.layers import Entry, shape_before


class _Identity:
  """What tells networks from one another, hashed once: it is asked for at every call."""

  def __init__(self, parts: tuple[Hashable, ...]):
    self.parts, self._hash = parts, hash(parts)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Identity) and self.parts == other.parts


class InstanceNetwork(Network):
  """A network that is given with its weights, as an instance of another library's module.

  It is equal to networks of the same structure with the same arrays. What differs in weights
  alone still shares programs if one model is made, and `from_native` gives the other's params.

  Attributes:
    name: of the module's class.
    image_shape: (height, width, channels).
    arrays: {the library's name: array} that training changes.
  """

  def __init__(  # noqa: D107
    self,
    name: str,
    image_shape: tuple[int, int, int],
    arrays: NamedArrays,
    entries: Mapping[str, Entry],
    identity: Iterable[Hashable],
  ):
    if not arrays:
      raise InputError(f"{name} has no parameters, so a client has no gradient to send.")
    self.name, self.image_shape, self.arrays = name, image_shape, dict(arrays)
    self._entries = dict(entries)
    self._identity = _Identity((type(self), image_shape, digest(arrays), *identity))

  def __hash__(self) -> int:
    return hash(self._identity)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, InstanceNetwork) and self._identity == other._identity

  def has_weights(self, arrays: Mapping[str, Any]) -> bool:
    """Returns whether arrays are the weights that the module was given with.

    Args:
      arrays: {the library's name: array, or None}.
    """
    return arrays.keys() >= self.arrays.keys() and all(
      np.array_equal(arrays[name], own) for name, own in self.arrays.items()
    )

  def init(self, key: Key) -> Params:
    """Returns the weights that the module was given with, whatever the key."""
    del key
    return params_of(self._entries, self.arrays)

  def in_mode(self, mode: Hashable, **fields: Any) -> "InstanceNetwork":
    """Returns the network in another mode.

    Args:
      mode: what tells it from the network itself.
      **fields: attributes to change.
    """
    other = copy.copy(self)
    vars(other).update(fields, _identity=_Identity((*self._identity.parts, mode)))
    return other

  def entries(self) -> dict[str, Entry]:
    """Returns where each of the module's arrays lies among the params."""
    return dict(self._entries)


def params_of(entries: Mapping[str, Entry], arrays: Mapping[str, Any]) -> Params:
  """Returns a library's arrays as params, without those that are None or missing.

  Args:
    entries: of the network.
    arrays: {the library's name: array}.
  """
  params: Params = {}
  for name, (path, axes) in entries.items():
    if arrays.get(name) is None:
      continue
    inner = params
    for key in path[:-1]:
      inner = inner.setdefault(key, {})
    array = arrays[name]
    inner[path[-1]] = jax.numpy.asarray(array if axes is None else array.transpose(axes))
  return params


def arrays_of(entries: Mapping[str, Entry], params: Params) -> dict[str, Shaped[Array, "..."]]:
  """Returns params as a library's own arrays: what undoes `params_of`.

  Args:
    entries: of the network.
    params: of the whole network.
  """
  leaves = leaves_by_path(params)
  return {
    name: leaves[path] if axes is None else leaves[path].transpose(np.argsort(axes))
    for name, (path, axes) in entries.items()
  }


def from_native(model: DropoutModel, tree: Any, what: str = "params") -> Params:
  """Returns a library's own weights, or gradient, in the form that params have here.

  Args:
    model: of the same architecture.
    tree: of Flax Linen the params; of Flax NNX a module or its `State`; of Equinox a module, or
      the gradient that is like one; of PyTorch a module, whose gradient is read from `.grad`, or
      a state dict or another {name: tensor}. Of any library {name: array}.
    what: "params", or "gradient", in which arrays may be None or missing, as those of frozen
      layers are.

  Returns:
    A tree like the model's params; arrays that no training changes, such as running averages,
    are left out.

  Raises:
    InputError: an array is missing, of a name that the network does not know, or of another
      shape.
  """
  if what not in ("params", "gradient"):
    raise unknown("kind of tree", what, ("params", "gradient"))
  network = model.network
  entries, shapes = network.entries(), leaves_by_path(discovery.params_shape(network))
  arrays, is_module = _named_arrays(tree, what)
  if what == "gradient" and isinstance(network, InstanceNetwork) and network.has_weights(arrays):
    raise InputError(
      f"the gradient is the weights of {network.name} themselves. Pass what the library's own"
      " differentiation returned."
    )
  if "params" not in {name.partition(".")[0] for name in entries}:  # as Linen's variables
    arrays = {name.removeprefix("params."): array for name, array in arrays.items()}
  for name, array in arrays.items():
    if name not in entries:
      if is_module or name in network.constants():
        continue
      raise unknown(f"array of the {what} of {network.name}:", name, entries)
    path, axes = entries[name]
    expected = shape_before(tuple(shapes[path].shape), axes)
    if array is not None and tuple(array.shape) != expected:
      raise InputError(
        f"the array {name!r} of the {what} has shape {tuple(array.shape)}; expected"
        f" {expected} of {network.name}. It may be of another network."
      )
  missing = [name for name in entries if arrays.get(name) is None]
  if missing and (what == "params" or len(missing) == len(entries)):
    raise InputError(
      f"the {what} lack {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}; expected an"
      f" array for each of the {len(entries)} names in model.network.entries()."
    )
  return params_of(entries, arrays)


def _named_arrays(tree: Any, what: str) -> tuple[dict[str, Any], bool]:
  """Returns a tree's arrays by their names, and whether it may hold others besides the params."""
  if isinstance(tree, nnx.Module):
    if what == "gradient":
      raise InputError(
        f"the gradient is the module {type(tree).__name__}, which holds weights; expected the State"
        " that nnx.grad returns, or a dict of arrays by their names."
      )
    return _named_arrays(nnx.state(tree, nnx.Param), what)[0], True
  if isinstance(tree, nnx.State):
    tree = nnx.to_pure_dict(tree)
  if hasattr(tree, "named_parameters"):  # of PyTorch
    named = dict(tree.named_parameters())
    return {name: to_numpy(x.grad if what == "gradient" else x) for name, x in named.items()}, True
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
  found = {}
  for keys, leaf in leaves:
    found[".".join(path_of(keys))] = to_numpy(leaf)
  is_module = not isinstance(tree, Mapping)
  if is_module:  # functions and numbers are leaves of Equinox modules
    found = {name: leaf for name, leaf in found.items() if hasattr(leaf, "shape")}
  return found, is_module


def to_numpy(array: Any) -> Any:
  """Returns a PyTorch tensor as a NumPy array, and all else as it is.

  Args:
    array: of any library, or None.
  """
  if not hasattr(array, "detach"):
    return array
  array = array.detach().cpu()
  try:
    return array.numpy()
  except TypeError:  # NumPy has no bfloat16
    return array.float().numpy()
