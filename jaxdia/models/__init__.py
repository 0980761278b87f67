"""Dropout models with explicit masks: `create`, `from_flax`, `from_functions`, `DropoutModel`."""

from jaxdia.models.base import (
  DropoutModel,
  Network,
  batch_axes,
  check_rate,
  drop,
  expected_masks,
  model_of,
  sample_masks,
)
from jaxdia.models.create import create
from jaxdia.models.flax import from_flax, read_masks
from jaxdia.models.flax_variables import batch_moments
from jaxdia.models.functions import from_functions
from jaxdia.models.layers import Convolution, DenseLayer, Entry, Site, Taps
from jaxdia.models.reference import params_of_reference
from jaxdia.models.zoo import MODELS

__all__ = [
  "MODELS",
  "Convolution",
  "DenseLayer",
  "DropoutModel",
  "Entry",
  "Network",
  "Site",
  "Taps",
  "batch_axes",
  "batch_moments",
  "check_rate",
  "create",
  "drop",
  "expected_masks",
  "from_flax",
  "from_functions",
  "model_of",
  "params_of_reference",
  "read_masks",
  "sample_masks",
]
