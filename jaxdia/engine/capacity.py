"""How many lanes a device has room for."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxdia.client import Observation, mask_shapes, steps_of
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.machine import memory_of
from jaxdia.engine.jobs import RECORDED
from jaxdia.gradients import choose_layers
from jaxdia.models import DropoutModel

# Of a device's memory, the share that the lanes may take where their number is not set. It is
# all of its memory, not what is free of it, so that the same command takes the same lanes.
_MEMORY_SHARE = 0.35
_MAX_LANES = 256
# On a CPU a lane whose trial has ended costs as much as any other. So few enough lanes that each
# gets some trials one after another, and is idle only at the end. Beyond 32, and below 4, an
# iteration of a trial gets no cheaper, or much dearer. And few enough to stay near the caches,
# without which an iteration of the ViT takes half as long again or twice as long, and one of the
# ResNet a fifth longer
# (python benchmarks/iteration.py --cases=vit:cifar10,resnet18:cifar10 --lanes=2,4,8,16).
_CPU_LANES = (4, 32)
_CPU_TRIALS_A_LANE = 4
_CPU_NEAR_BYTES = 64 * 2**20


def choose_lanes(
  model: DropoutModel, observation: Observation, jobs: int, devices: Sequence[jax.Device]
) -> int:
  """Returns a number of lanes a device that suits the jobs, the model and the devices.

  It depends on nothing else, not on what is free of the memory.

  Args:
    model: the client's network.
    observation: one of those that are attacked.
    jobs: number of trials.
    devices: that share the trials.
  """
  size = _lane_bytes(model, observation)
  on_cpu = devices[0].platform == "cpu"
  memory = memory_of(devices[0]) / (len(devices) if on_cpu else 1)
  each = -(-jobs // len(devices))
  most = _MAX_LANES
  if on_cpu:
    most = min(np.clip(each // _CPU_TRIALS_A_LANE, *_CPU_LANES), _CPU_NEAR_BYTES / size)
  return int(max(1, min(each, most, _MEMORY_SHARE * memory / size)))


def _lane_bytes(model: DropoutModel, observation: Observation) -> int:
  """Returns about how much memory a lane takes."""
  local, size = observation.local, observation.batch_size
  masks = mask_shapes(model, local, size)
  entries = sum(int(np.prod(shape)) for shape in masks.values())
  formed = sum(leaf.size for leaf in jax.tree.leaves(observation.params))
  thin = patches = 0
  draws, each = steps_of(local, size)
  layers = choose_layers(model, size, "auto", local, observation.defence)
  factored = {x.path for x in layers}
  as_products = model.as_products()
  for layer in model.products(each):
    if layer.path in factored:
      formed -= layer.inputs * layer.outputs
      thin += draws * sum(layer.rows) * (layer.inputs + layer.outputs)
    elif layer.path in as_products:
      patches += sum(layer.rows) * layer.inputs
  # Of what is formed, the target and about four arrays for the dummy gradient and its derivative;
  # of what is thin, the factors and about as many for what passes the layer; of the masks about
  # eight for the search; of the patches of a convolution those of its inputs and of a derivative;
  # and the recorded images. The weights and the thin factors are kept before each local step.
  pixels = RECORDED * observation.batch_size * int(np.prod(model.image_shape))
  formed, thin = (4 + draws) * formed, (4 + draws) * thin
  return observation.dtype.itemsize * (formed + thin + 8 * entries + 2 * patches + pixels)


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
