"""What an attack leaves free and how it searches: the settings that change results."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxdia.core.errors import InputError, check_count, check_number, unknown
from jaxdia.core.trees import static, value_tree


class Words(NamedTuple):
  """A choice for people to read.

  Attributes:
    assumed: what the attack takes as given, or searches, before it runs.
    told: what it was told and what not, in results.
  """

  assumed: str
  told: str


MASKS = {
  "expected": Words(
    "no dropout assumed", "not told the dropout masks: it reckoned as if nothing were dropped"
  ),
  "known": Words(
    "the client's masks are given to it",
    "told the client's dropout masks, which no real server has",
  ),
  "free": Words("masks searched", "not told the dropout masks: it had to find them"),
}
LABELS = {
  "given": Words("labels given", "told the right labels"),
  "recovered": Words(
    "labels read from the gradient", "not told the labels: it read them off the gradient"
  ),
  "free": Words("labels searched", "not told the labels: it searched them"),
}
CHOICES = {
  "masks": tuple(MASKS),
  "labels": tuple(LABELS),
  "distance": ("cosine", "squared_l2"),
  "optimizer": ("signed_adam", "adam", "lbfgs"),
  "schedule": ("plateau", "step", "cosine", "constant"),
  "defence": ("known", "ignored"),
}

# Iterations are counted in 32 bits.
_MAX_COUNT = 2**31 - 3


@value_tree
class AttackSettings:
  """Settings of an attack; the defaults are those of DIA in the paper.

  Static are those that need a program of their own; the others are numbers, the leaves of a tree,
  and may differ between trials of one compiled program. A weight that is None is left out of the
  program; one that is 0 is computed for nothing.

  Attributes:
    masks: "expected" (the network without dropout), "known" (the client's) or
      "free" (searched).
    labels: "given" in the observation, "recovered" from it, or "free": soft
      labels are searched.
    distance: between gradients: "cosine" or "squared_l2"; neither sees a factor of the client's.
    optimizer: "signed_adam" (the sign of the images' derivative, then Adam; plain
      Adam for all else), "adam", or "lbfgs" with a line search.
    schedule: of the learning rate: "plateau" (times `plateau_factor` after
      `plateau_patience` iterations without improvement), "step" (times 0.1 at 3/8,
      5/8 and 7/8 of `max_iterations`, as Geiping et al. 2020), "cosine" (to 0 at
      `max_iterations`) or "constant".
    image_std: standard deviation of the images that a search starts from, which are normalised;
      the mean is 0. Where weights are large, a start near 0 finds images that noise does not.
    learning_rate: at the start, for images, masks and labels.
    tv_weight: of the total variation of the images.
    mask_weight: of the mask prior.
    feature_weight: of the distance from features that the closed form recovered, for attacks
      that start from one; None does without.
    average_weight: of the distance from the running averages that BatchNorm has after the step,
      where the observation has them; None does without.
    max_iterations: the trial ends after so many.
    patience: the trial ends after so many without improvement.
    plateau_patience: of the schedule "plateau".
    plateau_factor: of the schedule "plateau".
    tolerance: the trial ends when the objective falls below.
    defence: "known": the search does to the dummy gradient what the client's defence does to its
      own, and `tolerance` is raised by the distance of its noise; or "ignored".
    round_masks_after: from this iteration on the masks are rounded, and the best point is
      looked for anew; 0 keeps them as they were drawn, None never rounds.
  """

  masks: str = static(default="free")
  labels: str = static(default="given")
  distance: str = static(default="cosine")
  optimizer: str = static(default="signed_adam")
  schedule: str = static(default="plateau")
  image_std: float = 1.0
  learning_rate: float = 0.1
  tv_weight: float = 1e-5
  mask_weight: float = 1e-4
  feature_weight: float | None = None
  average_weight: float | None = None
  max_iterations: int = static(default=20_000)
  patience: int = 4_000
  plateau_patience: int = 800
  plateau_factor: float = static(default=0.1)
  tolerance: float = 1e-5
  defence: str = static(default="known")
  round_masks_after: int | None = None

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise unknown(f"value of attack.{name}:", getattr(self, name), choices)
    for name in ("max_iterations", "patience", "plateau_patience"):
      self._convert(name, check_count, 1, _MAX_COUNT)
    if self.round_masks_after is not None:
      self._convert("round_masks_after", check_count, 0, self.max_iterations - 1)
    left_out = [n for n in ("feature_weight", "average_weight") if getattr(self, n) is None]
    weights = ("tv_weight", "mask_weight", "feature_weight", "average_weight")
    for name in ("image_std", *weights, "tolerance"):
      if name not in left_out:
        self._convert(name, check_number, lambda v: v >= 0, "a finite number of at least 0")
    above_0 = (lambda v: v > 0), "a finite number above 0"
    self._convert("learning_rate", check_number, *above_0)
    self._convert("plateau_factor", check_number, lambda v: 0 < v < 1, "a number in (0, 1)")
    if self.optimizer == "lbfgs" and (self.schedule, self.learning_rate) != ("constant", 1):
      raise InputError(
        f"attack.optimizer=lbfgs with schedule={self.schedule} and"
        f" learning_rate={self.learning_rate}: its line search sets the length of each step."
        " Set attack.schedule=constant and attack.learning_rate=1."
      )

  def _convert(self, name: str, check: Callable[..., float | int], *expected: Any) -> None:
    """Checks a number, and keeps it as Python's own: equal settings shall be equal trees."""
    object.__setattr__(self, name, check(f"attack.{name}", getattr(self, name), *expected))

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


def told(masks: str, labels: str) -> str:
  """Returns what an attack is told of the labels and masks and what not, as part of a sentence.

  Args:
    masks: as in `AttackSettings`.
    labels: likewise.
  """
  return f"{LABELS[labels].told}; {MASKS[masks].told}"
