"""The network of an experiment: a built-in one, or the user's own by its import path."""

import contextlib
import functools
import hashlib
import inspect
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from jaxdia import models
from jaxdia.core.errors import InputError, unknown
from jaxdia.experiment.config import ModelSettings
from jaxdia.experiment.imports import find, module_of, reason_of
from jaxdia.models import DropoutModel

# Where the import path is from, for messages, and what one looks like.
_FIELD, _EXAMPLE = "config.model.name", "mypackage.nets:SmallCNN"
# What a module or factory is told, if it takes arguments of these names. Modules of Equinox take a
# key, and those of NNX rngs.
_TOLD = ("num_classes", "dropout_rate", "key", "rngs")


@functools.lru_cache(maxsize=32)
def create_model(
  settings: ModelSettings, image_shape: tuple[int, int, int], num_classes: int
) -> DropoutModel:
  """Creates the network of an experiment.

  A name with a colon, "package.module:attribute", is the import path of a class of modules of
  Flax Linen, Flax NNX, Equinox or PyTorch, of such a module, of a `DropoutModel`, or of a function
  that returns one of both. What is called is given the options, and `num_classes`, `dropout_rate`,
  `key` and `rngs` if it takes them; if it takes no rate, the rates are its own. Key, rngs and
  PyTorch's seed are always 0.

  Args:
    settings: name, rate and options.
    image_shape: (height, width, channels).
    num_classes: number of logits.

  Raises:
    InputError: see `jaxdia.models.create` and `jaxdia.models.from_module`; or there is nothing
      at the import path, it does not take the options, or it gives no network.
  """
  options, rate = dict(settings.options), settings.dropout_rate
  if ":" not in settings.name:
    return models.create(settings.name, image_shape, num_classes, rate, **options)
  found = find(settings.name, _FIELD, _EXAMPLE)
  if not isinstance(found, DropoutModel) and models.library_of(found) is None:
    told = {"num_classes": num_classes, "dropout_rate": rate, "key": jax.random.key(0)}
    told["rngs"] = nnx.Rngs(0)
    found = _call(settings.name, found, options, told)
  elif options:
    raise InputError(
      f"config.model.{next(iter(options))} is set, but {settings.name} is made already and takes"
      " no arguments. Name its class, or leave the field out."
    )
  if isinstance(found, DropoutModel):
    return _of_classes(settings.name, found, num_classes)
  if models.library_of(found) is None:
    raise InputError(
      f"config.model.name={settings.name} gives {_kind(found)}; expected a module of Flax Linen,"
      " Flax NNX, Equinox or PyTorch, or a jaxdia.models.DropoutModel, or what returns one."
    )
  try:
    model = models.from_module(found, image_shape)
  except InputError:
    raise
  except Exception as error:  # whatever the user's module raises
    raise InputError(
      f"config.model.name={settings.name} cannot be called on images of {image_shape}:"
      f" {reason_of(error)}."
    ) from error
  return _of_classes(settings.name, model, num_classes)


def _of_classes(path: str, model: DropoutModel, num_classes: int) -> DropoutModel:
  """Returns a model of so many classes; a factory that takes **kwargs is not told the number."""
  if model.num_classes != num_classes:
    raise InputError(
      f"config.model.name={path} gives {model.num_classes} logits; expected {num_classes}, the"
      f" number of classes. Set config.model.num_classes={num_classes}, if the network takes it; or"
      " correct the number of classes."
    )
  return model


def common_rate(model: DropoutModel) -> float:
  """Returns the dropout rate of all sites, their mean if they differ, 0 if there are none.

  Args:
    model: the network.
  """
  rates = [float(rate) for rate in model.rates.values()]
  return rates[0] if len(set(rates)) == 1 else sum(rates) / max(len(rates), 1)


def count_weights(model: DropoutModel) -> int:
  """Returns the number of entries of all weights; none is drawn.

  Args:
    model: the network.
  """
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def source_digest(settings: ModelSettings) -> str | None:
  """Returns the SHA-256 of the file that the user's own network is in; None of a built-in one.

  Args:
    settings: of the network.
  """
  if ":" not in settings.name:
    return None
  file = getattr(module_of(settings.name, _FIELD, _EXAMPLE), "__file__", None)
  return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() if file else None


def _call(path: str, function: Any, options: dict[str, Any], told: dict[str, Any]) -> Any:
  """Calls a class or function with the options, and with those of `told` that it takes."""
  try:
    parameters = inspect.signature(function).parameters
    if isinstance(function, type) and list(parameters) == ["args", "kwargs"]:
      # NNX's classes are called through their class, which takes anything.
      parameters = inspect.signature(function.__init__).parameters
  except (TypeError, ValueError):
    raise InputError(
      f"config.model.name={path} gives {_kind(function)}; expected a class or a function."
    ) from None
  # Without those that every Linen module has besides its own.
  known = [name for name in parameters if name not in ("self", "parent", "name")]
  takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
  for name in options:
    if name not in known and not takes_all:
      raise unknown(f"argument of {path}:", name, [n for n in known if n not in _TOLD] or ["none"])
  try:
    with _seeded():
      return function(**{k: v for k, v in told.items() if k in known} | options)
  except (TypeError, ValueError) as error:
    raise InputError(f"config.model.name={path} cannot be made: {reason_of(error)}.") from error


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
  """Lets PyTorch draw the same weights in each process, and leaves its state as it was."""
  torch = sys.modules.get("torch")
  if torch is None:
    yield
    return
  with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    yield


def _kind(value: Any) -> str:
  return f"a {type(value).__name__}"
