"""Creates the built-in networks by name."""

import dataclasses
from typing import Any

from jaxdia.core.errors import InputError, check_count, kind_of, unknown
from jaxdia.models.base import DropoutModel, check_image_shape, check_rate
from jaxdia.models.flax import from_flax
from jaxdia.models.zoo import MODELS


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
      see the classes in `jaxdia.models.zoo`.

  Returns:
    The model; `model.init(key)` draws its parameters. Equal arguments give equal models, and
    those that differ in a rate above 0 alone share compiled programs.

  Raises:
    InputError: unknown name or option, or a value that the network cannot take.
  """
  if name not in MODELS:
    raise unknown("model", name, MODELS)
  module_class, defaults = MODELS[name]
  image_shape = check_image_shape(image_shape)
  rate = check_rate(dropout_rate)
  num_classes = check_count("num_classes", num_classes, 2)
  checked = check_options(name, module_class, options)
  # Of all rates above 0 the network is the same.
  module = module_class(num_classes, 0.5 if rate else 0.0, **defaults | checked)
  if hasattr(module, "check"):
    module.check(image_shape)
  model = from_flax(module, image_shape)
  return dataclasses.replace(model, rates=dict.fromkeys(model.rates, rate))


def check_model(model: Any) -> None:
  """Refuses what is no model.

  Args:
    model: that is to be trained or attacked.

  Raises:
    InputError: it is something else.
  """
  if not isinstance(model, DropoutModel):
    raise InputError(
      f"the model is {kind_of(model)}; expected a jaxdia.models.DropoutModel, as"
      " models.create(name, image_shape, num_classes) and models.from_module(module, image_shape)"
      " make one."
    )


def check_options(name: str, module_class: type, options: dict[str, Any]) -> dict[str, Any]:
  """Returns options of a built-in network, which are of the kind of their defaults.

  Args:
    name: of the model, for the message.
    module_class: whose attributes they are; those without a default are no options.
    options: by name.

  Raises:
    InputError: unknown option, or a value that it cannot take.
  """
  fields = {f.name: f.default for f in dataclasses.fields(module_class) if f.init}
  given = ("num_classes", "dropout_rate", "parent", "name")
  known = [f for f in fields if f not in given and fields[f] is not dataclasses.MISSING]
  for option in options:
    if option not in known:
      raise unknown(f"option of the model {name}:", option, known)
  return {o: _check_option(name, o, value, fields[o]) for o, value in options.items()}


def _check_option(model: str, option: str, value: Any, default: Any) -> Any:
  """Returns the value of an option, which is of the kind of its default."""
  where = f"{option} of the model {model}"
  if isinstance(default, bool):
    if not isinstance(value, bool):
      raise InputError(f"{where} is {value!r}; expected True or False.")
    return value
  if isinstance(default, str):  # which there are, the network knows
    return value
  if not isinstance(default, tuple):
    return check_count(where, value, 1)
  if not isinstance(value, (list, tuple)):
    raise InputError(f"{where} is {value!r}; expected positive integers.")
  return tuple(check_count(where, number, 1) for number in value)
