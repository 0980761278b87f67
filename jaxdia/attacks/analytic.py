"""Attacks by linear algebra: alone, and followed by a search."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia import closed_form
from jaxdia.attacks.objective import Terms
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
)
from jaxdia.attacks.search import Search, check_start
from jaxdia.attacks.settings import AttackSettings
from jaxdia.client import Observation
from jaxdia.closed_form import Parts, Recovery, recover_labels
from jaxdia.core.errors import InputError
from jaxdia.core.trees import value_tree
from jaxdia.core.types import Key
from jaxdia.gradients import Prepared
from jaxdia.models import DropoutModel


def _parts_of(told: Told) -> Parts:
  if told.parts is None:
    raise InputError(
      "this attack starts from what linear algebra recovers, which it was not told:"
      " parts = attack.recover(key, observation).parts, then attack.init(key, observation,"
      " Told(parts=parts)) or engine.Task(..., parts=[parts, ...]); attacks.solve does both."
    )
  return told.parts


@value_tree
class ClosedForm(Attack):
  """What the gradient gives away without a search; a trial has ended after `init`.

  Attributes:
    model: the network that the client trains.
    settings: of which the labels alone have a part in it.
  """

  model: DropoutModel
  settings: AttackSettings

  @property
  def max_iterations(self) -> int:
    """It takes no step."""
    return 0

  @property
  def assumptions(self) -> str:
    """What it takes as given, for people."""
    return "linear algebra alone, nothing searched"

  @property
  def has_verdicts(self) -> bool:
    """Images are there as far as linear algebra gave them."""
    return True

  def recover(self, key: Key, observation: Observation) -> Recovery:
    """Computes the closed forms; see `jaxdia.closed_form.recover`."""
    return closed_form.recover(key, self.model, observation)

  def init(self, key: Key, observation: Observation, told: Told = NOT_TOLD) -> State:
    """Returns a trial that has ended with what was recovered; see `Attack.init`."""
    del key, observation
    parts = _parts_of(told)
    candidate = Candidate(parts.images, parts.masks, None)
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros((), parts.images.dtype)
    status = jnp.asarray(int(Status.NO_SEARCH), jnp.int32)
    known, best = Known(None, parts.labels, parts), Best(candidate, none, none, zero)
    return State(candidate, known, (), (), best, zero, status)

  def step(self, observation: Observation | Prepared, state: State) -> tuple[State, Info]:
    """Changes nothing."""
    del observation
    none = jnp.zeros((), state.candidate.images.dtype)
    return state, Info(none, Terms(*[none] * len(Terms._fields)), none)


@value_tree
class Hybrid(Search):
  """A search that starts from a closed form: what is exact is held, the rest is searched."""

  @property
  def assumptions(self) -> str:
    """What it takes as given and what it searches, for people."""
    return "what linear algebra gives is fixed, the rest searched"

  def recover(self, key: Key, observation: Observation) -> Recovery:
    """Computes the closed forms; see `jaxdia.closed_form.recover`.

    Raises:
      InputError: the search needs labels, and there are none that can be read.
    """
    recovery = closed_form.recover(key, self.model, observation)
    if observation.labels is None and not np.all(recovery.parts.known_labels):
      recover_labels(self.model, observation)  # of some losses they cannot
    return recovery

  def init(self, key: Key, observation: Observation, told: Told = NOT_TOLD) -> State:
    """Starts from what was recovered, and from random values elsewhere; see `Attack.init`."""
    check_start(self, key, observation)
    parts, drawn = _parts_of(told), self.draw(key, observation)
    found = (parts.verdict > 0)[:, None, None, None]
    masks = jax.tree.map(jnp.where, parts.known_masks, parts.masks, drawn.masks)
    candidate = Candidate(jnp.where(found, parts.images, drawn.images), masks, None)
    return self.start(candidate, Known(None, parts.labels, parts))
