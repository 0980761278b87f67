"""Trees of any framework as arrays by their names, and the names taken apart."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.types import NamedArrays

# Flax NNX stores an array as the value of a variable, which some files name too.
_OF_VARIABLES = ("value", "raw_value")


def named_arrays(tree: Any) -> NamedArrays:
  """Returns the arrays of a nested tree by their names, such as "params.Dense_0.kernel".

  Args:
    tree: of dictionaries and lists, with arrays of NumPy, JAX or PyTorch. Numbers, texts and None,
      which checkpoints hold too, are left out.

  Raises:
    InputError: an array is of a kind that NumPy cannot hold.
  """
  return {".".join(path): array for path, array in _walk(tree, ())}


def _walk(tree, path):
  if isinstance(tree, Mapping):
    for key, value in tree.items():
      yield from _walk(value, (*path, str(key)))
  elif isinstance(tree, (list, tuple)):
    for i, value in enumerate(tree):
      yield from _walk(value, (*path, str(i)))
  elif hasattr(tree, "shape") and hasattr(tree, "dtype"):
    yield path, _as_numpy(tree, ".".join(path))


def _as_numpy(array: Any, name: str) -> np.ndarray:
  try:
    if not hasattr(array, "detach"):
      return with_known_type(np.asarray(array))
    array = array.detach().cpu().to_dense()
    # NumPy takes no bfloat16 from PyTorch, and float32 holds all of its values.
    dtype = jnp.dtype(str(array.dtype).removeprefix("torch."))
    through = array.float() if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else array
    return through.numpy().astype(dtype, copy=False)
  except (RuntimeError, NotImplementedError, TypeError) as error:
    raise InputError(
      f"the array {name!r} is a {type(array).__name__} of {array.dtype} that cannot be read"
      f" ({first_line(error)}); expected a plain array of floats."
    ) from error


def with_known_type(
  array: Shaped[np.ndarray, "*shape"], name: str | None = None
) -> Shaped[np.ndarray, "*shape"]:
  """Returns an array of a type that NumPy's own format cannot name by that type.

  Args:
    array: as `np.load` gives it; two anonymous bytes an entry are bfloat16.
    name: of the type, if it is written elsewhere, such as "bfloat16".
  """
  if array.dtype.kind != "V" or array.dtype.names:
    return array
  if name is None and array.dtype.itemsize == 2:
    name = "bfloat16"
  return array if name is None else array.view(jnp.dtype(name))


def parts_of(name: str) -> tuple[str, ...]:
  """Returns the parts of a name with dots, slashes or brackets between them."""
  parts = [part for part in re.split(r"[./\[\]'\"]+", name) if part]
  parts[-1:] = [part.removesuffix(":0") for part in parts[-1:]]  # as Keras names its variables
  while len(parts) > 1 and parts[-1] in _OF_VARIABLES:
    parts.pop()
  return tuple(parts)


def are_numbers(names: Any) -> bool:
  """Tells whether all names are numbers, as of a list: "0", "1", or NumPy's "arr_0", "arr_1"."""
  names = list(names)
  return bool(names) and all(re.fullmatch(r"(arr_)?\d+", name) for name in names)


def number_of(name: str) -> int:
  """Returns the number in such a name."""
  return int(name.removeprefix("arr_"))
