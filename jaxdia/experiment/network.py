"""The network of an experiment: a built-in one, or the user's own by its import path."""

import contextlib
import functools
import hashlib
import importlib
import inspect
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from jaxdia import models
from jaxdia.core.errors import InputError, first_line, unknown
from jaxdia.experiment.config import ModelSettings
from jaxdia.models import DropoutModel

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
  found = _find(settings.name)
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
    return found
  if models.library_of(found) is None:
    raise InputError(
      f"config.model.name={settings.name} gives {_kind(found)}; expected a module of Flax Linen,"
      " Flax NNX, Equinox or PyTorch, or a jaxdia.models.DropoutModel, or what returns one."
    )
  try:
    return models.from_module(found, image_shape)
  except InputError:
    raise
  except Exception as error:  # whatever the user's module raises
    raise InputError(
      f"config.model.name={settings.name} cannot be called on images of {image_shape}:"
      f" {_reason(error)}."
    ) from error


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
  file = getattr(_module(settings.name), "__file__", None)
  return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() if file else None


def _module(path: str) -> types.ModuleType:
  """Returns the module of an import path."""
  name, _, attribute = path.partition(":")
  if not name or not attribute:
    raise InputError(
      f"config.model.name is {path!r}; expected a module, a colon and what is in it, such as"
      " mypackage.nets:SmallCNN."
    )
  try:
    return importlib.import_module(name)
  except Exception as error:  # whatever the user's file raises
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    missing = absent is not None and f"{name}.".startswith(f"{absent}.")
    reason = f"there is no module {absent!r}" if missing else _reason(error)
    hint = " It is looked for in the current folder and among installed packages." * missing
    raise InputError(f"cannot import config.model.name={path}: {reason}.{hint}") from error


def _find(path: str) -> Any:
  """Returns what an import path names."""
  found, attribute = _module(path), path.partition(":")[2]
  for name in attribute.split("."):
    if not hasattr(found, name):
      known = [known for known in vars(found) if not known.startswith("_")]
      raise unknown(f"attribute of config.model.name={path}:", name, known)
    found = getattr(found, name)
  return found


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
    raise InputError(f"config.model.name={path} cannot be made: {_reason(error)}.") from error


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


def _reason(error: Exception) -> str:
  if isinstance(error, InputError):
    return str(error).removesuffix(".")
  return f"{type(error).__name__}: {first_line(error)}".removesuffix(".")
