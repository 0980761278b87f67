"""Dropout models with explicit masks: `create`, `from_flax`, `DropoutModel`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from jaxdia.core.errors import InputError, unknown
from jaxdia.models import networks
from jaxdia.models.base import (
  Convolution,
  DenseLayer,
  DropoutModel,
  Site,
  batch_axes,
  check_image_shape,
  check_rate,
  drop,
  expected_masks,
  jit_for_all_rates,
  once_a_network,
  sample_masks,
)
from jaxdia.models.flax_adapter import from_flax
from jaxdia.models.reference import params_of_reference

__all__ = [
  "MODELS",
  "Convolution",
  "DenseLayer",
  "DropoutModel",
  "Site",
  "batch_axes",
  "check_rate",
  "create",
  "drop",
  "expected_masks",
  "from_flax",
  "jit_for_all_rates",
  "once_a_network",
  "params_of_reference",
  "sample_masks",
]

# The base-size ViT of Dosovitskiy et al. 2021.
_VIT_B16 = {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_size": 3072}

# name -> (module class, arguments that differ from the defaults of the class)
MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
  "mlp": (networks.MLP, {}),
  "lenet": (networks.LeNet, {}),
  "resnet18": (networks.ResNet18, {}),
  "vit": (networks.ViT, {}),
  "vit_b16": (networks.ViT, _VIT_B16),
}


def create(
  name: str,
  image_shape: tuple[int, int, int],
  num_classes: int,
  dropout_rate: float = 0.25,
  **options: Any,
) -> DropoutModel:
  """Creates one of the built-in networks.

  Args:
    name: a key of `MODELS`.
    image_shape: (height, width, channels).
    num_classes: number of logits.
    dropout_rate: of all dropout sites, in [0, 1).
    **options: other attributes of the network, such as `hidden_sizes` of `mlp`;
      see the classes in `jaxdia.models.networks`.

  Returns:
    The model; `model.init(key)` draws its parameters.

  Raises:
    InputError: unknown name or option, or a value that the network cannot take.
  """
  if name not in MODELS:
    raise unknown("model", name, MODELS)
  module_class, defaults = MODELS[name]
  height, width, _ = check_image_shape(image_shape)
  rate = check_rate(dropout_rate)
  if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
    raise InputError(f"num_classes is {num_classes!r}; expected an integer of at least 2.")
  fields = [f.name for f in dataclasses.fields(module_class) if f.init]
  known = [f for f in fields if f not in ("num_classes", "dropout_rate", "parent", "name")]
  for option, value in options.items():
    if option not in known:
      raise unknown(f"option of the model {name}:", option, known)
    _check_option(name, option, value)
  arguments = defaults | options
  if "hidden_sizes" in arguments:  # a Flax module needs hashable attributes
    arguments["hidden_sizes"] = tuple(arguments["hidden_sizes"])
  module = module_class(num_classes, rate, **arguments)
  if isinstance(module, networks.ViT):
    _check_vit(module, height, width)
  if isinstance(module, networks.ResNet18) and module.width % module.groups:
    raise InputError(
      f"width is {module.width}; expected a multiple of the {module.groups} groups of the"
      " normalisation. Set width or groups."
    )
  return from_flax(module, image_shape)


def _check_option(name: str, option: str, value: Any) -> None:
  if option == "use_bias":
    if not isinstance(value, bool):
      raise InputError(f"use_bias of the model {name} is {value!r}; expected True or False.")
    return
  values = value if option == "hidden_sizes" else [value]
  valid = isinstance(values, (list, tuple)) and all(type(v) is int and v > 0 for v in values)
  if not valid:
    what = "positive integers" if option == "hidden_sizes" else "a positive integer"
    raise InputError(f"{option} of the model {name} is {value!r}; expected {what}.")


def _check_vit(module: networks.ViT, height: int, width: int) -> None:
  if height % module.patch_size or width % module.patch_size:
    raise InputError(
      f"images of {height}x{width} pixels cannot be cut into patches of"
      f" {module.patch_size}x{module.patch_size}; choose a patch_size that divides both sides,"
      " or another image size."
    )
  if module.width % module.num_heads:
    raise InputError(
      f"num_heads is {module.num_heads}; expected a divisor of the width {module.width}."
    )
