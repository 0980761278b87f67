"""Trees of arrays: leaves by their paths, and dataclasses that are trees and equal by value."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.core import Tracer

from jaxdia.core.errors import InputError

Path = tuple[str, ...]
_Class = TypeVar("_Class", bound=type)


def static(**options: Any) -> Any:
  """Returns a field of a `value_tree` that belongs to its structure; it must be hashable.

  Args:
    **options: of `dataclasses.field`.
  """
  return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def value_tree(cls: _Class) -> _Class:
  """Makes a frozen dataclass of a class, and a pytree of it.

  Static fields are the structure, so trees of other static values need other compiled programs;
  all other fields are children, and what is None there is part of the structure too. A tree that
  JAX puts together holds what it is given, such as tracers, and is not checked again.

  Args:
    cls: with annotated fields; `__post_init__` may check and convert them.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  fields = dataclasses.fields(cls)
  structure = tuple(f.name for f in fields if f.metadata.get("static"))
  children = tuple(f.name for f in fields if not f.metadata.get("static"))
  keys = tuple(map(jax.tree_util.GetAttrKey, children))

  def flatten(tree):
    return [getattr(tree, n) for n in children], tuple(getattr(tree, n) for n in structure)

  def flatten_with_keys(tree):
    values, rest = flatten(tree)
    return list(zip(keys, values, strict=True)), rest

  def unflatten(rest, values):
    tree = object.__new__(cls)
    for name, value in (*zip(structure, rest, strict=True), *zip(children, values, strict=True)):
      object.__setattr__(tree, name, value)
    return tree

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
  return cls


class Constants:
  """A tree of small arrays that are part of what a program is compiled for.

  It is hashable, and equal to one of the same names, types and numbers.

  Attributes:
    tree: the arrays, of NumPy; not to be changed.
  """

  def __init__(self, tree: Any):
    """Copies the arrays.

    Args:
      tree: of arrays with concrete values.
    """
    self.tree = jax.tree.map(np.array, tree)
    self._digest = digest(self.tree)

  def __hash__(self) -> int:
    return hash(self._digest)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Constants) and self._digest == other._digest

  def __repr__(self) -> str:
    return f"Constants({self._digest[:12]})"


def path_of(keys: tuple[Any, ...]) -> Path:
  """Returns the path that JAX gives a leaf as names."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def leaves_by_path(tree: Any) -> dict[Path, Any]:
  """Returns the leaves of a tree, such as params, by their paths."""
  return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaves_by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by their paths with dots, as libraries name arrays."""
  return {".".join(path): leaf for path, leaf in leaves_by_path(tree).items()}


def digest(tree: Any) -> str:
  """Returns the SHA-256 of arrays with their paths, types and shapes.

  Args:
    tree: of arrays with concrete values.
  """
  found = hashlib.sha256()
  for path, leaf in leaves_by_path(tree).items():
    array = np.ascontiguousarray(leaf)
    found.update(f"{path}{array.dtype}{np.shape(leaf)}".encode())
    found.update(array.tobytes())
  return found.hexdigest()


def with_leaves(like: Any, leaves: Mapping[Path, Any]) -> Any:
  """Returns a tree like the given one, with leaves by their paths."""
  structure = jax.tree.structure(like)
  return jax.tree.unflatten(structure, [leaves[path] for path in leaves_by_path(like)])


def is_traced(tree: Any) -> bool:
  """Returns whether a tree has leaves without values, as `jax.jit` and `jax.vmap` hand them in."""
  return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def shapes_of(tree: Any) -> Any:
  """Returns a tree with the shapes and types of arrays, hashable leaf by leaf."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def replaced(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns arrays with others in their places, of the same types.

  Args:
    own: by name.
    others: by name; of others than those nothing is used.

  Raises:
    InputError: one has another shape than the array in whose place it is.
  """
  for name, array in own.items():
    if np.shape(others.get(name, array)) != np.shape(array):
      raise InputError(
        f"the array {name!r} has shape {np.shape(others[name])}; expected {np.shape(array)}, as the"
        " network has it."
      )
  return {name: np.asarray(others.get(name, x), np.asarray(x).dtype) for name, x in own.items()}
