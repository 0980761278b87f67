"""What NVFlare's clients send, as arrays by their names."""

from typing import Any, Literal

from jaxdia.core.errors import InputError
from jaxdia.core.types import NamedArrays
from jaxdia.updates.names import named_arrays

_KINDS: dict[str, Literal["weights", "difference"]] = {"FULL": "weights", "DIFF": "difference"}


def from_nvflare(model: Any) -> tuple[NamedArrays, Literal["weights", "difference"]]:
  """Returns the arrays of an `FLModel`, and what they are.

  Args:
    model: of NVFlare, with arrays of NumPy or PyTorch.

  Returns:
    The arrays by name; and "weights" (FULL), for `from_weights`, or "difference" (DIFF), for
    `from_difference`.

  Raises:
    InputError: it is no `FLModel`, or has no params.
  """
  if not hasattr(model, "params_type") or not hasattr(model, "params"):
    raise InputError(f"from_nvflare got {type(model).__name__}; expected an FLModel.")
  kind = getattr(model.params_type, "value", model.params_type)
  arrays = named_arrays(model.params or {})
  if kind not in _KINDS or not arrays:
    raise InputError(
      f"the FLModel has the params_type {kind} and {len(arrays)} arrays; expected FULL or DIFF, and"
      " the arrays of a model. It may carry metrics only."
    )
  return arrays, _KINDS[kind]
