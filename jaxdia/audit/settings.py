"""Settings of an audit: the config that users see, and the values that it becomes."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from jaxdia.client import LocalUpdate, defences
from jaxdia.client.local import Optimizer
from jaxdia.client.losses import CROSS_ENTROPY, Loss
from jaxdia.core.errors import InputError, check_count, check_number, unknown
from jaxdia.core.types import Statistics
from jaxdia.data import statistics_of
from jaxdia.experiment.config import (
  ModelSettings,
  default_defence,
  make_defence,
  model_settings,
)
from jaxdia.experiment.fields import check_names, make_settings, plain, pop_group
from jaxdia.experiment.imports import find
from jaxdia.models.base import check_image_shape

T = TypeVar("T")
MODES = ("training", "evaluation")
# What an update may be given as.
KINDS = ("after", "difference", "gradient")
# The statistics of images that are not normalised.
_MEAN, _STD = (0.0,), (1.0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditSettings:
  """What is audited, and what is known of it.

  Attributes:
    model: the network; a built-in one, or the import path of the user's own.
    image_shape: (height, width, channels) of the images.
    num_classes: number of logits.
    before: files of the weights that the server sent; one, or one for each update.
    after: files of the weights that came back, one an update.
    difference: files of weights that came back minus those before, instead.
    gradient: files of gradients instead.
    by_order: match arrays by their order where names do not tell.
    batch_size: images of the client, of which each epoch takes all.
    learning_rate: of the client, for weights that came back; None if it is not known.
    local_epochs: of the client between the weights.
    local_steps: of an epoch, each with its part of the images.
    optimizer: of the client, "sgd" or "adam".
    momentum: of SGD, which starts at 0.
    clients: whose updates were averaged; the images of all of them are the batch.
    weight_decay: of the client.
    loss: that the client descends.
    defence: what the client did to its gradient before it sent it.
    mode: "training", in which dropout is on, or "evaluation".
    statistics: that normalise the images.
    labels: classes of the batch, if they are known; of one batch for all updates, or of each.
    seconds: that a search may take for each update; 0 tries linear algebra alone.
    truth: npz file with images and labels to score against, or None.
    seed: of everything that is drawn.
  """

  model: ModelSettings
  image_shape: tuple[int, int, int]
  num_classes: int
  before: tuple[str, ...]
  after: tuple[str, ...] = ()
  difference: tuple[str, ...] = ()
  gradient: tuple[str, ...] = ()
  by_order: bool = False
  batch_size: int = 1
  learning_rate: float | None = None
  local_epochs: int = 1
  local_steps: int = 1
  optimizer: Optimizer = "sgd"
  momentum: float = 0.0
  clients: int = 1
  weight_decay: float = 0.0
  loss: Loss = CROSS_ENTROPY
  defence: defences.Defence = defences.identity
  mode: str = "training"
  statistics: Statistics
  labels: tuple[tuple[int, ...], ...] = ()
  seconds: float = 60.0
  truth: str | None = None
  seed: int = 0

  def __post_init__(self):
    check_image_shape(self.image_shape)
    check_count("config.num_classes", self.num_classes, 2)
    check_count("config.batch_size", self.batch_size, 1)
    check_count("config.seed", self.seed, 0, 2**32 - 1)
    if self.mode not in MODES:
      raise unknown("value of config.mode:", self.mode, MODES)
    channels = self.image_shape[-1]
    for name, numbers in zip(("mean", "std"), self.statistics, strict=True):
      if len(numbers) not in (1, channels):
        raise InputError(
          f"the {name} of config.statistics or config.{name} has {len(numbers)} numbers; expected"
          f" {channels}, one for each channel of config.image_shape={self.image_shape}, or 1."
        )
    for label in itertools.chain(*self.labels):
      if not 0 <= label < self.num_classes:
        raise InputError(
          f"config.labels contains {label}; expected classes from 0 to {self.num_classes - 1}, as"
          " config.num_classes says."
        )
    for name in ("seconds", "weight_decay"):
      least_0 = "a number of at least 0"
      check_number(f"config.{name}", getattr(self, name), lambda value: value >= 0, least_0)
    if not self.before:
      raise InputError(
        "config.before is not set; expected the file of the weights that the server sent, such as"
        " --config.before=before.safetensors."
      )
    given = [kind for kind in KINDS if getattr(self, kind)]
    if len(given) != 1:
      names = [f"config.{kind}" for kind in KINDS]
      raise InputError(
        f"of {', '.join(names)} {len(given)} are set; expected one of them: the weights that the"
        " client sent back, their difference from those before, or its gradient."
      )
    for name, between in (("before", "commas"), ("labels", "semicolons")):
      count = len(getattr(self, name))
      if count > 1 and count != len(self.updates):
        raise InputError(
          f"config.{name} holds {count} for {len(self.updates)} updates; expected one for all of"
          f" them, or one for each, with {between} between."
        )
    local = self.local  # refuses what it cannot be
    local.images_a_step(self.batch_size)
    if self.gradient and (self.learning_rate is not None or not local.is_gradient):
      raise InputError(
        f"config.learning_rate={self.learning_rate} and config.local_steps={self.local_steps}, or"
        " other facts of local training, are of weights that came back, and config.gradient is set."
        " Leave them out, or give the file as config.after or config.difference."
      )
    if self.learning_rate is None and not local.is_gradient:
      raise InputError(
        f"{local.draws} local steps of {self.optimizer} are set without config.learning_rate, which"
        " an attack must know to take them too. Set it; or leave the steps out, and the update is"
        " audited as if it were of one."
      )
    if self.learning_rate is not None:
      least = "the learning rate of the client, above 0, or nothing if it is not known"
      check_number("config.learning_rate", self.learning_rate, lambda value: value > 0, least)
    elif not self.gradient and self.weight_decay:
      raise InputError(
        f"config.weight_decay={self.weight_decay} is set without config.learning_rate, by which it"
        " changed the weights. Leave it out: weight decay is found."
      )

  @property
  def local(self) -> LocalUpdate:
    """What the client did between the weights."""
    names = {"epochs": "local_epochs", "steps": "local_steps"}
    names |= {name: name for name in ("optimizer", "momentum", "clients")}
    fields = {field: getattr(self, name) for field, name in names.items()}
    return LocalUpdate(learning_rate=self.learning_rate or 1.0, **fields)

  def each(self, values: tuple[T, ...]) -> tuple[T, ...]:
    """Returns what is known of each update.

    Args:
      values: one for all updates, or one for each.
    """
    return values * len(self.updates) if len(values) == 1 else values

  @property
  def updates(self) -> tuple[str, ...]:
    """Files of the updates."""
    return self.after or self.difference or self.gradient

  def to_json(self) -> dict[str, Any]:
    """Returns what audit.json says of them."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    mean, std = self.statistics
    return fields | {
      "model": self.model.to_json(),
      "statistics": {"mean": mean, "std": std},
      "loss": dataclasses.asdict(self.loss) | {"kind": _name(self.loss)},
      "defence": defences.to_json(self.defence),
    }


def default_config() -> ml_collections.ConfigDict:
  """Returns the config of an audit, in which what has no default is to be set."""
  return ml_collections.ConfigDict(
    {
      "model": ModelSettings().to_json(),
      "image_shape": (28, 28, 1),
      "num_classes": 10,
      "before": config_dict.placeholder(str),
      "after": config_dict.placeholder(str),
      "difference": config_dict.placeholder(str),
      "gradient": config_dict.placeholder(str),
      "by_order": False,
      "batch_size": 1,
      "learning_rate": config_dict.placeholder(float),
      "local_epochs": 1,
      "local_steps": 1,
      "optimizer": "sgd",
      "momentum": 0.0,
      "clients": 1,
      "weight_decay": 0.0,
      "loss": dataclasses.asdict(CROSS_ENTROPY),
      "defence": default_defence(),
      "mode": "training",
      "statistics": config_dict.placeholder(str),
      "mean": _MEAN,
      "std": _STD,
      "labels": config_dict.placeholder(str),
      "seconds": 60.0,
      "truth": config_dict.placeholder(str),
      "seed": 0,
    }
  )


def validate(config: ml_collections.ConfigDict) -> AuditSettings:
  """Returns a config as settings, or says what is wrong with it.

  Args:
    config: with the fields of `default_config`, and in `model` the options of the network.

  Raises:
    InputError: a field that does not exist, or a value that it cannot take.
  """
  fields = plain(ml_collections.ConfigDict(config).to_dict())
  check_names("config field", fields, list(default_config()))
  model, loss, defence = (pop_group(fields, name) for name in ("model", "loss", "defence"))
  files = {kind: _split(fields.pop(kind)) for kind in KINDS}
  named, mean, std = (fields.pop(name) for name in ("statistics", "mean", "std"))
  if named is not None and (tuple(mean), tuple(std)) != (_MEAN, _STD):
    raise InputError(
      f"config.statistics={named} and config.mean={mean}, config.std={std} are both set; expected"
      " one of them: the name of a data set, or the numbers."
    )
  statistics = Statistics(mean, std) if named is None else statistics_of(named)
  labels, before = fields.pop("labels"), fields.pop("before")
  if ":" in str(loss.get("kind")):
    loss["kind"] = _function(loss["kind"])
  return AuditSettings(
    model=model_settings(model),
    statistics=statistics,
    loss=make_settings(Loss, "loss", loss),
    defence=make_defence(defence),
    before=_split(before),
    labels=() if labels is None else tuple(_labels(of_one) for of_one in str(labels).split(";")),
    **files,
    **fields,
  )


def _split(names: str | None) -> tuple[str, ...]:
  return tuple(name.strip() for name in (names or "").split(",") if name.strip())


def _labels(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(label) for label in text.split(","))
  except ValueError:
    raise InputError(
      f"config.labels is {text!r}; expected classes separated by commas, such as 3,1,4,1, and lists"
      " of several updates by semicolons."
    ) from None


def _function(path: str) -> Callable[..., Any]:
  """Returns the loss that an import path names."""
  found = find(path, "config.loss.kind", "mypackage:loss")
  if not callable(found):
    raise InputError(
      f"config.loss.kind={path} gives a {type(found).__name__}; expected a function(logits,"
      " targets) that returns one number for the batch."
    )
  return found


def _name(loss: Loss) -> str:
  """Returns what audit.json calls the kind of a loss."""
  if not callable(loss.kind):
    return loss.kind
  return f"{getattr(loss.kind, '__module__', None) or type(loss.kind).__module__}:{loss.name}"
