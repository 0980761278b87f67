"""Runs one trial of an attack to its end."""

import math
import numbers
import time

import jax
import jax.numpy as jnp

from jaxdia.attacks.objective import prepare_for
from jaxdia.attacks.protocol import Attack, State, Status, Told, check_attack, parts_of
from jaxdia.attacks.search import project
from jaxdia.client import Observation
from jaxdia.closed_form import Recovery, check_sign
from jaxdia.core.errors import InputError
from jaxdia.core.transfers import with_transfers
from jaxdia.core.trees import is_traced
from jaxdia.core.types import Key, Masks, check_key
from jaxdia.gradients import Prepared

# Folded into a key for what closed forms draw, so that they share no key with trials.
RECOVERY = 2**31
# About so many seconds pass between two looks at the trial from the host, which can be interrupted
# there.
_CHUNK_SECONDS = 1.0
# No fewer steps are taken at once, so that what the host does between them costs nothing.
_LEAST_CHUNK = 10


@with_transfers
def solve(
  key: Key,
  attack: Attack,
  observation: Observation,
  *,
  masks: Masks | None = None,
  recovery: Recovery | None = None,
  seconds: float = math.inf,
) -> State:
  """Runs one trial of an attack to its end.

  Many trials are run faster by `jaxdia.engine.run`. Calls with attacks and observations that
  differ in numbers alone are compiled once.

  Args:
    key: random key.
    attack: of `jaxdia.attacks.create`.
    observation: of one client.
    masks: the client's, for the well-informed attacker only.
    recovery: what an attack starts from that starts from a closed form; computed if None.
    seconds: after about so many the search is stopped, wherever it is; its status is then
      RUNNING. Compilation is not counted.

  Returns:
    The state in which the trial ended; `best.candidate` is its result, `status` the reason why
    it ended.

  Raises:
    InputError: the attack needs labels or masks that it is not given.
  """
  check_key(key)
  check_attack(attack, observation)
  if is_traced((key, masks)):
    raise InputError(
      "the key or the masks are traced, as inside of jax.jit or jax.vmap; expected values, as a"
      " trial is run from the host. Use attack.init and attack.step there, or engine.run for many"
      " trials."
    )
  if not isinstance(seconds, numbers.Real) or math.isnan(seconds):
    raise InputError(f"seconds is {seconds!r}; expected a number, or math.inf for no limit.")
  check_sign(attack.model, observation)
  if recovery is None:
    recovery = attack.recover(jax.random.fold_in(key, RECOVERY), observation)
  told = Told(masks, parts_of(recovery))
  state = attack.init(key, observation, told)
  if int(state.status) == Status.NO_SEARCH:
    return state
  prepared = prepare_for(attack.model, attack.settings, observation)
  steps, left = 1, seconds  # the first step shows what one takes, after the compilation
  _advance(attack, prepared, state, 0)
  while int(state.status) == Status.RUNNING and left > 0:
    start = time.monotonic()
    state = jax.block_until_ready(_advance(attack, prepared, state, steps))
    passed = time.monotonic() - start
    left -= passed
    steps = max(_LEAST_CHUNK, int(steps * min(_CHUNK_SECONDS, max(left, 0)) / max(passed, 1e-6)))
  # The start, drawn N(0, 1), may be the best point; it alone is not yet projected.
  best = state.best._replace(candidate=project(observation, state.best.candidate))
  return state._replace(best=best)


@jax.jit
def _advance(attack: Attack, observation: Prepared, state: State, steps: int) -> State:
  def more(carry):
    count, state = carry
    return (count < steps) & (state.status == int(Status.RUNNING))

  def turn(carry):
    count, state = carry
    return count + 1, attack.step(observation, state)[0]

  return jax.lax.while_loop(more, turn, (jnp.zeros((), jnp.int32), state))[1]
