"""Files of small networks' updates, as their own libraries compute them, and configs of audits."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import IMAGE_SHAPE, NUM_CLASSES, make_case

from jaxdia import audit, models
from jaxdia.models.entries import arrays_of

SIZE = 4
RATE = 0.1
NETS = """
from adapter_cases import make_case

linen, nnx, equinox, torch = (
  lambda library=library: make_case(library, "mlp").module
  for library in ("linen", "nnx", "equinox", "torch")
)
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
  """Makes the networks importable."""
  (tmp_path / "audited_nets.py").write_text(NETS)
  monkeypatch.syspath_prepend(tmp_path)
  yield
  sys.modules.pop("audited_nets", None)


def batch(size=SIZE):
  """Returns images and labels of a client."""
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(size, *IMAGE_SHAPE)).astype(np.float32)
  return jnp.asarray(images), jnp.asarray(rng.integers(0, NUM_CLASSES, size), jnp.int32)


def write(folder, library, kind="mlp"):
  """Writes what the library itself computes in a training step, by the library's own names."""
  case = make_case(library, kind)
  images, labels = batch()
  gradient = models.from_native(case.model, case.gradient(images, labels)[0], "gradient")
  after = jax.tree.map(lambda w, g: w - RATE * g, case.params, gradient)
  difference = jax.tree.map(jnp.subtract, after, case.params)
  for name, tree in (
    *(("before", case.params), ("gradient", gradient)),
    *(("after", after), ("difference", difference)),
  ):
    arrays = arrays_of(case.model.network.entries(), tree)
    np.savez(folder / f"{name}.npz", **{key: np.asarray(value) for key, value in arrays.items()})
  np.savez(folder / "truth.npz", images=np.asarray(images), labels=np.asarray(labels))


def config_of(folder, library, kind="gradient", **fields):
  """Returns the config of an audit of such files, without a search."""
  config = audit.default_config()
  config.model.name = f"audited_nets:{library}"
  config.image_shape, config.num_classes, config.batch_size = IMAGE_SHAPE, NUM_CLASSES, SIZE
  config.before, config.seconds = str(folder / "before.npz"), 0.0
  config[kind] = str(folder / f"{kind}.npz")
  if kind != "gradient":
    config.learning_rate = RATE
  config.update(fields)
  return config
