"""What an attack is: `init` and `step`, pure functions of one trial, and what it must be told.

One trial is a loop over `step`; many trials are a `vmap` of it. Attacks are trees of numbers,
equal by value: those of one structure run in one compiled program.
"""

import abc
import enum
from typing import Any, NamedTuple

import jax
from jaxtyping import Integer

from jaxdia.attacks.settings import LABELS, MASKS, AttackSettings
from jaxdia.client import Observation, check_observation
from jaxdia.closed_form import Parts, Recovery
from jaxdia.core.errors import InputError, kind_of
from jaxdia.core.trees import shapes_of
from jaxdia.core.types import Array, Images, Key, Labels, Logits, Masks, Scalar
from jaxdia.gradients import Prepared
from jaxdia.models import DropoutModel


class Status(enum.IntEnum):
  """Why a trial ended, if it did."""

  RUNNING = 0
  CONVERGED = 1  # the objective fell below the tolerance
  STALLED = 2  # no improvement for `patience` iterations
  MAX_ITERATIONS = 3
  DIVERGED = 4  # the objective became NaN or infinite
  NO_SEARCH = 5  # it had ended after `init`


class Candidate(NamedTuple):
  """A point of the search. What is not searched is None.

  Attributes:
    images: f[B, H, W, C], normalised.
    masks: {site: f[shape]} in [0, 1].
    labels: f[B, num_classes], the logits of soft labels.
  """

  images: Images
  masks: Masks | None
  labels: Logits | None


class Known(NamedTuple):
  """What the attack holds fixed because it knows it; None where it searches.

  Attributes:
    masks: the client's masks; None also if the expected masks are used.
    labels: i[B].
    parts: what was recovered in closed form.
  """

  masks: Masks | None
  labels: Labels | None
  parts: Parts | None = None


class Told(NamedTuple):
  """What an attack is told besides the observation.

  Attributes:
    masks: the client's, for the well-informed attacker only.
    parts: what was recovered in closed form, for an attack that starts from it.
  """

  masks: Masks | None = None
  parts: Parts | None = None


NOT_TOLD = Told()


class Best(NamedTuple):
  """The best point so far: the very point whose objective was measured.

  Attributes:
    candidate: the point.
    objective: f[]; infinite before the first step.
    distance: f[], the gradient distance there.
    iteration: i[], the iteration that measured it, from 0.
  """

  candidate: Candidate
  objective: Scalar
  distance: Scalar
  iteration: Integer[Array, ""]


class State(NamedTuple):
  """What a trial carries from step to step.

  Attributes:
    candidate: the point that the next step measures.
    known: what is held fixed.
    optimizer: state of the optimiser.
    plateau: state of the plateau schedule.
    best: the best point so far.
    iteration: i[], number of steps taken.
    status: i[], a `Status`; a trial that has ended no longer changes.
  """

  candidate: Candidate
  known: Known
  optimizer: Any
  plateau: Any
  best: Best
  iteration: Integer[Array, ""]
  status: Integer[Array, ""]


class Info(NamedTuple):
  """What a step measured, to be looked at.

  Attributes:
    objective: f[], at the candidate before the step.
    terms: its unweighted terms, a tuple with names; of a search, `jaxdia.attacks.Terms`.
    learning_rate: f[], of the step.
  """

  objective: Scalar
  terms: Any
  learning_rate: Scalar


class Attack(abc.ABC):
  """An attack on one network: a pytree whose leaves are numbers, frozen and equal by value.

  Attributes:
    model: the network that it attacks.
    settings: what it leaves free and how it searches.
  """

  model: DropoutModel
  settings: AttackSettings

  @property
  def masks(self) -> str:
    """Whether masks are "expected", "known" (it must be told the client's) or "free"."""
    return self.settings.masks

  @property
  def labels(self) -> str:
    """Whether labels are "given", "recovered" from the gradient, or "free"."""
    return self.settings.labels

  @property
  def distance(self) -> str:
    """Between gradients, a key of `jaxdia.gradients.DISTANCES`."""
    return self.settings.distance

  @property
  def max_iterations(self) -> int:
    """A trial ends after so many steps; 0 if it has ended after `init`."""
    return self.settings.max_iterations

  @property
  def assumptions(self) -> str:
    """What it takes as given and what it searches, for people to read before it runs."""
    return f"{MASKS[self.masks].assumed}, {LABELS[self.labels].assumed}"

  @property
  def has_verdicts(self) -> bool:
    """Whether its result is what `recover` found, with a verdict on each image, and no more."""
    return False

  def recover(self, key: Key, observation: Observation) -> Recovery | None:
    """Computes on the host what the attack starts from; None if it starts from nothing.

    Args:
      key: random key.
      observation: of the client.
    """
    del key, observation

  @abc.abstractmethod
  def init(self, key: Key, observation: Observation, told: Told = NOT_TOLD) -> State:
    """Starts a trial.

    Args:
      key: random key.
      observation: of the client.
      told: what else the attack needs.

    Raises:
      InputError: it needs something that it is not told.
    """

  @abc.abstractmethod
  def step(self, observation: Observation | Prepared, state: State) -> tuple[State, Info]:
    """Measures the candidate, keeps it if it is the best, and moves on.

    Args:
      observation: of the client; prepared, if there are many steps.
      state: of the trial; one that has ended is returned as it is.
    """


def check_attack(attack: Any, observation: Any) -> None:
  """Refuses what is no attack, or no observation.

  Args:
    attack: that is to be run.
    observation: of one client.

  Raises:
    InputError: it is something else.
  """
  if not isinstance(attack, Attack):
    raise InputError(
      f"the attack is {kind_of(attack)}; expected one that jaxdia.attacks.create(name, model) made."
    )
  check_observation(observation)


def parts_of(recovery: Any) -> Parts | None:
  """Returns the parts of a recovery, which may be given themselves.

  Args:
    recovery: what `Attack.recover` returned, its parts, or None.

  Raises:
    InputError: it is something else.
  """
  parts = getattr(recovery, "parts", recovery)
  if parts is not None and not isinstance(parts, Parts):
    raise InputError(
      f"the recovery is {kind_of(parts)}; expected what attack.recover(key, observation) returns,"
      " or its parts."
    )
  return parts


class Program(NamedTuple):
  """What a compiled program is made for; equal for trials that one program runs.

  Attributes:
    attack: its structure as a tree.
    observation: the structure of what it is shown, and the shapes of its arrays. Gradients are not
      among them, as those of one network may be of several forms, which only values tell.
  """

  attack: Any
  observation: tuple[Any, ...]


def program_of(attack: Attack, observation: Observation) -> Program:
  """Returns what tells programs apart, hashable; numbers alone make no difference.

  Args:
    attack: that is to be run.
    observation: one that it is shown, or its shapes.
  """
  names = ("params", "mean", "std", "labels", "averages", "local")
  arrays = shapes_of([getattr(observation, name) for name in names])
  leaves, structure = jax.tree.flatten(arrays)
  defence = jax.tree.structure(observation.defence)  # its numbers may be Python's
  shown = (observation.batch_size, observation.loss, defence, structure, tuple(leaves))
  return Program(jax.tree.structure(attack), shown)


def same_program(one: Attack, other: Attack) -> bool:
  """Returns whether attacks differ in numbers alone, so that one compiled program runs both.

  They must be shown observations of one form too; see `program_of`.
  """
  return jax.tree.structure(one) == jax.tree.structure(other)
