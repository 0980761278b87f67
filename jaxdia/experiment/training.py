"""What the weights of an experiment have learnt before a gradient is attacked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdia.core.errors import InputError, check_count, check_number

# Of the differential privacy that is said.
DELTA = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
  """Training of the network by clients, before the gradients that are attacked.

  Each step is `jaxdia.client.training.train`'s: clients with `data.batch_size` images each, with
  the dropout of the network and the defence of the experiment.

  Attributes:
    source: images to train on, as `data.source`; None leaves the weights random.
    test_source: images of which the accuracy is measured, or None. They are all its images, as are
      those of `source`, brought to the size and statistics of the images that are attacked.
    steps: of the whole training, after which the accuracy is measured.
    attacked_after: of these steps, how many were made before the gradients that are attacked; None
      attacks after all.
    clients: in a step.
    learning_rate: of Adam, by which the server descends the mean of what they send.
  """

  source: str | None = None
  test_source: str | None = None
  steps: int = 0
  attacked_after: int | None = None
  clients: int = 16
  learning_rate: float = 1e-3

  def __post_init__(self):
    check_count("config.training.steps", self.steps, 0)
    check_count("config.training.clients", self.clients, 1)
    is_positive = (lambda value: value > 0), "a finite number above 0"
    check_number("config.training.learning_rate", self.learning_rate, *is_positive)
    if self.attacked_after is not None:
      check_count("config.training.attacked_after", self.attacked_after, 0, self.steps)
    if (self.source is None) != (self.steps == 0):
      raise InputError(
        f"config.training.source is {self.source} and config.training.steps is {self.steps};"
        " expected both or neither. Name images, such as sklearn:digits/train, and how many steps."
      )
    if self.test_source is not None and not self.steps:
      raise InputError(
        f"config.training.test_source is {self.test_source}, but nothing is trained. Set"
        " config.training.source and steps, or leave it out."
      )

  @property
  def before(self) -> int:
    """Steps before the gradients that are attacked."""
    return self.steps if self.attacked_after is None else self.attacked_after


def describe(training: Mapping[str, Any]) -> str:
  """Returns what the weights have learnt, for people to read.

  Args:
    training: fields of `TrainingSettings`, of which results of other versions may lack some.
  """
  settings = TrainingSettings(**training)
  if not settings.before:
    return "random weights"
  return f"weights after {settings.before:,} steps of training on {settings.source}"
