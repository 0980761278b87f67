"""Settings of an experiment: the config that users see, and its validated form."""

import dataclasses
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from jaxdia.attacks import PRESETS, AttackSettings
from jaxdia.core.errors import InputError, unknown
from jaxdia.data import STATISTICS
from jaxdia.matching import METHODS
from jaxdia.models import MODELS

# Products of fewer bits are not among them: see ARCHITECTURE.md.
PRECISIONS = ("float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """Which images are attacked; see `jaxdia.data.load`.

  Attributes:
    source: where the images come from: samples:NAME, tfds:NAME/SPLIT, npz:PATH or folder:PATH.
    count: number of images.
    offset: index of the first image.
    batch_size: images in one client's batch; it divides `count`.
    mask_seeds: how many gradients are taken of each batch, each with its own masks.
    image_size: side in pixels to scale to, or None.
    num_classes: or None, to take it from the source.
    statistics: name of the data set whose statistics to use, or None.
  """

  source: str = "samples:mnist"
  count: int = 16
  offset: int = 0
  batch_size: int = 1
  mask_seeds: int = 1
  image_size: int | None = None
  num_classes: int | None = None
  statistics: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
  """How the trials are run: what changes speed but no result.

  Attributes:
    lanes: trials that a device runs at once; None chooses from model and memory.
    chunk: steps between two looks at the lanes; None chooses about a second.
    matching: how the kernel gradients of dense layers are compared: "formed",
      "factored", or "auto", which chooses the cheaper way for each layer.
    checkpoint_seconds: how often running trials are saved.
  """

  lanes: int | None = None
  chunk: int | None = None
  matching: str = "auto"
  checkpoint_seconds: float = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
  """A validated experiment.

  Attributes:
    seed: of everything that is drawn.
    precision: floating-point type of weights, gradients and search.
    data: the victims.
    model: name, dropout_rate and options of `jaxdia.models.create`.
    restarts: trials for each batch; the one with the best objective counts.
    attacks: settings by name of the preset, in the order in which they run.
    engine: how the trials are run.
  """

  seed: int
  precision: str
  data: DataSettings
  model: dict[str, Any]
  restarts: int
  attacks: dict[str, AttackSettings]
  engine: EngineSettings

  def to_json(self) -> dict[str, Any]:
    """Returns what goes into config.json: all settings, resolved."""
    return {
      "seed": self.seed,
      "precision": self.precision,
      "data": dataclasses.asdict(self.data),
      "model": {k: list(v) if isinstance(v, tuple) else v for k, v in self.model.items()},
      "restarts": self.restarts,
      "attacks": {name: dataclasses.asdict(a) for name, a in self.attacks.items()},
      "engine": dataclasses.asdict(self.engine),
    }


def default_config() -> ml_collections.ConfigDict:
  """Returns the config from which those in `configs/` are made.

  A field of `attack` that is None has the value of the attack's preset, which is
  the paper's (see `jaxdia.attacks.AttackSettings`). `attack.name` may name
  several attacks, separated by commas: they are run on the same gradients.
  """
  settings = {
    f.name: config_dict.placeholder(_kind(f.type)) for f in dataclasses.fields(AttackSettings)
  }
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "precision": "float32",
      "data": _placeholders(DataSettings()),
      "model": {"name": "mlp", "dropout_rate": 0.25},
      "attack": {"name": "dia", "restarts": 1} | settings,
      "engine": _placeholders(EngineSettings()),
    }
  )


def _placeholders(settings) -> dict[str, Any]:
  """Returns a dictionary in which fields that are None still know their type."""

  def field(f):
    value = getattr(settings, f.name)
    if value is not None:
      return value
    return config_dict.placeholder(_kind(f.type))

  return {f.name: field(f) for f in dataclasses.fields(settings)}


def _kind(annotation) -> type:
  """Returns X of `X | None`."""
  kinds = [t for t in typing.get_args(annotation) if t is not types.NoneType]
  return kinds[0] if kinds else annotation


def validate(config: ml_collections.ConfigDict) -> ExperimentSettings:
  """Returns a config as settings that can be run, or says what is wrong with it.

  Args:
    config: with the fields of `default_config`, and in `model` the options of
      the network.

  Raises:
    InputError: a field that does not exist, or a value that it cannot take.
  """
  config = ml_collections.ConfigDict(config).to_dict()
  _check_names("config field", config, ["seed", "precision", "data", "model", "attack", "engine"])
  for name in ("data", "model", "attack", "engine"):
    if not isinstance(config.get(name), dict):
      raise InputError(f"config.{name} is {config.get(name)!r}; expected a group of fields.")
  seed = config.get("seed", 0)
  if type(seed) is not int or not 0 <= seed < 2**32:
    raise InputError(f"config.seed is {seed!r}; expected an integer in [0, 2**32).")
  precision = config.get("precision", "float32")
  if precision not in PRECISIONS:
    raise unknown("value of config.precision:", precision, PRECISIONS)
  return ExperimentSettings(
    seed=seed,
    precision=precision,
    data=_validate_data(config["data"]),
    model=_validate_model(config["model"]),
    **_validate_attack(dict(config["attack"])),
    engine=_validate_engine(config["engine"]),
  )


def _check_names(what, given, known):
  for name in given:
    if name not in known:
      raise unknown(what, name, known)


def _check_integer(name, value, least):
  if type(value) is not int or value < least:
    raise InputError(f"{name} is {value!r}; expected an integer of at least {least}.")


def _validate_data(fields) -> DataSettings:
  _check_names("field of config.data:", fields, [f.name for f in dataclasses.fields(DataSettings)])
  data = DataSettings(**fields)
  _check_integer("config.data.count", data.count, 1)
  _check_integer("config.data.offset", data.offset, 0)
  _check_integer("config.data.batch_size", data.batch_size, 1)
  _check_integer("config.data.mask_seeds", data.mask_seeds, 1)
  for name in ("image_size", "num_classes"):
    if getattr(data, name) is not None:
      _check_integer(f"config.data.{name}", getattr(data, name), 1)
  if data.count % data.batch_size:
    raise InputError(
      f"config.data.count={data.count} images cannot be cut into batches of"
      f" config.data.batch_size={data.batch_size}; make the count a multiple of it."
    )
  return data


def _validate_model(fields) -> dict[str, Any]:
  if not isinstance(fields.get("name"), str) or fields["name"] not in MODELS:
    raise unknown("model", fields.get("name"), MODELS)
  return {"dropout_rate": 0.25} | fields


def _validate_attack(fields) -> dict[str, Any]:
  known = ["name", "restarts"] + [f.name for f in dataclasses.fields(AttackSettings)]
  _check_names("field of config.attack:", fields, known)
  names = [name.strip() for name in str(fields.pop("name", "")).split(",")]
  for name in names:
    if name not in PRESETS:
      raise unknown("attack", name, PRESETS)
  if len(set(names)) < len(names):
    raise InputError(f"config.attack.name is {','.join(names)!r}; expected each attack once.")
  restarts = fields.pop("restarts", 1)
  _check_integer("config.attack.restarts", restarts, 1)
  overrides = {name: value for name, value in fields.items() if value is not None}
  attacks = {name: PRESETS[name].override(**overrides) for name in names}
  return {"restarts": restarts, "attacks": attacks}


def _validate_engine(fields) -> EngineSettings:
  known = [f.name for f in dataclasses.fields(EngineSettings)]
  _check_names("field of config.engine:", fields, known)
  engine = EngineSettings(**fields)
  for name in ("lanes", "chunk"):
    if getattr(engine, name) is not None:
      _check_integer(f"config.engine.{name}", getattr(engine, name), 1)
  if engine.matching not in METHODS:
    raise unknown("value of config.engine.matching:", engine.matching, METHODS)
  seconds = engine.checkpoint_seconds
  if not isinstance(seconds, (int, float)) or not 0 <= seconds < float("inf"):
    raise InputError(
      f"config.engine.checkpoint_seconds is {seconds!r}; expected a number of"
      " seconds of at least 0."
    )
  return engine


def config_for(model: str, dataset: str, **options: Any) -> ml_collections.ConfigDict:
  """Returns the config of a network on one of the sample data sets.

  Args:
    model: name of the network.
    dataset: mnist, fashion_mnist, cifar10, cifar100 or imagenet.
    **options: of the network, so that they can be overridden.

  Raises:
    InputError: there is no such data set.
  """
  if dataset not in STATISTICS:
    raise unknown("data set of the config:", dataset, STATISTICS)
  config = default_config()
  config.data.source = f"samples:{dataset}"
  if dataset == "imagenet":
    config.data.image_size = 224
  config.model.name = model
  config.model.update(options)
  return config
