"""Lanes: the only vmap over trials and the only pmap over devices.

A device runs a fixed number of lanes, each with one trial. All devices run the
same compiled program. What is replaced when a trial ends is the content of its
lane, so nothing is compiled again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.attacks import Attack, Best, State, Status, project
from jaxdia.client import Observation
from jaxdia.typing import Gradient, Key, Labels, Masks


class Lanes(NamedTuple):
  """The trials of all lanes; every array has leading axes [device, lane].

  Attributes:
    gradient: the client's gradient that the trial attacks.
    labels: i[B] if the observations grant them.
    state: of the trial.
  """

  gradient: Gradient
  labels: Labels | None
  state: State


class Gauge(NamedTuple):
  """The few scalars that the host looks at; each [device, lane].

  Attributes:
    status: i, a `Status`.
    iteration: i, steps taken.
    objective: f, the best so far.
  """

  status: np.ndarray
  iteration: np.ndarray
  objective: np.ndarray


class LaneProgram(NamedTuple):
  """Compiled functions on lanes. All that return lanes consume their argument.

  Attributes:
    empty: `empty() -> Lanes`, with no trial in them.
    load: `load(lanes, device, lane, key, observation, masks) -> Lanes`, starts a
      trial in a lane.
    advance: `advance(lanes, steps) -> (Lanes, Gauge)`, at most `steps` steps of
      every running trial; returns early when none runs.
    read: `read(lanes, device, lane) -> Best`, on the host, with valid pixels.
    restore: `restore(lanes, state) -> Lanes`, with the states from the host.
    shape: (devices, lanes a device).
  """

  empty: Callable[[], Lanes]
  load: Callable[[Lanes, int, int, Key, Observation, Masks | None], Lanes]
  advance: Callable[[Lanes, int], tuple[Lanes, Gauge]]
  read: Callable[[Lanes, int, int], Best]
  restore: Callable[[Lanes, State], Lanes]
  shape: tuple[int, int]


def create_program(
  attack: Attack,
  observation: Observation,
  masks: Masks | None,
  lanes_per_device: int,
  devices: Sequence[jax.Device],
) -> LaneProgram:
  """Builds the functions that run an attack in lanes.

  Args:
    attack: what to run.
    observation: one that is like all others; its params and statistics are
      shared by all lanes.
    masks: the client's masks, or any like them, if the attack knows them.
    lanes_per_device: number of trials that a device runs at once.
    devices: local devices to run on.

  Returns:
    The program.
  """
  num_devices = len(devices)
  device_numbers = np.arange(num_devices)
  # The parameters are an argument of the compiled functions, one copy a device.
  replicate = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=devices)
  shared = replicate(device_numbers, dataclasses.replace(observation, gradient=None, labels=None))
  state_shape = jax.eval_shape(attack.init, jax.random.key(0), observation, masks)

  def one_lane(shape):
    return jnp.zeros((lanes_per_device, *shape.shape), shape.dtype)

  def empty_on_device(_):
    lanes = jax.tree.map(
      one_lane, Lanes(*_shapes((observation.gradient, observation.labels)), state_shape)
    )
    # Any status but RUNNING. (An IntEnum as it is would make the array weakly typed.)
    status = jnp.full((lanes_per_device,), int(Status.MAX_ITERATIONS), jnp.int32)
    return lanes._replace(state=lanes.state._replace(status=status))

  def load_on_device(shared, lanes, here, lane, key, gradient, labels, masks):
    observation = dataclasses.replace(shared, gradient=gradient, labels=labels)
    new = Lanes(gradient, labels, attack.init(key, observation, masks))
    return jax.tree.map(
      lambda old, new: old.at[lane].set(jnp.where(here, new, old[lane])), lanes, new
    )

  def step(shared, lane):
    observation = dataclasses.replace(shared, gradient=lane.gradient, labels=lane.labels)
    return lane._replace(state=attack.step(observation, lane.state)[0])

  def advance_on_device(shared, lanes, steps):
    def more(carry):
      i, lanes = carry
      return (i < steps) & jnp.any(lanes.state.status == Status.RUNNING)

    def turn(carry):
      i, lanes = carry
      return i + 1, jax.vmap(step, in_axes=(None, 0))(shared, lanes)

    _, lanes = jax.lax.while_loop(more, turn, (jnp.zeros((), jnp.int32), lanes))
    state = lanes.state
    return lanes, Gauge(state.status, state.iteration, state.best.objective)

  def read_on_device(shared, lanes, lane):
    best = jax.tree.map(lambda x: x[lane], lanes.state.best)
    # The start, drawn N(0, 1), may be the best point; it alone is not yet projected.
    return best._replace(candidate=project(shared, best.candidate))

  def pmap(function, in_axes, donate=()):
    return jax.pmap(function, in_axes=in_axes, donate_argnums=donate, devices=devices)

  p_empty = pmap(empty_on_device, 0)
  p_load = pmap(load_on_device, (0, 0, 0, None, None, None, None, None), donate=(1,))
  p_advance = pmap(advance_on_device, (0, 0, None), donate=(1,))
  p_read = pmap(read_on_device, (0, 0, None))
  p_put = pmap(lambda x: x, 0)

  def load(lanes, device, lane, key, observation, masks):
    here = device_numbers == device
    return p_load(shared, lanes, here, lane, key, observation.gradient, observation.labels, masks)

  def advance(lanes, steps):
    lanes, gauge = p_advance(shared, lanes, np.int32(steps))
    return lanes, jax.device_get(gauge)

  def read(lanes, device, lane):
    return jax.tree.map(lambda x: x[device], jax.device_get(p_read(shared, lanes, lane)))

  return LaneProgram(
    empty=lambda: p_empty(device_numbers),
    load=load,
    advance=advance,
    read=read,
    restore=lambda lanes, state: lanes._replace(state=p_put(state)),
    shape=(num_devices, lanes_per_device),
  )


def _shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
