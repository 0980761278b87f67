"""Much of something: many devices, many images, in what they may cost."""

import collections
import resource
import weakref

import jax
import numpy as np
import pytest
from conftest import make_victims

from jaxdia import attacks, engine, models
from jaxdia.client import observe
from jaxdia.engine import lanes
from jaxdia.gradients import prepare

DEVICES = jax.local_devices()


def _buffers(tree):
  """Where in memory the parts of arrays lie, by leaf and device."""
  return {
    (jax.tree_util.keystr(path), shard.device): shard.data.unsafe_buffer_pointer()
    for path, leaf in jax.tree.leaves_with_path(tree)
    for shard in leaf.addressable_shards
  }


def test_params_for_eight_devices_are_eight_copies(model):
  """What one device is given goes to no other, nor is copied there."""
  params, (observation,), _ = make_victims(model, 1)
  attack = attacks.dia(model, max_iterations=2)
  state = attack.init(jax.random.key(0), observation)
  prepared = prepare(model, observation, "auto")
  program = lanes.create_program(attack, prepared, state, 1, 1, DEVICES)
  at_first = program.empty()
  others = _buffers((at_first.slots, at_first.lanes))
  now, copies = at_first, 0
  for device in range(len(DEVICES)):
    before = now
    with jax.transfer_guard_device_to_device("disallow"):  # but for those that are asked for
      now = program.share(before, device, params)
    old, new = _buffers(before.params), _buffers(now.params)
    copies += sum(new[place] != old[place] for place in new)
  assert len(DEVICES) == 8 and copies == 8 * len(jax.tree.leaves(params))
  assert _buffers((now.slots, now.lanes)) == others
  for leaf, expected in zip(jax.tree.leaves(now.params), jax.tree.leaves(params), strict=True):
    assert leaf.shape == (8, *expected.shape)
    np.testing.assert_array_equal(leaf, np.broadcast_to(expected, leaf.shape))


class _Clients(collections.abc.Sequence):
  """Clients whose gradients are computed when they are asked for, and how many are alive."""

  def __init__(self, model, count):
    self._model, self._count = model, count
    self._params = model.init(jax.random.key(0))
    self._alive = self.most = 0

  def __len__(self):
    return self._count

  def __getitem__(self, number):
    rng = np.random.default_rng(number)
    images = rng.uniform(size=(1, *self._model.image_shape)).astype(np.float32)
    key = jax.random.fold_in(jax.random.key(1), number)
    labels = np.array([number % self._model.num_classes])
    observation, _ = observe(key, self._model, self._params, images, labels)
    self._alive += 1
    self.most = max(self.most, self._alive)
    weakref.finalize(observation.gradient["hidden_0"]["kernel"], self._forget)
    return observation

  def _forget(self):
    self._alive -= 1


@pytest.mark.slow  # a minute of computing
def test_ten_thousand_images_run_in_bounded_memory():
  count, devices, num_lanes = 10_000, DEVICES[:2], 32
  model = models.create("mlp", (16, 16, 1), 3, 0.25, hidden_sizes=(64,))
  clients = _Clients(model, count)
  attack = attacks.ig(model, max_iterations=1)
  task = engine.Task(jax.random.key(0), attack, clients)
  found, early = 0, None
  for trial in engine.run(task, lanes=num_lanes, devices=devices, chunk=1):
    assert np.isfinite(trial.objective)
    found += 1
    if found == 1_000:
      early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Gradients of those in slots, and of the ones that were asked for last.
  assert found == count and clients.most <= len(devices) * num_lanes + 2
  # All gradients would be 640 MiB.
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early < 100 * 1024
