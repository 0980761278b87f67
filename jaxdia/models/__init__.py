"""Dropout models with explicit masks: `create`, `from_module`, `from_functions`, `DropoutModel`.

`from_equinox` and `from_torch` are imported when they are asked for, as their libraries are extras.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxdia.models.averages import Averages, averages_after, follows_averages
from jaxdia.models.base import DropoutModel, Network, check_rate, model_of
from jaxdia.models.convolutions import CONVOLVE, Convolve
from jaxdia.models.create import check_model, create
from jaxdia.models.discovery import check_params
from jaxdia.models.entries import from_native
from jaxdia.models.evaluation import evaluation_mode
from jaxdia.models.flax import from_flax
from jaxdia.models.flax_variables import batch_moments
from jaxdia.models.functions import from_functions
from jaxdia.models.layers import Convolution, DenseLayer, Entry, Site, Taps, drop
from jaxdia.models.masks import batch_axes, expected_masks, read_masks, sample_masks
from jaxdia.models.modules import from_module, library_of
from jaxdia.models.nnx import from_nnx
from jaxdia.models.reference import params_of_reference
from jaxdia.models.zoo import MODELS

if TYPE_CHECKING:
  from jaxdia.models.equinox import from_equinox as from_equinox
  from jaxdia.models.pytorch import from_torch as from_torch

__all__ = [
  "CONVOLVE",
  "MODELS",
  "Averages",
  "Convolution",
  "Convolve",
  "DenseLayer",
  "DropoutModel",
  "Entry",
  "Network",
  "Site",
  "Taps",
  "averages_after",
  "batch_axes",
  "batch_moments",
  "check_model",
  "check_params",
  "check_rate",
  "create",
  "drop",
  "evaluation_mode",
  "expected_masks",
  "follows_averages",
  "from_flax",
  "from_functions",
  "from_module",
  "from_native",
  "from_nnx",
  "library_of",
  "model_of",
  "params_of_reference",
  "read_masks",
  "sample_masks",
]


_OF_EXTRAS = {"from_equinox": "equinox", "from_torch": "pytorch"}


def __getattr__(name: str) -> Any:
  """Returns an adapter of a library that may be absent."""
  if name in _OF_EXTRAS:
    return getattr(importlib.import_module(f"jaxdia.models.{_OF_EXTRAS[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
