"""What Flower's clients and servers send, as arrays by their names."""

from typing import Any

import numpy as np

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.types import NamedArrays
from jaxdia.updates.names import named_arrays, with_known_type

# Attributes by which Flower's objects hold others: a FitRes its parameters, a Message its content.
_HOLDERS = ("parameters", "content")


def from_flower(update: Any) -> NamedArrays:
  """Returns the arrays of an object of Flower.

  Flower sends weights, not gradients: take them with those that the server sent to `fit`, and
  both to `from_weights`.

  Args:
    update: an `ArrayRecord`; a `RecordDict`, or a `Message`, that holds one; `Parameters` of the
      older interface, or a `FitRes` with them; or a list of NumPy arrays.

  Returns:
    The arrays by name. Lists and `Parameters` have none, so "0", "1", ... are their names; `fit`
    takes these `by_order`.

  Raises:
    InputError: it is none of these, or its arrays cannot be read.
  """
  try:
    return named_arrays(_arrays(update))
  except InputError:
    raise
  except Exception as error:  # what NumPy raises depends on the byte that is wrong
    raise InputError(
      f"an array of the {type(update).__name__} cannot be read ({first_line(error)}); expected"
      " those of numpy.save, as Flower writes them."
    ) from error


def _arrays(update: Any) -> Any:
  if _is_list(update):
    return update
  for name in _HOLDERS:
    if hasattr(update, name):
      return _arrays(getattr(update, name))
  if hasattr(update, "array_records"):
    records = list(update.array_records.values())
    if len(records) != 1:
      raise InputError(
        f"the {type(update).__name__} holds {len(records)} ArrayRecords, {list(update)}; expected"
        " one. Pass the one that you mean."
      )
    return _arrays(records[0])
  if hasattr(update, "tensors"):
    # It is installed, as the object comes from there.
    from flwr.common import parameters_to_ndarrays  # pyright: ignore[reportMissingImports]

    return [with_known_type(array) for array in parameters_to_ndarrays(update)]
  if hasattr(update, "to_numpy_ndarrays"):
    # The type is written beside the array, as NumPy's format has no name for bfloat16.
    return {name: with_known_type(array.numpy(), array.dtype) for name, array in update.items()}
  raise InputError(
    f"from_flower got {type(update).__name__}; expected an ArrayRecord, Parameters, an object that"
    " holds one of them, or a list of NumPy arrays."
  )


def _is_list(update: Any) -> bool:
  return isinstance(update, (list, tuple)) and all(isinstance(a, np.ndarray) for a in update)
