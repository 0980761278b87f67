"""The states of running trials in one npz file, to go on after an interruption.

An npz carries a checksum of each array, so that a damaged file is found, and one
file can be replaced atomically.
"""

import hashlib
import pathlib
import re
from typing import Any

import jax
import numpy as np

from jaxdia.core import trees
from jaxdia.core.errors import InputError
from jaxdia.core.files import UnreadableFile, read_npz, write_npz

DIGEST_BYTES = 16


def digest(tree: Any, *more: bytes) -> bytes:
  """Returns bytes that tell trees apart by their structure and by all of their numbers.

  Args:
    tree: of arrays and numbers.
    *more: what belongs to it too.
  """
  # Where in memory a function lies is different in every process.
  structure = re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree)))
  parts = [structure.encode(), trees.digest(tree).encode(), *more]
  return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def check_digest(path: pathlib.Path, saved: bytes, expected: bytes) -> None:
  """Refuses a saved trial that is not the expected one.

  Args:
    path: of the checkpoint.
    saved: digest that was saved with the trial.
    expected: of the trial that is to be taken up.

  Raises:
    InputError: they differ.
  """
  if saved != expected:
    raise InputError(
      f"the checkpoint {path} is of another run: its attack, key, params or gradients differ from"
      " those of this one. Delete it, or choose another path."
    )


def save(path: pathlib.Path, tree: Any) -> None:
  """Writes a pytree of arrays atomically.

  Args:
    path: of the npz file.
    tree: arrays on the host or on devices.
  """
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  write_npz(path, {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves})


def restore(path: pathlib.Path, like: Any, lane_axes: int = 0) -> Any | None:
  """Reads a pytree that `save` wrote.

  Args:
    path: of the npz file.
    like: a pytree of arrays or shapes with the structure to be read.
    lane_axes: number of leading axes whose sizes may differ.

  Returns:
    A pytree of numpy arrays, or None if there is no file.

  Raises:
    InputError: the file is damaged, or holds something else.
  """
  if not path.exists():
    return None
  advice = "Delete it to start the unfinished trials anew; finished ones are kept"
  try:
    arrays = read_npz(path)
  except UnreadableFile as error:
    raise InputError(f"the checkpoint {path} is damaged ({error}). {advice}.") from error
  leaves, lanes = [], set()
  for key, leaf in jax.tree.leaves_with_path(like):
    name = jax.tree_util.keystr(key)
    array = arrays.get(name)
    if array is None:
      raise InputError(f"the checkpoint {path} is damaged (it lacks {name}). {advice}.")
    if array.dtype.kind == "V":  # numpy does not know the name of bfloat16
      array = array.view(leaf.dtype)
    if array.shape[lane_axes:] != leaf.shape[lane_axes:] or array.dtype != leaf.dtype:
      raise InputError(
        f"the checkpoint {path} has {name} as {array.dtype}{array.shape}; expected"
        f" {leaf.dtype}{leaf.shape}: it is of another experiment. {advice}."
      )
    leaves.append(array)
    lanes.add(array.shape[:lane_axes])
  if len(lanes) > 1:
    raise InputError(f"the checkpoint {path} is damaged (its arrays differ in lanes). {advice}.")
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
