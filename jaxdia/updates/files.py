"""Files of weights, gradients and updates as arrays by their names.

Each format is read by the library that owns it, and told by what is in the file rather than by how
it is called. Nothing is read that could run code: pickled objects are refused.
"""

import pathlib
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import UnreadableFile, read_npz
from jaxdia.core.types import NamedArrays
from jaxdia.updates.names import named_arrays, with_known_type

_EXPECTED = (
  "safetensors, npz, Flax msgpack, an Orbax folder, Equinox leaves, or a PyTorch state dict"
)
# Of files that PyTorch wrote before they became zip archives: a pickled number.
_OLD_PYTORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_MSGPACK_MAPS = {*range(0x80, 0x90), 0xDE, 0xDF}


def read(path: str | pathlib.Path) -> NamedArrays:
  """Reads all arrays of a file, or of an Orbax folder.

  Args:
    path: of safetensors, npz, Flax msgpack, an Orbax checkpoint, leaves that Equinox serialised,
      which have no names, or a PyTorch state dict, which may be wrapped, as in
      {"state_dict": ...}.

  Returns:
    The arrays by their names in the file, of the types that they have there. The names of nested
    trees have dots between their parts.

  Raises:
    InputError: there is no such file, it is of no known format, damaged, or pickled, or the library
      that reads it is not installed.
  """
  path = pathlib.Path(path)
  try:
    is_there = path.exists()
  except OSError as error:  # a name that no file can have
    raise InputError(f"{path} cannot be read ({error.strerror}); expected {_EXPECTED}.") from error
  if not is_there:
    raise InputError(f"{path} does not exist; expected {_EXPECTED}.")
  if not path.is_file() and not path.is_dir():  # a pipe or a device, which may have no end
    raise InputError(f"{path} is no regular file; expected {_EXPECTED}.")
  reader = _orbax if path.is_dir() else _reader_of(path)
  try:
    arrays = named_arrays(reader(path))
  except InputError:
    raise
  except ImportError as error:
    extra = reader.__name__.removeprefix("_")
    raise InputError(
      f"{path} needs a package that is not installed ({first_line(error)}). Run"
      f' pip install "jaxdia[{extra}]".'
    ) from error
  except Exception as error:  # what a library raises depends on the byte that is wrong
    raise InputError(
      f"{path} cannot be read ({first_line(error)}). It may be truncated or damaged; expected"
      f" {_EXPECTED}."
    ) from error
  if not arrays:
    raise InputError(f"{path} holds no arrays; expected the arrays of a model by their names.")
  return arrays


def _reader_of(path: pathlib.Path) -> Callable[[pathlib.Path], Any]:
  with open(path, "rb") as file:
    head = file.read(32)
  if not head:
    raise InputError(f"{path} is empty; expected {_EXPECTED}.")
  if head.startswith(b"PK"):
    return _zip(path)
  if head.startswith(_OLD_PYTORCH):
    return _torch
  if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:  # the first two bytes of every pickle
    raise InputError(
      f"{path} is a pickle, which is refused, as reading it could run code. Write the arrays again"
      " as safetensors or with numpy.savez(path, **arrays)."
    )
  if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
    return _safetensors
  if head[0] in _MSGPACK_MAPS:
    return _msgpack
  if head.startswith(b"\x93NUMPY"):
    return _npy
  if head.startswith(b"\x89HDF"):
    raise InputError(
      f"{path} is HDF5, which is not read; expected {_EXPECTED}. Write the arrays again, such as by"
      " numpy.savez(path, **{v.path: v.numpy() for v in model.weights})."
    )
  raise InputError(f"{path} is of no format that is known here; expected {_EXPECTED}.")


def _zip(path: pathlib.Path) -> Callable[[pathlib.Path], Any]:
  """Tells npz and PyTorch's archives apart; both are zip files."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.namelist()
  except zipfile.BadZipFile as error:
    raise InputError(
      f"{path} cannot be read ({first_line(error)}). It is truncated or damaged; copy it again."
    ) from error
  return _torch if any(name.endswith("data.pkl") for name in members) else _npz


def _npz(path: pathlib.Path) -> NamedArrays:
  try:
    arrays = read_npz(path)
  except UnreadableFile as error:
    raise InputError(
      f"{path} cannot be read ({error}). It may be damaged, or contain pickled objects, which are"
      " refused; write it again with numpy.savez(path, **arrays) from plain arrays."
    ) from error
  return {name: with_known_type(array) for name, array in arrays.items()}


def _npy(path: pathlib.Path) -> list[np.ndarray]:
  """Reads arrays one after another, as Equinox serialises the leaves of its modules."""
  arrays = []
  with open(path, "rb") as file:
    while file.tell() < path.stat().st_size:
      arrays.append(with_known_type(np.load(file, allow_pickle=False)))
  return arrays


def _safetensors(path: pathlib.Path) -> NamedArrays:
  from safetensors.numpy import load_file  # optional

  return load_file(path)


def _msgpack(path: pathlib.Path) -> Any:
  from flax import serialization

  return serialization.msgpack_restore(path.read_bytes())


def _orbax(path: pathlib.Path) -> Any:
  import orbax.checkpoint as ocp  # slow to import, and only this reader needs it

  folder = path.absolute()
  # A manager of checkpoints keeps a tree in a folder below that of the step.
  folder = folder / "default" if (folder / "default").is_dir() else folder
  if not (folder / "_METADATA").is_file():
    below = sorted(p.name for p in folder.iterdir() if p.is_dir())
    steps = [name for name in below if name.isdecimal()]
    mend = f" Choose a step: {folder / steps[-1]}." if steps else ""
    raise InputError(f"{path} is no Orbax checkpoint: it has no file _METADATA.{mend}")
  checkpointer = ocp.PyTreeCheckpointer()
  metadata = checkpointer.metadata(folder).item_metadata
  if metadata is None:
    raise InputError(f"{path} is a damaged Orbax checkpoint: what it holds is not written there.")
  # As NumPy arrays, since the devices of the checkpoint may not be there.
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
  return checkpointer.restore(folder, restore_args=as_numpy)


def _torch(path: pathlib.Path) -> Any:
  import pickle

  import torch  # pyright: ignore[reportMissingImports]  # optional, and slow to import

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of types that torch would rather see elsewhere
      return torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    raise InputError(
      f"{path} contains Python objects besides tensors, which are refused, as reading them could"
      " run code, or it is damaged. Write it again with torch.save(model.state_dict(), path)."
    ) from error
