"""Trees of arrays: leaves by their paths, and dataclasses that are trees and equal by value."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax

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


def path_of(keys: tuple[Any, ...]) -> Path:
  """Returns the path that JAX gives a leaf as names."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def leaves_by_path(tree: Any) -> dict[Path, Any]:
  """Returns the leaves of a tree, such as params, by their paths."""
  return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_leaves(like: Any, leaves: Mapping[Path, Any]) -> Any:
  """Returns a tree like the given one, with leaves by their paths."""
  structure = jax.tree.structure(like)
  return jax.tree.unflatten(structure, [leaves[path] for path in leaves_by_path(like)])


def shapes_of(tree: Any) -> Any:
  """Returns a tree with the shapes and types of arrays, hashable leaf by leaf."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
