"""What the benchmarks share: problems to attack, and how their iterations are timed."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia import attacks, data, gradients, models
from jaxdia.client import Observation, observe
from jaxdia.core.machine import matrix_product_rate
from jaxdia.engine.lanes import LaneProgram, Lanes, create_program
from jaxdia.experiment.table import markdown, markdown_row
from jaxdia.models import DropoutModel

# A trial that never ends.
ENDLESS = {"tolerance": 0.0, "patience": 2**31 - 3, "max_iterations": 2**31 - 3}


@dataclasses.dataclass(frozen=True)
class Timing:
  """How long an iteration takes.

  Attributes:
    ms: milliseconds for one iteration of one trial: the least of a few chunks.
    compile_seconds: until the first chunk could run.
  """

  ms: float
  compile_seconds: float


def make_problems(
  name: str,
  dataset: str,
  count: int,
  batch_size: int = 1,
  image_size: int | None = None,
  dropout_rate: float = 0.5,
  **options,
) -> tuple[DropoutModel, list[Observation]]:
  """Returns a network at random weights and the gradients of some clients.

  Args:
    name: of the network.
    dataset: of the samples, whose 20 images are used again and again.
    count: number of clients, each with masks of its own.
    batch_size: images of each.
    image_size: side in pixels to scale to.
    dropout_rate: of the network.
    **options: of the network.
  """
  if dataset == "imagenet":
    image_size = image_size or 224
  victims = data.load(f"samples:{dataset}", 20, image_size=image_size)
  images = data.normalize(victims.images, victims.statistics)
  model = models.create(name, images.shape[1:], victims.num_classes, dropout_rate, **options)
  params = jax.jit(model.init)(jax.random.key(0))
  observations = []
  for i in range(count):
    chosen = np.arange(i * batch_size, (i + 1) * batch_size) % 20
    observation, _ = observe(
      jax.random.key(i),
      model,
      params,
      images[chosen],
      victims.labels[chosen],
      statistics=victims.statistics,
    )
    observations.append(observation)
  return model, observations


def fill_lanes(
  attack: attacks.Attack,
  observations: Sequence[Observation],
  keys: Sequence[jax.Array],
  devices: Sequence[jax.Device],
  method: gradients.Method = "auto",
  recorded: Sequence[int] = (),
) -> tuple[LaneProgram, Lanes]:
  """Returns a program all of whose lanes run, and their state.

  Args:
    attack: what to run.
    observations: the clients, one lane each and over again.
    keys: of the trials, one for each lane; a multiple of the devices.
    devices: that share the lanes.
    method: how gradients are compared.
    recorded: iterations after which images are kept.
  """
  each = len(keys) // len(devices)
  slots = min(each, len(observations))
  seen = [(o, gradients.prepare(attack.model, o, method)) for o in observations[: len(keys)]]
  init = jax.jit(attack.init)
  start = init(keys[0], seen[0][0])
  program = create_program(attack, seen[0][1], start, each, slots, devices, recorded)
  recording = np.zeros((len(recorded), *start.candidate.images.shape), np.float32)
  state = program.empty()
  for device in range(len(devices)):
    state = program.share(state, device, seen[0][1].params)
  for lane in range(each):
    places = {}
    for device in range(len(devices)):
      slot = lane % slots
      observation, prepared = seen[(device * each + slot) % len(seen)]
      trial = init(keys[device * each + lane], observation)
      new = prepared if lane < slots else None
      places[device] = (slot, new, lane, attack, trial, recording)
    state = program.put(state, places)
  return program, state


def lanes_timer(
  model: DropoutModel,
  observations: Sequence[Observation],
  lanes: int,
  devices: Sequence[jax.Device],
  seconds: float,
  method: gradients.Method = "auto",
  recorded: Sequence[int] = (),
  name: str = "dia",
) -> Callable[[], Timing]:
  """Returns a function that times iterations of an attack on full lanes.

  Args:
    model: the network.
    observations: the clients, one lane each and over again.
    lanes: number of trials at once, on all devices together; a multiple of theirs.
    devices: that share the lanes.
    seconds: about how long each timing takes.
    method: how gradients are compared.
    recorded: iterations after which images are kept.
    name: of the attack.
  """
  start = time.perf_counter()
  attack = attacks.create(name, model, **ENDLESS)
  keys = [jax.random.key(lane) for lane in range(lanes)]
  program, state = fill_lanes(attack, observations, keys, devices, method, recorded)
  state, _ = program.advance(state, 1)
  compile_seconds = time.perf_counter() - start

  def measure() -> Timing:
    nonlocal state
    steps, times = 1, []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
      start = time.perf_counter()
      state, gauge = program.advance(state, steps)
      times.append((time.perf_counter() - start) / steps)
      if (gauge.status != attacks.Status.RUNNING).any():
        raise RuntimeError("a trial ended while it was timed")
      steps = max(1, int(seconds / 5 / times[-1]))
    return Timing(1e3 * min(times) / lanes, compile_seconds)

  return measure


def cost(
  model: DropoutModel, observations: Sequence[Observation], lanes: int, method: gradients.Method
) -> tuple[float, float]:
  """Returns what XLA counts in one iteration of DIA on full lanes of one device.

  Args:
    model: the network.
    observations: the clients, one lane each and over again.
    lanes: number of trials at once.
    method: how gradients are compared.

  Returns:
    Floating-point operations a trial, and bytes of memory in all.
  """
  attack = attacks.dia(model)
  prepared = [gradients.prepare(model, o, method) for o in observations[:lanes]]
  chosen = [prepared[i % len(prepared)] for i in range(lanes)]
  targets = jax.tree.map(lambda *x: jnp.stack(x), *(o.target for o in chosen))
  shared = dataclasses.replace(prepared[0], target=None)

  def step(shared, target, state):
    return attack.step(dataclasses.replace(shared, target=target), state)[0]

  state = jax.eval_shape(
    lambda keys: jax.vmap(attack.init, (0, None))(keys, observations[0]),
    jax.random.split(jax.random.key(0), lanes),
  )
  lowered = jax.jit(jax.vmap(step, (None, 0, 0)), donate_argnums=2).lower(shared, targets, state)
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return compiled.cost_analysis()["flops"] / lanes, size - memory.alias_size_in_bytes


class Table:
  """Rows that are printed as Markdown while they come, and written as JSON at the end."""

  def __init__(self, about: dict[str, Any], columns: dict[str, str]):
    """Starts a table.

    Args:
      about: what holds for all rows.
      columns: format of each column by its name; of those left out in a row a
        dash is shown.
    """
    self._about = about
    self._columns = columns
    self.rows: list[dict[str, Any]] = []
    print(
      ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items())
    )
    print("\n" + markdown(list(columns), ()), end="", flush=True)

  def add(self, **row: Any) -> None:
    """Adds a row and prints it."""
    self.rows.append(row)
    cells = [format(row[c], f) if row.get(c) is not None else "-" for c, f in self._columns.items()]
    print(markdown_row(cells), end="", flush=True)

  def write(self, path: str | None) -> None:
    """Writes all rows as JSON, if there is a path."""
    if path:
      pathlib.Path(path).write_text(json.dumps(self._about | {"rows": self.rows}, indent=2) + "\n")


def about_device() -> dict[str, Any]:
  """Returns the name of the devices and the rate of a matrix product there."""
  first = jax.local_devices()[0]
  return {
    "device": f"{jax.local_device_count()} x {first.device_kind} ({first.platform})",
    "jax": jax.__version__,
    "matrix product GFLOP/s": matrix_product_rate() / 1e9,
  }
