"""The search: one optimisation that the attacks of the literature are settings of."""

import jax
import jax.numpy as jnp
import optax

from jaxdia.attacks.objective import objective, prepare_for
from jaxdia.attacks.optimizers import create_optimizer, create_plateau, create_schedule
from jaxdia.attacks.protocol import (
  NOT_TOLD,
  Attack,
  Best,
  Candidate,
  Info,
  Known,
  State,
  Status,
  Told,
  check_attack,
)
from jaxdia.attacks.settings import AttackSettings
from jaxdia.client import Observation, check_fit, draw_masks
from jaxdia.closed_form import Parts, Verdict, recover_labels
from jaxdia.core.errors import InputError, unknown
from jaxdia.core.precision import usual_promotion
from jaxdia.core.random import draw
from jaxdia.core.trees import value_tree
from jaxdia.core.types import Key, check_key
from jaxdia.gradients import Prepared, noise_distance
from jaxdia.models import DropoutModel, averages_after, follows_averages


@value_tree
class Search(Attack):
  """Gradient matching: dummy images, and what else is free, are searched by an optimiser.

  DLG, iDLG, IG, WIIG and DIA are settings of it. As a pytree its leaves are the dropout rates of
  the model and the numbers of the settings.

  Attributes:
    model: the network that the client trains.
    settings: what is free and how it is searched.
  """

  model: DropoutModel
  settings: AttackSettings

  def init(self, key: Key, observation: Observation, told: Told = NOT_TOLD) -> State:
    """Starts a trial from random images, and random masks if they are searched.

    Args:
      key: random key.
      observation: of the client.
      told: the client's masks, for an attack that knows them.

    Raises:
      InputError: it needs labels or masks that it is not told.
    """
    check_start(self, key, observation)
    masks = told.masks if self.masks == "known" else None
    if self.masks == "known" and masks is None:
      raise InputError(
        "attack.masks=known needs the client's masks, which only the well-informed attacker (WIIG)"
        " has: attack.init(key, observation, Told(masks=...)), attacks.solve(..., masks=...) or"
        " engine.Task(..., masks=[...])."
      )
    labels = observation.labels if self.labels == "given" else None
    if self.labels == "given" and labels is None:
      raise InputError(
        "attack.labels=given, but the observation grants no labels. Observe with"
        " reveal_labels=True, or set attack.labels=recovered or attack.labels=free."
      )
    if self.labels == "recovered":
      labels = recover_labels(self.model, observation)
    return self.start(self.draw(key, observation), Known(masks, labels))

  def draw(self, key: Key, observation: Observation) -> Candidate:
    """Draws what is searched: images N(0, image_std²), labels N(0, 1), masks as in training.

    Args:
      key: random key.
      observation: gives batch size and type; for every type the numbers are the same.
    """
    images_key, masks_key, labels_key = jax.random.split(key, 3)
    size, dtype = observation.batch_size, observation.dtype
    drawn = (self.model, observation.local, size, dtype)

    def normal(key, *shape):
      numbers = draw(jax.random.normal, key, (size, *shape), dtype=jnp.float32)
      return numbers.astype(dtype)

    std = jnp.asarray(self.settings.image_std, dtype)
    return Candidate(
      images=std * normal(images_key, *self.model.image_shape),
      masks=draw_masks(masks_key, *drawn) if self.masks == "free" else None,
      labels=normal(labels_key, self.model.num_classes) if self.labels == "free" else None,
    )

  def start(self, candidate: Candidate, known: Known) -> State:
    """Starts a trial from a given point.

    Args:
      candidate: the point.
      known: what is held fixed.
    """
    dtype = candidate.images.dtype
    infinite = jnp.asarray(jnp.inf, dtype)
    zero = jnp.zeros((), jnp.int32)
    return State(
      candidate=candidate,
      known=known,
      optimizer=create_optimizer(self.settings).init(candidate),
      plateau=create_plateau(self.settings, dtype).init(candidate.images),
      best=Best(candidate, infinite, infinite, zero),
      iteration=zero,
      status=jnp.asarray(int(Status.RUNNING), jnp.int32),
    )

  def step(self, observation: Observation | Prepared, state: State) -> tuple[State, Info]:
    """Takes a step of the optimiser; see `Attack.step`."""
    if not isinstance(state, State):
      raise InputError(
        f"the state is of type {type(state).__name__}; expected step(observation, state), with what"
        " init or the last step returned."
      )
    settings = self.settings
    dtype = state.candidate.images.dtype
    if not isinstance(observation, Prepared):
      observation = prepare_for(self.model, settings, observation, compress=False)

    def measure(candidate):
      return objective(self.model, settings, observation, candidate, state.known)

    (value, terms), grad = jax.value_and_grad(measure, has_aux=True)(state.candidate)
    value = jnp.where(jnp.isfinite(value), value, jnp.inf)

    here = Best(state.candidate, value, terms.distance, state.iteration)
    better = value < state.best.objective
    if settings.round_masks_after is not None:  # those before had other masks
      better |= state.iteration == settings.round_masks_after
    best = _where(better, here, state.best)

    with usual_promotion():
      updates, optimizer = create_optimizer(settings).update(
        grad,
        state.optimizer,
        state.candidate,
        value=value,
        grad=grad,
        value_fn=lambda candidate: measure(candidate)[0],
      )
    # As in PyTorch, the objective of this step tells the learning rate of the next.
    with usual_promotion():
      schedule = jnp.asarray(create_schedule(settings)(state.iteration), dtype)
    rate = settings.learning_rate * schedule * state.plateau.scale
    updates = optax.tree.scale(rate, updates)
    candidate = project(observation, optax.apply_updates(state.candidate, updates))
    if state.known.parts is not None:
      candidate = hold(state.known.parts, candidate)
    if settings.round_masks_after is not None:
      # Rounded once, at 0 those that were drawn, and held from then on.
      left = settings.round_masks_after - (state.iteration + 1)
      rounded = jax.tree.map(jnp.round, _where(left < 0, state.candidate.masks, candidate.masks))
      candidate = candidate._replace(masks=_where(left <= 0, rounded, candidate.masks))
    with usual_promotion():
      _, plateau = create_plateau(settings, dtype).update((), state.plateau, value=value)

    tolerance, target = settings.tolerance, observation.target
    if target.noise is not None:
      tolerance += noise_distance(self.distance, target.noise, target.squared_norm)
    iteration = state.iteration + 1
    ends = {
      Status.DIVERGED: ~jnp.isfinite(value),
      Status.CONVERGED: best.objective < tolerance,
      Status.STALLED: state.iteration - best.iteration >= settings.patience,
      Status.MAX_ITERATIONS: iteration >= settings.max_iterations,
    }
    statuses = [jnp.asarray(int(status), jnp.int32) for status in ends]
    status = jnp.select(list(ends.values()), statuses, state.status)
    after = State(candidate, state.known, optimizer, plateau, best, iteration, status)
    return _where(state.status == int(Status.RUNNING), after, state), Info(value, terms, rate)


def check_start(attack: Attack, key: Key, observation: Observation) -> None:
  """Refuses what a trial cannot start from.

  Args:
    attack: any.
    key: random key.
    observation: of the client, whose arrays may be traced.

  Raises:
    InputError: see `check_key`, `check_attack`, `jaxdia.client.check_fit` and `check_averages`.
  """
  check_key(key)
  check_attack(attack, observation)
  check_fit(attack.model, observation)
  check_averages(attack, observation)


def check_averages(attack: Attack, observation: Observation) -> None:
  """Refuses an observation without the running averages that an attack compares.

  Args:
    attack: any.
    observation: of the client.

  Raises:
    InputError: there are none, they are of another network, or it is not known how it makes them.
  """
  weight, network = attack.settings.average_weight, attack.model.network
  if weight is None:
    return
  if observation.local is not None:
    raise InputError(
      f"attack.average_weight is {weight}, but the averages of an update over several local steps"
      " are of all of them. Leave the weight out."
    )
  if not follows_averages(attack.model):
    raise InputError(
      f"attack.average_weight is {weight}, but {network.name} has no running averages that can be"
      " followed; those of Flax Linen can. Leave the weight out."
    )
  if not observation.averages:
    raise InputError(
      f"attack.average_weight is {weight}, but the observation has no running averages. Pass those"
      " before and after the step as averages of the Observation, or leave the weight out."
    )
  images = jnp.zeros((observation.batch_size, *attack.model.image_shape), observation.dtype)
  own = jax.eval_shape(averages_after, attack.model, observation.params, None, images, {})
  for name, pair in observation.averages.items():
    if name not in own:
      raise unknown(f"running averages of {network.name}:", name, own)
    if own[name].shape != pair.after.shape:
      raise InputError(
        f"the averages {name!r} of the observation have shape {pair.after.shape}; expected"
        f" {own[name].shape} as in {network.name}."
      )


def project(observation: Observation | Prepared, candidate: Candidate) -> Candidate:
  """Returns the candidate with valid pixels, and masks in [0, 1].

  Args:
    observation: its statistics give the box of valid pixels.
    candidate: any point.

  Returns:
    The nearest point that is allowed.
  """
  mean, std = (x[None, None, None] for x in (observation.mean, observation.std))
  lower, upper = (0 - mean) / std, (1 - mean) / std
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
  exact = (parts.verdict == int(Verdict.EXACT))[:, None, None, None]
  return candidate._replace(
    images=jnp.where(exact, parts.images, candidate.images),
    masks=jax.tree.map(jnp.where, parts.known_masks, parts.masks, candidate.masks),
  )


def _where(condition, tree, other):
  """Chooses between two trees by one condition."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)
