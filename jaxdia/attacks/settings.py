"""What an attack leaves free and how it searches: the settings that change results."""

import dataclasses
import math
from typing import Any

from jaxdia.errors import InputError, unknown

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackSettings:
  """Settings of an attack; the defaults are those of DIA in the paper.

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
