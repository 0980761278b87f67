"""Small victims that the tests share, on eight virtual CPU devices."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device

# Many tests compile the same programs, those that start the launcher too.
_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if _cache is None:  # the first process of a test run; the others find the variable
  _cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.03"
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)

import numpy as np
import pytest
from jaxtyping import install_import_hook

# What the public functions of these rooms are given and return is checked against its annotation.
_CHECKED = (
  *("attacks", "audit", "client", "closed_form", "core", "data", "engine", "evaluation"),
  *("experiment", "gradients", "models", "report", "updates"),
)
install_import_hook([f"jaxdia.{room}" for room in _CHECKED], "array_types.check_arrays")

from jaxdia import models
from jaxdia.client import observe
from jaxdia.core.machine import forget_programs

IMAGE_SHAPE = (6, 6, 1)


def pytest_configure(config):
  """Compiles quickly, not for speed, unless XLA_FLAGS is set or slow tests run: most of the tests'
  time is that of compiling."""
  if config.option.markexpr == "not slow":
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if jax.__version_info__ < (0, 12):  # which do not know it any more
      flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)


def pytest_collection_finish(session):
  """Looks for garbage seldom: tracing makes much, and looking takes 6 % of the tests' time."""
  del session
  gc.freeze()
  gc.set_threshold(200_000, 50, 100)


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
  yield
  forget_programs(most_maps=15_000)  # they take some GB then


@pytest.fixture(scope="session")
def model():
  """A small MLP with two dropout sites."""
  return models.create("mlp", IMAGE_SHAPE, 5, 0.25, hidden_sizes=(24, 24))


def make_victims(model, count, batch_size=1, seed=0, **options):
  """Returns params, observations and secrets of smooth random images."""
  params = model.init(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  pairs = []
  for i in range(count):
    images = rng.uniform(size=(batch_size, *model.image_shape)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, batch_size)
    pairs.append(observe(jax.random.key(100 + i), model, params, images, labels, **options))
  observations, secrets = zip(*pairs, strict=True)
  return params, list(observations), list(secrets)


@contextlib.contextmanager
def compilations():
  """Collects what is compiled inside."""
  compiled = []

  def listen(name, seconds, **kwargs):
    if name == "/jax/core/compile/backend_compile_duration":
      compiled.append(kwargs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
