"""Settings of an experiment: the config that users see, and the values that it becomes."""

import dataclasses
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from jaxdia.attacks import CATALOGUE, AttackSettings
from jaxdia.client import defences
from jaxdia.core.errors import InputError, check_count, check_number, unknown
from jaxdia.data import DATASETS, MOST_CLASSES, MOST_PIXELS_A_SIDE, check_source
from jaxdia.experiment.fields import (
  check_batches,
  check_names,
  make_settings,
  plain,
  pop_group,
  split_names,
)
from jaxdia.experiment.local import LocalSettings
from jaxdia.experiment.training import TrainingSettings
from jaxdia.gradients import METHODS, Method
from jaxdia.models import CONVOLVE, MODELS, Convolve, check_rate

_MOST_RESTARTS = 1_000_000  # all trials of a gradient are listed

# Products of fewer bits are not among them: see docs/decisions.md.
PRECISIONS = ("float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """Which images are attacked; see `jaxdia.data.load`.

  Attributes:
    source: where the images come from: samples:NAME, sklearn:digits/SPLIT, tfds:NAME/SPLIT,
      npz:PATH or folder:PATH.
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

  def __post_init__(self):
    check_source(self.source)
    check_batches(self.count, self.batch_size, "images")
    for name, least, most in (
      ("offset", 0, None),
      ("mask_seeds", 1, None),
      ("image_size", 1, MOST_PIXELS_A_SIDE),
      ("num_classes", 2, MOST_CLASSES),
    ):
      if getattr(self, name) is not None or name in ("offset", "mask_seeds"):
        check_count(f"config.data.{name}", getattr(self, name), least, most)

  @property
  def batches(self) -> int:
    """Number of clients, each with one batch of images."""
    return self.count // self.batch_size

  @property
  def gradients(self) -> int:
    """Number of gradients that the server sees: one for each client and mask seed."""
    return self.batches * self.mask_seeds


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The network of the clients; see `jaxdia.experiment.network.create_model`.

  Attributes:
    name: a key of `jaxdia.models.MODELS`, or the import path of a Flax module or of what makes
      one, such as "mypackage.nets:SmallCNN".
    dropout_rate: of all dropout sites.
    options: ((name, value), ...), what else the network takes; sequences are tuples.
  """

  name: str = "mlp"
  dropout_rate: float = 0.25
  options: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    if self.name not in MODELS and ":" not in str(self.name):
      error = unknown("model", self.name, MODELS)
      raise InputError(f"{error} Or give an import path, such as mypackage.nets:SmallCNN.")
    check_rate(self.dropout_rate)
    for name, value in self.options:
      try:
        hash(value)
      except TypeError:
        raise InputError(
          f"config.model.{name} is {value!r}; expected a number, a string or a sequence of them."
        ) from None

  def to_json(self) -> dict[str, Any]:
    """Returns all fields in one dictionary, as in the config."""
    return {"name": self.name, "dropout_rate": self.dropout_rate} | dict(self.options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
  """How the trials are run.

  Results are exactly the same with the same `lanes`, `matching`, `convolve` and devices. With
  others they are equal but for rounding, which a long search amplifies: two trials may end at other
  points. So a work directory keeps those that it was begun with (`jaxdia.experiment.store`).

  Attributes:
    lanes: trials that a device runs at once; None chooses from model and memory.
    chunk: steps between two looks at the lanes; None chooses about a second.
    matching: how the kernel gradients of dense layers are compared: "formed",
      "factored", or "auto", which chooses the cheaper way for each layer.
    convolve: how attacks compute convolutions: "native", as a "product" of patches, or "auto",
      which chooses for each layer and device; see `jaxdia.models.DropoutModel`.
    checkpoint_seconds: how often running trials are saved.
  """

  lanes: int | None = None
  chunk: int | None = None
  matching: Method = "auto"
  convolve: Convolve = "auto"
  checkpoint_seconds: float = 30.0

  def __post_init__(self):
    for name in ("lanes", "chunk"):
      if getattr(self, name) is not None:
        check_count(f"config.engine.{name}", getattr(self, name), 1)
    for name, choices in (("matching", METHODS), ("convolve", CONVOLVE)):
      if getattr(self, name) not in choices:
        raise unknown(f"value of config.engine.{name}:", getattr(self, name), choices)
    check_number(
      "config.engine.checkpoint_seconds",
      self.checkpoint_seconds,
      lambda value: value >= 0,
      "a number of seconds of at least 0",
    )


class ClientsSettings(typing.NamedTuple):
  """All that the clients and their gradients depend on; see `ExperimentSettings`."""

  seed: int
  precision: str
  data: DataSettings
  model: ModelSettings
  training: TrainingSettings
  local: LocalSettings
  defence: defences.Defence


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
  """An experiment, checked.

  Attributes:
    seed: of everything that is drawn.
    precision: floating-point type of weights, gradients and search.
    data: the images.
    model: the network.
    training: what its weights have learnt.
    local: what the clients do before they send anything.
    defence: what the clients do to their gradients before they send them.
    restarts: trials for each gradient; the one with the best objective counts.
    attacks: settings by name of the preset, in the order in which they run.
    engine: how the trials are run.
  """

  seed: int = 0
  precision: str = "float32"
  data: DataSettings = DataSettings()
  model: ModelSettings = ModelSettings()
  training: TrainingSettings = TrainingSettings()
  local: LocalSettings = LocalSettings()
  defence: defences.Defence = defences.identity
  restarts: int = 1
  attacks: dict[str, AttackSettings] = dataclasses.field(hash=False)
  engine: EngineSettings = EngineSettings()

  def __post_init__(self):
    check_count("config.seed", self.seed, 0, 2**32 - 1)
    if self.precision not in PRECISIONS:
      raise unknown("value of config.precision:", self.precision, PRECISIONS)
    check_count("config.attack.restarts", self.restarts, 1, _MOST_RESTARTS)
    self.local.update.images_a_step(self.data.batch_size)  # refuses what cannot be shared out

  @property
  def clients(self) -> ClientsSettings:
    """What experiments on the same clients have in common."""
    shared = {name: getattr(self, name) for name in ClientsSettings._fields}
    return ClientsSettings(**shared)

  def to_json(self) -> dict[str, Any]:
    """Returns what goes into config.json: all settings, resolved."""
    return {
      "seed": self.seed,
      "precision": self.precision,
      "data": dataclasses.asdict(self.data),
      "model": self.model.to_json(),
      "training": dataclasses.asdict(self.training),
      "local": dataclasses.asdict(self.local),
      "defence": defences.to_json(self.defence),
      "restarts": self.restarts,
      "attacks": {name: dataclasses.asdict(a) for name, a in self.attacks.items()},
      "engine": dataclasses.asdict(self.engine),
    }


def default_config() -> ml_collections.ConfigDict:
  """Returns the config from which those in `configs/` are made.

  A field of `attack` that is None has the value of the attack's preset, which is
  the paper's (see `jaxdia.attacks.AttackSettings`). `attack.name` may name
  several attacks, separated by commas: they are run on the same gradients. Likewise
  a field of `defence` that is None has the default of the defence that is named.
  """
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "precision": "float32",
      "data": _group(DataSettings),
      "model": ModelSettings().to_json(),
      "training": _group(TrainingSettings),
      "local": _group(LocalSettings),
      "defence": default_defence(),
      "attack": {"name": "dia", "restarts": 1} | _group(AttackSettings, unset=True),
      "engine": _group(EngineSettings),
    }
  )


def default_defence() -> dict[str, Any]:
  """Returns the group of fields that says what clients do to their gradients; None is not set."""
  return {"name": "none"} | _group(*defences.DEFENCES.values(), unset=True)


def _group(*kinds: type, unset: bool = False) -> dict[str, Any]:
  """Returns the fields of some classes by name: their defaults, or all None.

  A field that is None still knows its type.
  """

  def default(field):
    if field.default is not None and not unset:
      return field.default
    first, *_ = (*typing.get_args(field.type), field.type)  # X of `X | None`
    return config_dict.placeholder(first)

  return {field.name: default(field) for kind in kinds for field in dataclasses.fields(kind)}


def validate(config: ml_collections.ConfigDict) -> ExperimentSettings:
  """Returns a config as settings that can be run, or says what is wrong with it.

  Args:
    config: with the fields of `default_config`, and in `model` the options of
      the network.

  Raises:
    InputError: a field that does not exist, or a value that it cannot take.
  """
  fields = plain(ml_collections.ConfigDict(config).to_dict())
  groups = ("data", "model", "training", "local", "defence", "attack", "engine")
  check_names("config field", fields, ("seed", "precision", *groups))
  data, model, training, local, defence, attack, engine = (
    pop_group(fields, name) for name in groups
  )
  return ExperimentSettings(
    data=make_settings(DataSettings, "data", data),
    model=model_settings(model),
    training=make_settings(TrainingSettings, "training", training),
    local=make_settings(LocalSettings, "local", local),
    defence=make_defence(defence),
    restarts=attack.pop("restarts", 1),
    attacks=_attacks(str(attack.pop("name", "")), attack),
    engine=make_settings(EngineSettings, "engine", engine),
    **fields,
  )


def make_defence(fields: dict[str, Any]) -> defences.Defence:
  """Returns the fields of config.defence as the defence that they become.

  Args:
    fields: of the group, changed in place.

  Raises:
    InputError: see `jaxdia.client.defences.create`.
  """
  return defences.create(str(fields.pop("name", "none")), **_set(fields))


def model_settings(fields: dict[str, Any]) -> ModelSettings:
  """Returns the fields of config.model, of which the unknown ones are options of the network.

  Args:
    fields: of the group, changed in place.

  Raises:
    InputError: a value that a field cannot take.
  """
  name, rate = fields.pop("name", None), fields.pop("dropout_rate", ModelSettings.dropout_rate)
  return ModelSettings(name, rate, tuple(fields.items()))


def _set(fields: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in fields.items() if value is not None}


def _attacks(names: str, fields: dict[str, Any]) -> dict[str, AttackSettings]:
  """Returns the settings of the attacks whose names are given, separated by commas."""
  known = ["name", "restarts"] + [f.name for f in dataclasses.fields(AttackSettings)]
  check_names("field of config.attack:", fields, known)
  given = split_names("attack", names, CATALOGUE)
  return {name: CATALOGUE[name].settings.override(**_set(fields)) for name in given}


def config_for(model: str, dataset: str, **options: Any) -> ml_collections.ConfigDict:
  """Returns the config of a network on one of the sample data sets.

  Args:
    model: name of the network, or an import path of it.
    dataset: mnist, fashion_mnist, cifar10, cifar100 or imagenet.
    **options: of the network, so that they can be overridden.

  Raises:
    InputError: there is no such data set.
  """
  with_samples = [name for name, known in DATASETS.items() if known.samples]
  if dataset not in with_samples:
    raise unknown("data set of the config:", dataset, with_samples)
  config: Any = default_config()
  config.data.source = f"samples:{dataset}"
  if dataset == "imagenet":
    config.data.image_size = 224
  config.model.name = model
  config.model.update(options)
  return config
