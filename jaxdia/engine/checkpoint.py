"""The states of running trials in one npz file, to go on after an interruption.

An npz carries a checksum of each array, so that a damaged file is found, and one
file can be replaced atomically.
"""

import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

from jaxdia.errors import InputError
from jaxdia.files import write_npz


def save(path: pathlib.Path, tree: Any) -> None:
  """Writes a pytree of arrays atomically.

  Args:
    path: of the npz file.
    tree: arrays on the host or on devices.
  """
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  write_npz(path, {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves})


def restore(path: pathlib.Path, like: Any) -> Any | None:
  """Reads a pytree that `save` wrote.

  Args:
    path: of the npz file.
    like: a pytree of arrays or shapes with the structure to be read.

  Returns:
    A pytree of numpy arrays, or None if there is no file.

  Raises:
    InputError: the file is damaged, or holds something else.
  """
  if not path.exists():
    return None
  advice = "Delete it to start the unfinished trials anew; finished ones are kept"
  keys = [(jax.tree_util.keystr(key), leaf) for key, leaf in jax.tree.leaves_with_path(like)]
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = [file[key] for key, _ in keys]
  except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError, TypeError) as error:
    raise InputError(f"the checkpoint {path} is damaged ({error!r}). {advice}.") from error
  for (key, leaf), array in zip(keys, arrays, strict=True):
    if array.shape != leaf.shape or array.dtype != leaf.dtype:
      raise InputError(
        f"the checkpoint {path} has {key} as {array.dtype}{array.shape}; expected"
        f" {leaf.dtype}{leaf.shape}: it was made with other lanes or devices. {advice}."
      )
  return jax.tree.unflatten(jax.tree.structure(like), arrays)
