"""The library inside other JAX code: loops, transformations, meshes, gradients of one's own."""

import gc
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations, make_victims
from flax import linen as nn

import jaxdia
from jaxdia import attacks, engine, evaluation, models
from jaxdia.client import Observation, Secret, client_gradient, observe
from jaxdia.closed_form import recover, recover_labels
from jaxdia.core.errors import InputError
from jaxdia.core.machine import count_memory_maps
from jaxdia.core.types import Statistics

ONE_DEVICE = jax.local_devices()[:1]


class Net(nn.Module):
  """A user's network, with attention whose weights are dropped too."""

  @nn.compact
  def __call__(self, x, train=True):
    x = x.reshape(x.shape[0], 4, -1)
    attend = nn.MultiHeadAttention(2, dropout_rate=0.3, broadcast_dropout=False, qkv_features=8)
    x = nn.Dropout(0.2, broadcast_dims=(1,))(attend(x, deterministic=not train), not train)
    x = nn.gelu(nn.Dense(24)(x.reshape(x.shape[0], -1)))
    return nn.Dense(5)(nn.Dropout(0.4)(inputs=x, deterministic=not train))


def _images(count=2, seed=0):
  return np.random.default_rng(seed).uniform(size=(count, 6, 6, 1)).astype(np.float32)


def test_a_hundred_calls_in_one_process_keep_nothing():
  """Each with a model, attack, client and closed form made anew; compiled they are once."""

  def call(seed):
    model = models.from_flax(Net(), (6, 6, 1))
    params = model.init(jax.random.key(0))
    labels = np.array([seed % 5])
    observation, _ = observe(jax.random.key(seed), model, params, _images(1, seed), labels)
    task = engine.Task(jax.random.key(1), attacks.dia(model, max_iterations=2), [observation])
    assert len(list(engine.run(task, devices=ONE_DEVICE))) == 1
    recover(jax.random.key(0), model, observation)

  for seed in range(2):
    call(seed)
  maps, arrays = count_memory_maps(), len(jax.live_arrays())
  resident = _resident_mib()
  with compilations() as compiled:
    for seed in range(100):
      call(seed)
  assert not compiled
  assert count_memory_maps() <= maps + 20
  assert len(jax.live_arrays()) <= arrays + 20
  assert _resident_mib() <= resident + 20


def _resident_mib():
  """Returns how much memory the process has, without garbage; 0 where the system does not tell."""
  gc.collect()
  status = pathlib.Path("/proc/self/status")
  if not status.exists():
    return 0.0
  (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
  return int(kib) / 2**10


def test_masks_that_flax_drew_itself_are_read():
  """With them the gradient is the one that plain Flax computes."""
  module, images, labels = Net(), _images(), jnp.array([1, 4])
  model = models.from_flax(module, (6, 6, 1))
  params, rngs = model.init(jax.random.key(0)), {"dropout": jax.random.key(7)}

  def loss(params):
    logits = module.apply({"params": params}, images, rngs=rngs)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), labels])

  masks = models.read_masks(model, params, images, rngs)
  assert {site: mask.shape for site, mask in masks.items()} == model.mask_shapes(2)
  assert all(0 < float(jnp.mean(mask)) < 1 for mask in masks.values())
  gradient = client_gradient(model, params, masks, images, labels)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-6), gradient, jax.grad(loss)(params)
  )
  plain = models.from_functions(
    lambda key: jnp.ones(3),
    lambda p, drop, x: drop("site", x[:, 0, :, 0]),
    (6, 6, 1),
    {"site": 0.5},
  )
  with pytest.raises(InputError, match="is no network of a library"):
    models.read_masks(plain, params, images, rngs)


def test_a_gradient_of_ones_own_is_scored_without_masks(model):
  params, images, labels = model.init(jax.random.key(0)), _images(1), np.array([3])
  masks = models.sample_masks(jax.random.key(5), model, 1)
  gradient = client_gradient(model, params, masks, images, jnp.asarray(labels))
  observation = Observation(params, gradient, labels, [0.0], [1.0], 1)
  state = attacks.solve(jax.random.key(0), attacks.dia(model, max_iterations=9), observation)
  secret = Secret(images, labels, None)
  scores = evaluation.evaluate(model, secret, state.best.candidate, Statistics(0.0, 1.0)).scores
  assert scores[0]["mask_accuracy"] is None and np.isfinite(scores[0]["ssim"])


def test_observe_works_under_jit_and_vmap(model):
  params, labels = model.init(jax.random.key(0)), np.array([1, 4])
  keys = jax.random.split(jax.random.key(3), 3)

  def play(key, images, labels):
    return observe(key, model, params, images, labels)

  plain = [play(key, _images(), labels) for key in keys]
  jitted = jax.jit(play)(keys[0], _images(), labels)
  mapped = jax.vmap(play, (0, None, None))(keys, _images(), labels)
  close = lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-7)  # noqa: E731
  jax.tree.map(close, jitted, plain[0])
  jax.tree.map(
    lambda a, *e: close(a, np.stack(e)), mapped[0].gradient, *(o.gradient for o, _ in plain)
  )


def test_sharded_params_and_a_mesh_do_no_harm(model):
  _, (observation,), _ = make_victims(model, 1)
  mesh = jax.make_mesh((2,), ("model",), devices=jax.local_devices()[:2])
  replicated = jax.NamedSharding(mesh, jax.P())
  spread = jax.tree.map(lambda x: jax.device_put(x, replicated), observation)
  split = jax.NamedSharding(mesh, jax.P(None, "model"))
  kernel = jax.device_put(observation.params["hidden_0"]["kernel"], split)
  spread.params["hidden_0"]["kernel"] = kernel
  task = engine.Task(jax.random.key(1), attacks.dia(model, max_iterations=9), [observation])
  (expected,) = engine.run(task, devices=ONE_DEVICE)
  (found,) = engine.run(task._replace(observations=[spread]), devices=ONE_DEVICE)
  np.testing.assert_array_equal(found.candidate.images, expected.candidate.images)
  with jax.set_mesh(mesh), pytest.raises(InputError, match="outside of jax.set_mesh"):
    engine.run(task)


def test_a_guard_against_transfers_does_not_meet_those_of_the_library(model):
  """All is compiled and on the device; what the library hands over of its own is no one else's."""
  params, key = model.init(jax.random.key(0)), jax.random.key(1)
  images, labels = jnp.asarray(_images(1)), jnp.array([3])
  search, closed = attacks.dia(model, max_iterations=2), attacks.closed_form(model)

  def call():
    observation, secret = observe(key, model, params, images, labels)
    state = attacks.solve(key, search, observation)
    recovery = recover(key, model, observation)
    recover_labels(model, observation)
    evaluation.evaluate(model, secret, state.best.candidate, Statistics(0.0, 1.0))
    for task in (
      engine.Task(key, search, [observation], 3),
      engine.Task(key, closed, [observation], 2, parts=[recovery]),
    ):
      engine.plan([task])
      for _ in engine.run(task, lanes=1, devices=ONE_DEVICE):
        yield

  list(call())
  with jax.transfer_guard("disallow"):
    assert [_forbids_transfers() for _ in call()] == [True] * 5  # between trials too
    assert _forbids_transfers()
  assert not _forbids_transfers()
  abandoned = call()
  next(abandoned)
  abandoned.close()
  with pytest.raises(InputError), jax.transfer_guard("disallow"):
    engine.run([])
  assert not _forbids_transfers()


def _forbids_transfers():
  try:
    jnp.arange(3) + np.arange(3)
  except jax.errors.JaxRuntimeError:
    return True
  return False


def test_rooms_are_found_by_their_names():
  code = "import jaxdia; print(jaxdia.attacks.dia.__name__, 'engine' in dir(jaxdia))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["dia", "True"]
  with pytest.raises(AttributeError, match="no attribute 'atacks'"):
    _ = jaxdia.atacks


def test_several_processes_of_one_job_are_refused(model, monkeypatch):
  _, observations, _ = make_victims(model, 1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(InputError, match="one of 2 processes of jax.distributed"):
    engine.run(engine.Task(jax.random.key(0), attacks.ig(model), observations))
