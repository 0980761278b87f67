"""Lanes: the only vmap over trials and the only pmap over devices.

A device runs a fixed number of lanes, each with one trial, and has a fixed number
of slots, each with what the server saw of one client; lanes that attack the same
client share its slot, and all lanes of a device the weights. All devices run the same
compiled program. What is replaced when a trial ends is the content of its lane, so
nothing is compiled again, whatever numbers and rates its attack has.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxdia.attacks import Attack, Best, State, Status, project
from jaxdia.client import LocalUpdate
from jaxdia.client.defences import Defence
from jaxdia.core.trees import shapes_of
from jaxdia.core.types import Array, Labels, Params
from jaxdia.gradients import Prepared, Target
from jaxdia.models import Averages

Recording = Float[np.ndarray, "recorded batch height width channels"]


class Slot(NamedTuple):
  """What of the observations differs between clients; leading axes [device, slot] or [device].

  Attributes:
    target: the client's gradient, prepared.
    labels: i[B] if the observation grants them.
    mean: f[C] or f[1], statistics of the images.
    std: f[C] or f[1].
    averages: of BatchNorm, if the observation has them.
    local: local steps, if the observation has them.
    defence: of the client, its numbers.
  """

  target: Target
  labels: Labels | None
  mean: Float[Array, "*slot channels"]
  std: Float[Array, "*slot channels"]
  averages: dict[str, Averages] | None
  local: LocalUpdate | None
  defence: Defence


class Lane(NamedTuple):
  """A trial; leading axes [device, lane] or [device].

  Attributes:
    slot: i[], where its client is.
    attack: its numbers are those of the trial.
    state: of the trial.
    recording: f[K, B, H, W, C], the best images after the iterations that are recorded.
  """

  slot: Integer[Array, "*lane"]
  attack: Attack
  state: State
  recording: Float[Array, "*lane recorded batch height width channels"]


class Inbox(NamedTuple):
  """What a device is given next, and where it goes; leading axis [device].

  Attributes:
    slot: what the server saw of a client.
    slot_number: i[], where it goes; negative if nowhere.
    lane: a trial.
    lane_number: i[], where it goes; negative if nowhere.
  """

  slot: Slot
  slot_number: Integer[Array, " device"]
  lane: Lane
  lane_number: Integer[Array, " device"]


class Lanes(NamedTuple):
  """All that lies on the devices.

  Attributes:
    params: that all lanes of a device share; leading axis [device].
    slots: the clients.
    lanes: the trials.
    inbox: what came last.
  """

  params: Params
  slots: Slot
  lanes: Lane
  inbox: Inbox


class Gauge(NamedTuple):
  """The few scalars that the host looks at; each [device, lane].

  Attributes:
    status: i, a `Status`.
    iteration: i, steps taken.
    objective: f, the best so far.
  """

  status: Integer[Array, "device lane"]
  iteration: Integer[Array, "device lane"]
  objective: Float[Array, "device lane"]


class LaneProgram(NamedTuple):
  """Compiled functions on lanes. All that return lanes consume their argument.

  What is given to one device goes to no other.

  Attributes:
    empty: `empty() -> Lanes`, with no trial in them.
    share: `share(lanes, device, params) -> Lanes`, gives a device on which no trial runs
      other params.
    put: `put(lanes, {device: (slot number, Prepared or None, lane number, attack, state,
      recording)}) -> Lanes`, starts a trial on each of some devices; an observation of None
      is in its slot already, any other goes to a slot that no running trial needs.
    advance: `advance(lanes, steps) -> (Lanes, Gauge)`, at most `steps` steps of
      every running trial; returns early when none runs.
    read: `read(lanes, device, lane) -> (Best, recording)`, on the host, with valid pixels.
    shape: (devices, lanes a device).
    num_slots: clients that a device has room for.
  """

  empty: Callable[[], Lanes]
  share: Callable[[Lanes, int, Params], Lanes]
  put: Callable[[Lanes, dict[int, tuple]], Lanes]
  advance: Callable[[Lanes, int], tuple[Lanes, Gauge]]
  read: Callable[[Lanes, int, int], tuple[Best, Recording]]
  shape: tuple[int, int]
  num_slots: int


def with_arrays(attack: Attack, dtype: jnp.dtype) -> Attack:
  """Returns an attack whose numbers are arrays, so that they can lie side by side.

  Args:
    attack: any.
    dtype: of its numbers that are no counts.
  """

  def array(number):
    number = np.asarray(number)
    return number.astype(dtype if number.dtype.kind == "f" else np.int32)

  return jax.tree.map(array, attack)


def create_program(
  attack: Attack,
  observation: Prepared,
  state: State,
  lanes_per_device: int,
  num_slots: int,
  devices: Sequence[jax.Device],
  recorded: Sequence[int] = (),
) -> LaneProgram:
  """Returns the functions that run an attack in lanes, the same for equal arguments.

  Args:
    attack: what to run, or another of the same program.
    observation: one that is like all others.
    state: of a trial at its start.
    lanes_per_device: number of trials that a device runs at once.
    num_slots: number of clients that a device has room for; no more than lanes are
      of use, and with one, all lanes share the products with its gradient.
    devices: local devices to run on.
    recorded: numbers of iterations after which the best images are kept, in order.

  Returns:
    The program.
  """
  like = shapes_of((with_arrays(attack, state.candidate.images.dtype), observation, state))
  leaves, structure = jax.tree.flatten(like)
  where = (lanes_per_device, num_slots, tuple(devices), tuple(recorded))
  return _create_program(structure, tuple(leaves), *where)


@functools.lru_cache(maxsize=8)  # with what is compiled for them
def _create_program(structure, leaves, num_lanes, num_slots, devices, recorded) -> LaneProgram:
  attack_like, observation_like, state_like = jax.tree.unflatten(structure, leaves)
  num_devices = len(devices)
  iterations = np.asarray(recorded, np.int32)
  images = state_like.candidate.images
  slot_like = _slot_of(observation_like)
  lane_like = Lane(
    slot=jax.ShapeDtypeStruct((), jnp.int32),
    attack=attack_like,
    state=state_like,
    recording=jax.ShapeDtypeStruct((len(recorded), *images.shape), images.dtype),
  )

  def zeros(like, *count):
    return jax.tree.map(lambda x: jnp.zeros((*count, *x.shape), x.dtype), like)

  def on_devices(function, in_axes, donate=()):
    # With one name, what one function returns lies where another wants it: JAX 0.8 would
    # compile once more.
    return jax.pmap(
      function, axis_name="device", in_axes=in_axes, donate_argnums=donate, devices=devices
    )

  def empty(_):
    lanes = zeros(lane_like, num_lanes)
    # Any status but RUNNING.
    ended = jnp.full((num_lanes,), int(Status.MAX_ITERATIONS), jnp.int32)
    nowhere = jnp.full((), -1, jnp.int32)
    return Lanes(
      params=zeros(observation_like.params),
      slots=zeros(slot_like, num_slots),
      lanes=lanes._replace(state=lanes.state._replace(status=ended)),
      inbox=Inbox(zeros(slot_like), nowhere, zeros(lane_like), nowhere),
    )

  def observation_in(params, slots, number):
    # Of a single slot there is nothing to choose: then no lane has a target of its own.
    one = jax.tree.map(lambda x: x[number if num_slots > 1 else 0], slots)
    facts = {"batch_size": observation_like.batch_size, "loss": observation_like.loss}
    return Prepared(params=params, **facts, **one._asdict())

  def write(tree, number, new):
    here, number = number >= 0, jnp.maximum(number, 0)
    return jax.tree.map(
      lambda old, new: old.at[number].set(jnp.where(here, new, old[number])), tree, new
    )

  def take_in(slots, lanes, inbox):
    slots = write(slots, inbox.slot_number, inbox.slot)
    return slots, write(lanes, inbox.lane_number, inbox.lane)

  def advance(params, slots, lanes, steps):
    def step(attack, number, state):
      return attack.step(observation_in(params, slots, number), state)[0]

    def record(recording, state):
      number = jnp.searchsorted(jnp.asarray(iterations), state.iteration)
      number = jnp.minimum(number, len(recorded) - 1)
      due = jnp.asarray(iterations)[number] == state.iteration
      kept = jnp.where(due, state.best.candidate.images, recording[number])
      return recording.at[number].set(kept)

    def more(carry):
      i, state, _ = carry
      return (i < steps) & jnp.any(state.status == int(Status.RUNNING))

    def turn(carry):
      i, state, recording = carry
      was_running = state.status == int(Status.RUNNING)
      state = jax.vmap(step)(lanes.attack, lanes.slot, state)
      if recorded:
        # A lane whose trial ended at a recorded iteration stays at it, with nothing new to record.
        due = jnp.any(was_running & jnp.isin(state.iteration, iterations))
        recording = jax.lax.cond(due, jax.vmap(record), lambda kept, _: kept, recording, state)
      return i + 1, state, recording

    start = (jnp.zeros((), jnp.int32), lanes.state, lanes.recording)
    _, state, recording = jax.lax.while_loop(more, turn, start)
    gauge = Gauge(state.status, state.iteration, state.best.objective)
    return lanes._replace(state=state, recording=recording), gauge

  def read(slots, lanes, number):
    lane = jax.tree.map(lambda x: x[number], (lanes.slot, lanes.state.best, lanes.recording))
    slot, best, recording = lane
    seen = jax.tree.map(lambda x: x[slot if num_slots > 1 else 0], slots)

    # The start, drawn N(0, 1), may be the best point; it alone is not yet projected.
    def valid(images):
      return project(seen, best.candidate._replace(images=images))

    recording = jax.vmap(lambda images: valid(images).images)(recording)
    return best._replace(candidate=valid(best.candidate.images)), recording

  p_empty = on_devices(empty, 0)
  p_take_in = on_devices(take_in, (0, 0, 0), donate=(0, 1))
  p_advance = on_devices(advance, (0, 0, 0, None), donate=(2,))
  p_read = on_devices(read, (0, 0, None))

  def send(tree, device, new):
    """Returns arrays of all devices, in which one has something else."""

    def replace(array, value):
      if not array.size:  # JAX 0.8 does not cut such arrays
        return array
      shards = _shards(array)
      shards[device] = value
      return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)

    return jax.tree.map(replace, tree, jax.device_put(_with_device_axis(new), devices[device]))

  def put(all_lanes, places):
    inbox = all_lanes.inbox
    slot_numbers = np.full(num_devices, -1, np.int32)
    lane_numbers = np.full(num_devices, -1, np.int32)
    for device, (slot, observation, lane, attack, state, recording) in places.items():
      lane_numbers[device] = lane
      attack = with_arrays(attack, images.dtype)
      trial = Lane(np.int32(slot), attack, state, recording)
      inbox = inbox._replace(lane=send(inbox.lane, device, trial))
      if observation is not None:
        slot_numbers[device] = slot
        inbox = inbox._replace(slot=send(inbox.slot, device, _slot_of(observation)))
    inbox = inbox._replace(slot_number=slot_numbers, lane_number=lane_numbers)
    slots, lanes = p_take_in(all_lanes.slots, all_lanes.lanes, inbox)
    return all_lanes._replace(slots=slots, lanes=lanes, inbox=inbox)

  def advance_all(all_lanes, steps):
    given = (all_lanes.params, all_lanes.slots, all_lanes.lanes)
    lanes, gauge = p_advance(*given, np.int32(steps))
    return all_lanes._replace(lanes=lanes), jax.device_get(gauge)

  def read_one(all_lanes, device, lane):
    read = p_read(all_lanes.slots, all_lanes.lanes, np.int32(lane))
    return jax.tree.map(lambda x: np.asarray(_shards(x)[device])[0], read)

  return LaneProgram(
    empty=lambda: p_empty(np.arange(num_devices)),
    share=lambda all_lanes, device, params: all_lanes._replace(
      params=send(all_lanes.params, device, params)
    ),
    put=put,
    advance=advance_all,
    read=read_one,
    shape=(num_devices, num_lanes),
    num_slots=num_slots,
  )


@jax.jit
def _with_device_axis(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _shards(array: jax.Array) -> list[jax.Array]:
  """Returns the parts of an array that lie on one device each, in the order of the devices."""
  shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return [shard.data for shard in shards]


def _slot_of(observation: Prepared) -> Slot:
  return Slot(*(getattr(observation, name) for name in Slot._fields))
