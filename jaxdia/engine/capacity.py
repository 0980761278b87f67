"""How many lanes a device has room for."""

import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxdia.client import Observation
from jaxdia.core.errors import InputError, first_line
from jaxdia.matching import choose_layers
from jaxdia.models import DropoutModel

# Of a device's free memory, the share that the lanes may take where their number is not set, and
# what is taken to be free where nobody tells.
_MEMORY_SHARE = 0.5
_UNKNOWN_MEMORY = 4 * 2**30
_MAX_LANES = 256
# Images of a trial that are recorded, at most.
RECORDED = 36
# On a CPU a lane whose trial has ended costs as much as any other. So few enough lanes that each
# gets some trials one after another, and is idle only at the end. Beyond 32, and below 4, an
# iteration of a trial gets no cheaper, or much dearer. And few enough to stay near the caches,
# without which an iteration of the ViT or the ResNet takes half as long again or twice as long
# (python benchmarks/iteration.py --cases=vit:cifar10,resnet18:cifar10 --lanes=2,4,8,16).
_CPU_LANES = (4, 32)
_CPU_TRIALS_A_LANE = 4
_CPU_NEAR_BYTES = 64 * 2**20


def choose_lanes(
  model: DropoutModel, observation: Observation, jobs: int, devices: Sequence[jax.Device]
) -> int:
  """Returns a number of lanes a device that suits the jobs, the model and the memory.

  Args:
    model: the client's network.
    observation: one of those that are attacked.
    jobs: number of trials.
    devices: that share the trials.
  """
  size = _lane_bytes(model, observation)
  fitting = _MEMORY_SHARE * _free_memory(devices) / size
  each = -(-jobs // len(devices))
  most = _MAX_LANES
  if devices[0].platform == "cpu":
    most = min(np.clip(each // _CPU_TRIALS_A_LANE, *_CPU_LANES), _CPU_NEAR_BYTES / size)
  return int(max(1, min(each, most, fitting)))


def matrix_product_rate(size: int = 2048) -> float:
  """Returns the operations a second of a float32 matrix product on the first device.

  Args:
    size: of the square matrices.
  """
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
  product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
  product(a).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    product(a).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)


def forget_programs(most_maps: int = 30_000) -> None:
  """Drops what was compiled if it may soon be too much for Linux, which ends the process then.

  On a CPU each program takes memory maps of its own, a network with its closed forms some
  thousands, and a process may have 65,530.

  Args:
    most_maps: of so many none are dropped.
  """
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > most_maps:
    jax.clear_caches()


def total_memory() -> float:
  """Returns the bytes of the memory that gradients lie in: that of a device, or of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return min(stats.get("bytes_limit", np.inf), psutil.virtual_memory().total)


def _lane_bytes(model: DropoutModel, observation: Observation) -> int:
  """Returns about how much memory a lane takes."""
  masks = model.mask_shapes(observation.batch_size)
  entries = sum(int(np.prod(shape)) for shape in masks.values())
  formed = sum(leaf.size for leaf in jax.tree.leaves(observation.params))
  thin = 0
  for layer in choose_layers(model, observation.batch_size, "auto"):
    formed -= layer.inputs * layer.outputs
    thin += sum(layer.rows) * (layer.inputs + layer.outputs)
  # Of what is formed, the target and about four arrays for the dummy gradient and its derivative;
  # of what is thin, the factors and about as many for what passes the layer; of the masks about
  # eight for the search; and the recorded images.
  pixels = RECORDED * observation.batch_size * int(np.prod(model.image_shape))
  return observation.dtype.itemsize * (5 * formed + 5 * thin + 8 * entries + pixels)


def _free_memory(devices: Sequence[jax.Device]) -> float:
  """Returns the bytes that each device has left."""
  stats = devices[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  if devices[0].platform == "cpu":  # all of them share the memory of the machine
    return psutil.virtual_memory().available / len(devices)
  return _UNKNOWN_MEMORY


def halve_lanes(lanes: int, error: jax.errors.JaxRuntimeError) -> int:
  """Returns half as many lanes if an error says that these did not fit into the memory.

  Args:
    lanes: on each device, when it was raised.
    error: that was raised; raised again if it says something else.

  Raises:
    InputError: there was but one lane.
  """
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  if lanes == 1:
    raise InputError(
      f"not even one trial fits into the memory of a device ({first_line(error)}). Attack smaller"
      " batches or images, or a smaller network."
    ) from error
  return lanes // 2
