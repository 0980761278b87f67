"""Lanes: the only vmap over trials and the only pmap over devices.

A device runs a fixed number of lanes, each with one trial, and has a fixed number
of slots, each with what the server saw of one victim; lanes that attack the same
victim share its slot, and all lanes of a device the weights. All devices run the same
compiled program. What is replaced when a trial ends is the content of its lane, so
nothing is compiled again, whatever numbers and rates its attack has.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.attacks import Attack, Best, State, Status, Variant, project
from jaxdia.client import Observation
from jaxdia.closed_form import Parts
from jaxdia.core.types import Gradient, Key, Labels, Masks, Params


class Slots(NamedTuple):
  """What of the observations differs between victims; leading axes [device, slot].

  Attributes:
    gradient: of the client, as `jaxdia.matching.prepare` made it.
    labels: i[B] if the observation grants them.
    mean: f[C] or f[1], statistics of the images.
    std: f[C] or f[1].
  """

  gradient: Gradient
  labels: Labels | None
  mean: jax.Array
  std: jax.Array


class Lanes(NamedTuple):
  """The trials of all lanes, and their victims.

  Attributes:
    params: that all lanes of a device share; leading axis [device].
    slots: the victims.
    slot: i[device, lane], where the victim of the lane's trial is.
    state: of the trials; every array has leading axes [device, lane].
    recording: f[device, lane, K, B, H, W, C], the best images after the iterations that are
      recorded.
  """

  params: Params
  slots: Slots
  slot: jax.Array
  state: State
  recording: jax.Array


class Given(NamedTuple):
  """What an attack is given of a victim besides the observation; see `Attack.init`.

  Attributes:
    masks: the client's, for an attack that knows them.
    parts: recovered in closed form, for an attack that starts from them.
    variant: of the attack on this victim, if it is not the one that made the program.
  """

  masks: Masks | None = None
  parts: Parts | None = None
  variant: Variant | None = None


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
    share: `share(lanes, device, params) -> Lanes`, gives a device on which no trial runs
      other params.
    place: `place(lanes, device, slot, observation) -> Lanes`, puts a victim in a
      slot that no running trial needs.
    load: `load(lanes, device, lane, slot, key, given) -> Lanes`, starts a trial in
      a lane, on the victim in a slot.
    advance: `advance(lanes, steps) -> (Lanes, Gauge)`, at most `steps` steps of
      every running trial; returns early when none runs.
    read: `read(lanes, device, lane) -> (Best, recording)`, on the host, with valid pixels.
    restore: `restore(lanes, state, recording) -> Lanes`, with those from the host.
    shape: (devices, lanes a device).
    num_slots: victims that a device has room for.
  """

  empty: Callable[[], Lanes]
  share: Callable[[Lanes, int, Params], Lanes]
  place: Callable[[Lanes, int, int, Observation], Lanes]
  load: Callable[[Lanes, int, int, int, Key, Given], Lanes]
  advance: Callable[[Lanes, int], tuple[Lanes, Gauge]]
  read: Callable[[Lanes, int, int], tuple[Best, np.ndarray]]
  restore: Callable[[Lanes, State, jax.Array], Lanes]
  shape: tuple[int, int]
  num_slots: int


def create_program(
  attack: Attack,
  observation: Observation,
  given: Given,
  lanes_per_device: int,
  num_slots: int,
  devices: Sequence[jax.Device],
  recorded: Sequence[int] = (),
) -> LaneProgram:
  """Builds the functions that run an attack in lanes.

  Args:
    attack: what to run, itself or in other variants.
    observation: one that is like all others.
    given: what the attack is given of a victim besides, or any like it.
    lanes_per_device: number of trials that a device runs at once.
    num_slots: number of victims that a device has room for; no more than lanes are
      of use, and with one, all lanes share the products with its gradient.
    devices: local devices to run on.
    recorded: numbers of iterations after which the best images are kept, in order.

  Returns:
    The program.
  """
  num_devices = len(devices)
  device_numbers = np.arange(num_devices)
  iterations = jnp.asarray(recorded, jnp.int32)
  state_shape = jax.eval_shape(attack.init, jax.random.key(0), observation, *given)

  slot_shape, params_shape = _shapes((_slot(observation), observation.params))

  def zeros(count, shapes):
    return jax.tree.map(lambda x: jnp.zeros((*count, *x.shape), x.dtype), shapes)

  def empty_on_device(_):
    state = zeros((lanes_per_device,), state_shape)
    # Any status but RUNNING. (An IntEnum as it is would make the array weakly typed.)
    status = jnp.full((lanes_per_device,), int(Status.MAX_ITERATIONS), jnp.int32)
    slot = jnp.zeros((lanes_per_device,), jnp.int32)
    images = state_shape.candidate.images
    recording = jnp.zeros((lanes_per_device, len(recorded), *images.shape), images.dtype)
    return Lanes(
      params=zeros((), params_shape),
      slots=zeros((num_slots,), slot_shape),
      slot=slot,
      state=state._replace(status=status),
      recording=recording,
    )

  def observation_in(lanes, slot):
    # Of a single slot there is nothing to choose: then no lane has a target of its own.
    one = jax.tree.map(lambda x: x[slot if num_slots > 1 else 0], lanes.slots)
    return Observation(params=lanes.params, batch_size=observation.batch_size, **one._asdict())

  def write(tree, index, new, here):
    return jax.tree.map(
      lambda old, new: old.at[index].set(jnp.where(here, new, old[index])), tree, new
    )

  def share_on_device(lanes, here, new):
    params = jax.tree.map(lambda old, new: jnp.where(here, new, old), lanes.params, new)
    return lanes._replace(params=params)

  def place_on_device(lanes, here, slot, new):
    return lanes._replace(slots=write(lanes.slots, slot, new, here))

  def load_on_device(lanes, here, lane, slot, key, given):
    new = attack.init(key, observation_in(lanes, slot), *given)
    return lanes._replace(
      slot=write(lanes.slot, lane, slot, here), state=write(lanes.state, lane, new, here)
    )

  def advance_on_device(lanes, steps):
    def step(slot, state):
      return attack.step(observation_in(lanes, slot), state)[0]

    def record(recording, state):
      number = jnp.minimum(
        jnp.searchsorted(jnp.asarray(iterations), state.iteration), len(recorded) - 1
      )
      due = jnp.asarray(iterations)[number] == state.iteration
      kept = jnp.where(due, state.best.candidate.images, recording[number])
      return recording.at[number].set(kept)

    def more(carry):
      i, state, _ = carry
      return (i < steps) & jnp.any(state.status == Status.RUNNING)

    def turn(carry):
      i, state, recording = carry
      state = jax.vmap(step)(lanes.slot, state)
      if recorded:
        due = jnp.any(jnp.isin(state.iteration, iterations))
        recording = jax.lax.cond(due, jax.vmap(record), lambda kept, _: kept, recording, state)
      return i + 1, state, recording

    start = (jnp.zeros((), jnp.int32), lanes.state, lanes.recording)
    _, state, recording = jax.lax.while_loop(more, turn, start)
    gauge = Gauge(state.status, state.iteration, state.best.objective)
    return lanes._replace(state=state, recording=recording), gauge

  def read_on_device(lanes, lane):
    best = jax.tree.map(lambda x: x[lane], lanes.state.best)
    seen = observation_in(lanes, lanes.slot[lane])

    # The start, drawn N(0, 1), may be the best point; it alone is not yet projected.
    def valid(images):
      return project(seen, best.candidate._replace(images=images))

    recording = jax.vmap(lambda images: valid(images).images)(lanes.recording[lane])
    return best._replace(candidate=valid(best.candidate.images)), recording

  def pmap(function, in_axes, donate=()):
    return jax.pmap(function, in_axes=in_axes, donate_argnums=donate, devices=devices)

  p_empty = pmap(empty_on_device, 0)
  p_share = pmap(share_on_device, (0, 0, None), donate=(0,))
  p_place = pmap(place_on_device, (0, 0, None, None), donate=(0,))
  p_load = pmap(load_on_device, (0, 0, None, None, None, None), donate=(0,))
  p_advance = pmap(advance_on_device, (0, None), donate=(0,))
  p_read = pmap(read_on_device, (0, None))
  p_put = pmap(lambda x: x, 0)

  def share(lanes, device, params):
    return p_share(lanes, device_numbers == device, params)

  def place(lanes, device, slot, observation):
    return p_place(lanes, device_numbers == device, np.int32(slot), _slot(observation))

  def load(lanes, device, lane, slot, key, given):
    here = device_numbers == device
    return p_load(lanes, here, np.int32(lane), np.int32(slot), key, given)

  def advance(lanes, steps):
    lanes, gauge = p_advance(lanes, np.int32(steps))
    return lanes, jax.device_get(gauge)

  def read(lanes, device, lane):
    return jax.tree.map(lambda x: x[device], jax.device_get(p_read(lanes, lane)))

  return LaneProgram(
    empty=lambda: p_empty(device_numbers),
    share=share,
    place=place,
    load=load,
    advance=advance,
    read=read,
    restore=lambda lanes, state, recording: lanes._replace(
      state=p_put(state), recording=p_put(recording)
    ),
    shape=(num_devices, lanes_per_device),
    num_slots=num_slots,
  )


def _slot(observation: Observation) -> Slots:
  return Slots(*(getattr(observation, name) for name in Slots._fields))


def _shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
