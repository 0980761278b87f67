"""A module of any library that there is an adapter for."""

import importlib
import inspect
import sys
from typing import Any

from jaxdia.core.errors import InputError, unknown
from jaxdia.models.base import DropoutModel

# Where a library's class of modules is, and where the adapter is.
_LIBRARIES = {
  "flax.linen": ("flax", "from_flax"),
  "flax.nnx": ("nnx", "from_nnx"),
  "equinox": ("equinox", "from_equinox"),
  "torch.nn": ("pytorch", "from_torch"),
}


def library_of(module: Any) -> str | None:
  """Returns the name of the library that a module is of, or None if it is of none.

  Args:
    module: whatever may be one. Libraries are not imported: there is no module of one that is not.
  """
  for name in _LIBRARIES:
    library = sys.modules.get(name)
    if library is not None and isinstance(module, library.Module):
      return name
  return None


def from_module(module: Any, image_shape: tuple[int, int, int], **options: Any) -> DropoutModel:
  """Turns a classifier of Flax Linen, Flax NNX, Equinox or PyTorch into a `DropoutModel`.

  Args:
    module: an instance of the library's class of modules.
    image_shape: (height, width, channels) of the images.
    **options: of the adapter.

  Returns:
    What `from_flax`, `from_nnx`, `from_equinox` or `from_torch` returns, whichever fits.

  Raises:
    InputError: it is of none of these libraries, or as the adapter says.
  """
  name = library_of(module)
  if name is None:
    kind = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
    raise InputError(
      f"from_module got {kind}; expected an instance of a module of Flax Linen, Flax NNX, Equinox"
      " or PyTorch. A network of another library can be given as plain functions to from_functions."
    )
  file, adapter = _LIBRARIES[name]
  function = getattr(importlib.import_module(f"jaxdia.models.{file}"), adapter)
  known = list(inspect.signature(function).parameters)[2:]
  for option in options:
    if option not in known:
      raise unknown(f"option of {adapter}:", option, known)
  return function(module, image_shape, **options)
