"""An attack is a pair of pure functions, `init` and `step`, for one trial.

One trial is a loop over `step`; many trials are a `vmap` of it.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdia.attacks.objective import Candidate, Known, Terms, objective
from jaxdia.attacks.optimizers import create_optimizer, create_plateau, create_schedule
from jaxdia.attacks.settings import AttackSettings
from jaxdia.client import Observation
from jaxdia.closed_form import Parts, Verdict, recover_labels
from jaxdia.core.errors import InputError
from jaxdia.core.types import Key, Masks
from jaxdia.models import DropoutModel, sample_masks


class Status(enum.IntEnum):
  """Why a trial ended, if it did."""

  RUNNING = 0
  CONVERGED = 1  # the objective fell below the tolerance
  STALLED = 2  # no improvement for `patience` iterations
  MAX_ITERATIONS = 3
  DIVERGED = 4  # the objective became NaN or infinite
  NO_SEARCH = 5  # a closed form alone


class Best(NamedTuple):
  """The best point so far: the very point whose objective was measured.

  Attributes:
    candidate: the point.
    objective: f[]; infinite before the first step.
    distance: f[], the gradient distance there.
    iteration: i[], the iteration that measured it, from 0.
  """

  candidate: Candidate
  objective: jax.Array
  distance: jax.Array
  iteration: jax.Array


class State(NamedTuple):
  """What a trial carries from step to step.

  Attributes:
    candidate: the point that the next step measures.
    known: what is held fixed.
    settings: those of the attack, or others with which it shares its program; arrays.
    optimizer: state of the optimiser.
    plateau: state of the plateau schedule.
    best: the best point so far.
    iteration: i[], number of steps taken.
    status: i[], a `Status`; a trial that has ended no longer changes.
  """

  candidate: Candidate
  known: Known
  settings: AttackSettings
  optimizer: Any
  plateau: Any
  best: Best
  iteration: jax.Array
  status: jax.Array


class Info(NamedTuple):
  """What a step measured, to be looked at.

  Attributes:
    objective: f[], at the candidate before the step.
    terms: its unweighted terms.
    learning_rate: f[], of the step.
  """

  objective: jax.Array
  terms: Terms
  learning_rate: jax.Array


class Attack(NamedTuple):
  """An attack on one observation.

  Attributes:
    init: `init(key, observation, masks=None, parts=None, variant=None) -> State`. The masks
      are the client's, for the well-informed attacker only; the parts are those of
      `jaxdia.closed_form.recover`, for attacks that start from them; the variant is that of
      another attack that shares the program of this one.
    start: `start(candidate, known, settings=...) -> State`, a trial from a given point; by
      default with the attack's own settings.
    step: `step(observation, state) -> (State, Info)`.
    model: the network that it attacks.
    settings: what it leaves free and how it searches.
  """

  init: Callable[..., State]
  start: Callable[..., State]
  step: Callable[[Observation, State], tuple[State, Info]]
  model: DropoutModel
  settings: AttackSettings

  @property
  def variant(self) -> "Variant":
    """Returns what may differ between attacks that share one compiled program."""
    return _variant(self.model, self.settings)

  def shares_program(self, other: "Attack") -> bool:
    """Returns whether this attack's functions can run another, given its variant."""
    variants = [jax.tree.structure(attack.variant) for attack in (self, other)]
    networks = [attack.model.at_rates or attack.model for attack in (self, other)]
    return variants[0] == variants[1] and networks[0] == networks[1]


class Variant(NamedTuple):
  """What may differ between attacks that share one compiled program.

  Attributes:
    settings: their leaves may.
    rates: {site: rate} of dropout, or None if there are no others.
  """

  settings: AttackSettings
  rates: dict[str, float | jax.Array] | None

  def as_arrays(self, dtype: jnp.dtype) -> "Variant":
    """Returns the variant with arrays for its numbers.

    Args:
      dtype: of those that are no counts.
    """
    rates = jax.tree.map(lambda rate: jnp.asarray(rate, dtype), self.rates)
    return Variant(self.settings.as_arrays(dtype), rates)


def _variant(model, settings) -> Variant:
  # Without dropout, rates have no part in the program.
  adjustable = settings.masks != "expected" and model.at_rates is not None
  return Variant(settings, model.rates if adjustable else None)


def create_attack(model: DropoutModel, settings: AttackSettings) -> Attack:
  """Returns the attack that the settings describe.

  Args:
    model: the network that the client trains.
    settings: what is free and how it is searched.

  Returns:
    Pure functions, to be jitted and vmapped by the caller.
  """
  optimizer = create_optimizer(settings)
  schedule = create_schedule(settings)

  def init(
    key: Key,
    observation: Observation,
    masks: Masks | None = None,
    parts: Parts | None = None,
    variant: Variant | None = None,
  ) -> State:
    """Starts a trial from random images, and random masks if they are searched."""
    _check_start(settings, observation, masks, parts)
    images_key, masks_key, labels_key = jax.random.split(key, 3)
    size, dtype = observation.batch_size, observation.dtype
    numbers, rates = (variant or _variant(model, settings)).as_arrays(dtype)

    def draw(key, *shape):  # the same numbers for every type
      return jax.random.normal(key, (size, *shape), jnp.float32).astype(dtype)

    network = model if rates is None else model.at_rates(rates)
    candidate = Candidate(
      images=draw(images_key, *model.image_shape),
      masks=sample_masks(masks_key, network, size, dtype) if settings.masks == "free" else None,
      labels=draw(labels_key, model.num_classes) if settings.labels == "free" else None,
    )
    known_masks = masks if settings.masks == "known" else None
    if settings.closed_form != "none":
      candidate = Candidate(
        images=jnp.where(_each(parts.verdict > 0), parts.images, candidate.images),
        masks=_where(parts.known_masks, parts.masks, candidate.masks),
        labels=None,
      )
      return start(candidate, Known(known_masks, parts.labels, parts, rates), numbers)
    labels = {"given": observation.labels, "free": None}
    if settings.labels == "recovered":
      labels["recovered"] = recover_labels(model, observation)
    return start(candidate, Known(known_masks, labels[settings.labels], None, rates), numbers)

  def start(candidate: Candidate, known: Known, settings: AttackSettings = settings) -> State:
    """Starts a trial from a given point."""
    dtype = candidate.images.dtype
    infinite = jnp.asarray(jnp.inf, dtype)
    zero = jnp.zeros((), jnp.int32)
    settings = settings.as_arrays(dtype)
    return State(
      candidate=candidate,
      known=known,
      settings=settings,
      optimizer=optimizer.init(candidate),
      plateau=create_plateau(settings).init(candidate.images),
      best=Best(candidate, infinite, infinite, zero),
      iteration=zero,
      status=jnp.asarray(Status.RUNNING, jnp.int32),
    )

  def step(observation: Observation, state: State) -> tuple[State, Info]:
    """Measures the candidate, keeps it if it is the best, and moves on."""
    settings = state.settings

    def measure(candidate):
      return objective(model, settings, observation, candidate, state.known)

    (value, terms), grad = jax.value_and_grad(measure, has_aux=True)(state.candidate)
    value = jnp.where(jnp.isfinite(value), value, jnp.inf)

    here = Best(state.candidate, value, terms.distance, state.iteration)
    better = value < state.best.objective
    if settings.rounds_masks:  # those before had other masks
      better |= state.iteration == settings.round_masks_after
    best = _where(better, here, state.best)

    updates, optimizer_state = optimizer.update(
      grad,
      state.optimizer,
      state.candidate,
      value=value,
      grad=grad,
      value_fn=lambda candidate: measure(candidate)[0],
    )
    # As in PyTorch, the objective of this step tells the learning rate of the next.
    rate = settings.learning_rate * schedule(state.iteration) * state.plateau.scale
    updates = optax.tree.scale(rate, updates)
    candidate = project(observation, optax.apply_updates(state.candidate, updates))
    if state.known.parts is not None:
      candidate = hold(state.known.parts, candidate)
    if settings.rounds_masks:
      # Rounded once, at 0 those that were drawn, and held from then on.
      left = settings.round_masks_after - (state.iteration + 1)
      rounded = jax.tree.map(jnp.round, _where(left < 0, state.candidate.masks, candidate.masks))
      candidate = candidate._replace(masks=_where(left <= 0, rounded, candidate.masks))
    _, plateau_state = create_plateau(settings).update((), state.plateau, value=value)

    iteration = state.iteration + 1
    conditions = [
      (~jnp.isfinite(value), Status.DIVERGED),
      (best.objective < settings.tolerance, Status.CONVERGED),
      (state.iteration - best.iteration >= settings.patience, Status.STALLED),
      (iteration >= settings.max_iterations, Status.MAX_ITERATIONS),
    ]
    status = jnp.select(
      [condition for condition, _ in conditions],
      [jnp.asarray(status, jnp.int32) for _, status in conditions],
      state.status,
    )
    after = State(
      candidate=candidate,
      known=state.known,
      settings=settings,
      optimizer=optimizer_state,
      plateau=plateau_state,
      best=best,
      iteration=iteration,
      status=status,
    )
    info = Info(value, terms, rate)
    return _where(state.status == Status.RUNNING, after, state), info

  return Attack(init, start, step, model, settings)


def project(observation: Observation, candidate: Candidate) -> Candidate:
  """Returns the candidate with valid pixels, and masks in [0, 1].

  Args:
    observation: its statistics give the box of valid pixels.
    candidate: any point.

  Returns:
    The nearest point that is allowed.
  """
  lower = (0 - observation.mean) / observation.std
  upper = (1 - observation.mean) / observation.std
  return Candidate(
    images=jnp.clip(candidate.images, lower, upper),
    masks=jax.tree.map(lambda mask: jnp.clip(mask, 0, 1), candidate.masks),
    labels=candidate.labels,
  )


def hold(parts: Parts, candidate: Candidate) -> Candidate:
  """Returns the candidate with what is known exactly as it is known.

  Args:
    parts: what was recovered in closed form.
    candidate: any point.
  """
  exact = _each(parts.verdict == Verdict.EXACT)
  return candidate._replace(
    images=jnp.where(exact, parts.images, candidate.images),
    masks=_where(parts.known_masks, parts.masks, candidate.masks),
  )


def _each(flags):
  return flags[:, None, None, None]


def _where(condition, tree, other):
  """Chooses between two trees by one condition, or by a tree of them."""
  if not isinstance(condition, dict):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)
  return jax.tree.map(jnp.where, condition, tree, other)


def _check_start(settings, observation, masks, parts):
  if settings.closed_form == "only":
    raise InputError(
      "attack.closed_form=only searches nothing, so there is no trial to start. Call"
      " jaxdia.closed_form.recover, or set attack.closed_form=first."
    )
  if settings.closed_form == "first" and parts is None:
    raise InputError(
      "attack.closed_form=first starts from what was recovered: init(key, observation,"
      " parts=closed_form.recover(key, model, observation).parts)."
    )
  if settings.labels == "given" and observation.labels is None:
    raise InputError(
      "attack.labels=given, but the observation grants no labels. Observe with"
      " reveal_labels=True, or set attack.labels=recovered or attack.labels=free."
    )
  if settings.masks == "known" and masks is None:
    raise InputError(
      "attack.masks=known needs the client's masks: init(key, observation, masks). Only the"
      " well-informed attacker (WIIG) has them."
    )
