"""What a client descends: a named loss, or a function of one's own."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from jaxdia.core.errors import InputError, check_number, first_line, unknown
from jaxdia.core.types import Labels, Logits, Scalar, as_numbers

Kind = Literal["cross_entropy", "binary_cross_entropy", "mean_squared_error"]
Reduction = Literal["mean", "sum"]
KINDS = typing.get_args(Kind)
REDUCTIONS = typing.get_args(Reduction)

# function(logits f[B, K], targets f[B, K]) -> f[]
Function = Callable[[Logits, Logits], Scalar]


@dataclasses.dataclass(frozen=True)
class Loss:
  """The loss of a batch by its logits and labels; hashable, and equal by value.

  Labels that are classes become targets of 0 and 1, then `label_smoothing` pulls all targets
  towards `1 / num_classes`: `(1 - label_smoothing) * target + label_smoothing / num_classes`.

  Attributes:
    kind: "cross_entropy" of the softmax of the logits, a number an image; "binary_cross_entropy"
      of their sigmoid, or "mean_squared_error" between the logits as they are and the targets, both
      a number a logit; or a function of one's own, `function(logits, targets) -> f[]` of two
      f[B, num_classes], equal to no other function.
    reduction: "mean" or "sum" of these numbers; a function of one's own does without.
    label_smoothing: in [0, 1).

  Raises:
    InputError: there is no such loss, or label_smoothing is out of range.
  """

  kind: Kind | Function = "cross_entropy"
  reduction: Reduction = "mean"
  label_smoothing: float = 0.0

  def __post_init__(self):
    if not callable(self.kind) and self.kind not in KINDS:
      raise unknown("kind of loss:", self.kind, KINDS)
    if self.reduction not in REDUCTIONS:
      raise unknown("reduction of the loss:", self.reduction, REDUCTIONS)
    if callable(self.kind) and self.reduction != "mean":
      raise InputError(
        f"reduction={self.reduction!r} is given to the loss {self.name}, a function of your own,"
        " which returns one number for the batch; sum inside of it, and leave reduction out."
      )
    smoothing = check_number(
      "label_smoothing", self.label_smoothing, lambda v: 0 <= v < 1, "a number in [0, 1)"
    )
    object.__setattr__(self, "label_smoothing", smoothing)

  @property
  def name(self) -> str:
    """What messages call it."""
    if not callable(self.kind):
      return self.kind
    return getattr(self.kind, "__name__", type(self.kind).__name__)

  def __call__(self, logits: Logits, labels: Labels) -> Scalar:
    """Computes the loss of a batch.

    Args:
      logits: f[B, num_classes].
      labels: i[B] classes, or f[B, num_classes] probabilities.

    Returns:
      f[].

    Raises:
      InputError: a function of one's own fails, or does not return one number.
    """
    labels = as_numbers(labels)
    if callable(self.kind):
      value = self._of_function(logits, self.targets(logits, labels))
      if value.shape:
        raise InputError(
          f"the loss {self.name} returns an array of shape {value.shape}; expected one number for"
          " the batch. Take its mean or sum."
        )
      return value
    values = self._values(logits, labels)
    return values.mean() if self.reduction == "mean" else values.sum()

  def _of_function(self, logits, targets):
    try:
      return jnp.asarray(cast(Function, self.kind)(logits, targets))
    except InputError:
      raise
    except Exception as error:  # of whatever the user's function does
      raise InputError(
        f"the loss {self.name} ended in a {type(error).__name__}: {first_line(error)}. It is called"
        " as function(logits, targets) with two f[B, num_classes], as JAX traces it, without"
        " values; expected one number, computed by JAX."
      ) from error

  def targets(self, logits: Logits, labels: Labels) -> Logits:
    """Returns what the loss pulls the outputs to, f[B, num_classes].

    Args:
      logits: of the batch.
      labels: i[B] classes, or f[B, num_classes] probabilities.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
      labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.smooth_labels(labels, self.label_smoothing) if self.label_smoothing else labels

  def _values(self, logits, labels):
    if self.kind == "cross_entropy":
      if not self.label_smoothing and jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return optax.softmax_cross_entropy(logits, self.targets(logits, labels))
    targets = self.targets(logits, labels)
    if self.kind == "binary_cross_entropy":
      return optax.sigmoid_binary_cross_entropy(logits, targets)
    return optax.squared_error(logits, targets)


CROSS_ENTROPY = Loss()


def as_loss(value: Any) -> Loss:
  """Returns a loss that is given in short, by its kind or as a function.

  Args:
    value: a loss, the name of one, or `function(logits, targets) -> f[]`.

  Raises:
    InputError: it is none of these.
  """
  if isinstance(value, Loss):
    return value
  if not callable(value) and not isinstance(value, str):
    raise InputError(
      f"loss is {value!r}; expected a Loss, one of {', '.join(KINDS)}, or a function(logits,"
      " targets)."
    )
  return Loss(value)
