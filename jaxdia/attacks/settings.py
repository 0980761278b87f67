"""What an attack leaves free and how it searches: the settings that change results."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdia.core.errors import InputError, unknown

CHOICES = {
  "masks": ("expected", "known", "free"),
  "labels": ("given", "recovered", "free"),
  "closed_form": ("none", "first", "only"),
  "distance": ("cosine", "squared_l2"),
  "optimizer": ("signed_adam", "adam", "lbfgs"),
  "schedule": ("plateau", "step", "cosine", "constant"),
}

# Iterations are counted in 32 bits.
_MAX_COUNT = 2**31 - 3

# Numbers that one compiled program takes as they come, and so may differ between its trials.
_COUNTS = ("patience", "plateau_patience", "round_masks_after")
_NUMBERS = ("learning_rate", "tv_weight", "mask_weight", "feature_weight", "tolerance", *_COUNTS)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackSettings:
  """Settings of an attack; the defaults are those of DIA in the paper.

  As a pytree its leaves are the numbers that may differ between trials of one compiled
  program; attacks whose settings have the same tree structure share one.

  Attributes:
    masks: "expected" (the network without dropout), "known" (the client's) or
      "free" (searched).
    labels: "given" in the observation, "recovered" from it, or "free": soft
      labels are searched.
    closed_form: "first" starts from what linear algebra recovers and holds fixed what
      is exact (see `jaxdia.closed_form`), "only" searches nothing, "none" does without.
    distance: between gradients: "cosine" or "squared_l2".
    optimizer: "signed_adam" (the sign of the images' derivative, then Adam; plain
      Adam for all else), "adam", or "lbfgs" with a line search.
    schedule: of the learning rate: "plateau" (times `plateau_factor` after
      `plateau_patience` iterations without improvement), "step" (times 0.1 at 3/8,
      5/8 and 7/8 of `max_iterations`, as Geiping et al. 2020), "cosine" (to 0 at
      `max_iterations`) or "constant".
    learning_rate: at the start, for images, masks and labels.
    tv_weight: of the total variation of the images.
    mask_weight: of the mask prior.
    feature_weight: of the distance from features that the closed form recovered.
    max_iterations: the trial ends after so many.
    patience: the trial ends after so many without improvement.
    plateau_patience: of the schedule "plateau".
    plateau_factor: of the schedule "plateau".
    tolerance: the trial ends when the objective falls below.
    round_masks_after: from this iteration on the masks are rounded, and the best point is
      looked for anew; 0 keeps them as they were drawn, None never rounds.
  """

  masks: str = "free"
  labels: str = "given"
  closed_form: str = "none"
  distance: str = "cosine"
  optimizer: str = "signed_adam"
  schedule: str = "plateau"
  learning_rate: float = 0.1
  tv_weight: float = 1e-5
  mask_weight: float = 1e-4
  feature_weight: float = 0.0
  max_iterations: int = 20_000
  patience: int = 4_000
  plateau_patience: int = 800
  plateau_factor: float = 0.1
  tolerance: float = 1e-5
  round_masks_after: int | None = None

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise unknown(f"value of attack.{name}:", getattr(self, name), choices)
    for name in ("max_iterations", "patience", "plateau_patience"):
      self._check(
        name,
        lambda v: type(v) is int and 1 <= v <= _MAX_COUNT,
        f"an integer from 1 to {_MAX_COUNT}",
      )
    self._check(
      "round_masks_after",
      lambda v: v is None or (type(v) is int and 0 <= v < self.max_iterations),
      f"an integer from 0 to below max_iterations={self.max_iterations}, or None",
    )
    for name in ("tv_weight", "mask_weight", "feature_weight", "tolerance"):
      self._check(name, lambda v: _is_finite(v) and v >= 0, "a finite number of at least 0")
    self._check("learning_rate", lambda v: _is_finite(v) and v > 0, "a finite number above 0")
    self._check("plateau_factor", lambda v: _is_finite(v) and 0 < v < 1, "a number in (0, 1)")
    if self.optimizer == "lbfgs" and (self.schedule, self.learning_rate) != ("constant", 1):
      raise InputError(
        f"attack.optimizer=lbfgs with schedule={self.schedule} and"
        f" learning_rate={self.learning_rate}: its line search sets the length of each step."
        " Set attack.schedule=constant and attack.learning_rate=1."
      )

    if self.closed_form != "none" and (self.masks != "free" or self.labels == "free"):
      raise InputError(
        f"attack.closed_form={self.closed_form} with masks={self.masks} and labels={self.labels}:"
        " it recovers both. Set attack.masks=free and attack.labels=recovered or given."
      )
    if self.feature_weight and self.closed_form == "none":
      raise InputError(
        f"attack.feature_weight is {self.feature_weight}, but no features are recovered. Set"
        " attack.closed_form=first, or attack.feature_weight=0."
      )

  @property
  def uses_features(self) -> bool:
    """Whether the objective has the distance from recovered features in it."""
    # Anything but a number (an array, its shape) is there because it is used.
    return not isinstance(self.feature_weight, (int, float)) or self.feature_weight > 0

  @property
  def rounds_masks(self) -> bool:
    """Whether masks are rounded at some iteration."""
    return self.round_masks_after is not None

  def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    """Returns the numbers by name, and all else; for JAX."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    # What is off is left out of the program.
    off = {"feature_weight": not self.uses_features, "round_masks_after": not self.rounds_masks}
    names = [name for name in _NUMBERS if not off.get(name)]
    numbers = [(jax.tree_util.GetAttrKey(name), fields.pop(name)) for name in names]
    return numbers, (tuple(names), tuple(fields.items()))

  @classmethod
  def tree_unflatten(cls, rest: tuple[Any, ...], numbers: list[Any]) -> "AttackSettings":
    """Returns settings with other numbers, which may be traced, unchecked; for JAX."""
    settings = object.__new__(cls)
    names, fields = rest
    settings.__dict__.update(dict(fields) | dict(zip(names, numbers, strict=True)))
    return settings

  def as_arrays(self, dtype: jnp.dtype) -> "AttackSettings":
    """Returns settings whose numbers are arrays.

    Args:
      dtype: of those that are no counts.
    """

    def array(path, number):
      return jnp.asarray(number, jnp.int32 if path[-1].name in _COUNTS else dtype)

    return jax.tree_util.tree_map_with_path(array, self)

  def _check(self, name, is_valid, expected):
    value = getattr(self, name)
    if not is_valid(value):
      raise InputError(f"attack.{name} is {value!r}; expected {expected}.")

  def override(self, **overrides: Any) -> "AttackSettings":
    """Returns settings with some fields replaced.

    Args:
      **overrides: new values by field name.

    Raises:
      InputError: no such field, or a value that it cannot take.
    """
    names = [field.name for field in dataclasses.fields(self)]
    for name in overrides:
      if name not in names:
        raise unknown("setting of an attack", name, names)
    return dataclasses.replace(self, **overrides)


def _is_finite(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
