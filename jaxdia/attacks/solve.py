"""Runs one trial of an attack to its end."""

import jax
import jax.numpy as jnp

from jaxdia.attacks.protocol import Attack, State, Status, Told
from jaxdia.attacks.search import project
from jaxdia.client import Observation
from jaxdia.closed_form import check_sign
from jaxdia.core.types import Key, Masks
from jaxdia.gradients import Prepared, prepare, suits

# Folded into a key for what closed forms draw, so that they share no key with trials.
RECOVERY = 2**31
# Steps between two looks at the trial from the host, which can be interrupted there.
_CHUNK = 1_000


def solve(
  key: Key, attack: Attack, observation: Observation, *, masks: Masks | None = None
) -> State:
  """Runs one trial of an attack to its end.

  Many trials are run faster by `jaxdia.engine.run`. Calls with attacks and observations that
  differ in numbers alone are compiled once.

  Args:
    key: random key.
    attack: of `jaxdia.attacks.create`.
    observation: of one client.
    masks: the client's, for the well-informed attacker only.

  Returns:
    The state in which the trial ended; `best.candidate` is its result, `status` the reason why
    it ended.

  Raises:
    InputError: the attack needs labels or masks that it is not given.
  """
  check_sign(attack.model, observation)
  recovery = attack.recover(jax.random.fold_in(key, RECOVERY), observation)
  told = Told(masks, None if recovery is None else recovery.parts)
  state = attack.init(key, observation, told)
  prepared = prepare(attack.model, observation, suits(attack.distance, "auto"))
  while int(state.status) == Status.RUNNING:
    state = _advance(attack, prepared, state)
  # The start, drawn N(0, 1), may be the best point; it alone is not yet projected.
  best = state.best._replace(candidate=project(observation, state.best.candidate))
  return state._replace(best=best)


@jax.jit
def _advance(attack: Attack, observation: Prepared, state: State) -> State:
  def more(carry):
    count, state = carry
    return (count < _CHUNK) & (state.status == int(Status.RUNNING))

  def turn(carry):
    count, state = carry
    return count + 1, attack.step(observation, state)[0]

  return jax.lax.while_loop(more, turn, (jnp.zeros((), jnp.int32), state))[1]
