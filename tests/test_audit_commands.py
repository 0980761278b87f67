"""One command answers for each library and form of an update: of MNIST digits, in minutes."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from adapter_cases import LIBRARIES
from experiment_cases import ROOT

from jaxdia import data, models
from jaxdia.audit.schema import Audit
from jaxdia.client import observe
from jaxdia.models.entries import arrays_of

SIZES = (784, 512, 512, 10)
NETS = """
import jax
import jax.numpy as jnp

SIZES = (784, 512, 512, 10)


def linen():
  from flax import linen as nn

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = x.reshape(len(x), -1)
      for size in SIZES[1:-1]:
        x = jax.nn.gelu(nn.Dense(size)(x), approximate=False)
        x = nn.Dropout(0.5, deterministic=not train)(x)
      return nn.Dense(SIZES[-1])(x)

  return Net()


def nnx():
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs):
      pairs = list(zip(SIZES[:-1], SIZES[1:]))
      self.hidden = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in pairs[:-1]])
      self.drop = nnx.Dropout(0.5, rngs=rngs)
      self.out = nnx.Linear(*pairs[-1], rngs=rngs)

    def __call__(self, x):
      x = x.reshape(len(x), -1)
      for layer in self.hidden:
        x = self.drop(jax.nn.gelu(layer(x), approximate=False))
      return self.out(x)

  return Net(nnx.Rngs(0))


def equinox():
  import equinox as eqx

  keys, layers = jax.random.split(jax.random.key(0), 3), [eqx.nn.Lambda(jnp.ravel)]
  gelu = eqx.nn.Lambda(lambda x: jax.nn.gelu(x, approximate=False))
  for key, n, m in zip(keys, SIZES[:-1], SIZES[1:]):
    layers += [eqx.nn.Linear(n, m, key=key), gelu, eqx.nn.Dropout(0.5)]
  return eqx.nn.Sequential(layers[:-2])


def torch():
  import torch
  from torch import nn

  torch.manual_seed(0)
  layers = [nn.Flatten()]
  for n, m in zip(SIZES[:-1], SIZES[1:]):
    layers += [nn.Linear(n, m), nn.GELU(), nn.Dropout(0.5)]
  return nn.Sequential(*layers[:-2])
"""


def _loss(logits, labels):
  return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def _own_gradient(library, module, params, images, labels):
  """Computes the gradient of a training step as users of a library do, with its own dropout."""
  if library == "linen":
    rngs = {"dropout": jax.random.key(7)}
    return jax.grad(lambda p: _loss(module.apply({"params": p}, images, rngs=rngs), labels))(params)
  if library == "nnx":
    from flax import nnx

    return nnx.grad(lambda m: _loss(m(images), labels))(module)
  if library == "equinox":
    import equinox as eqx

    keys = jax.random.split(jax.random.key(7), len(images))
    batch = images.transpose(0, 3, 1, 2)

    def loss(m):
      return _loss(jax.vmap(lambda x, key: m(x, key=key))(batch, keys), labels)

    return eqx.filter_grad(loss)(module)
  import torch

  outputs = module(torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))))
  torch.nn.functional.cross_entropy(outputs, torch.from_numpy(np.array(labels)).long()).backward()
  return {name: x.grad for name, x in module.named_parameters()}


def _processor_seconds():
  """Returns those of finished processes: what is waited for at most, whatever else runs."""
  times = os.times()
  return times.children_user + times.children_system


def _write(folder, **trees):
  """Writes params or gradients by the names of their library, from `(network, tree)`."""
  for name, (network, tree) in trees.items():
    arrays = arrays_of(network.entries(), tree)
    np.savez(folder / f"{name}.npz", **{k: np.asarray(v) for k, v in arrays.items()})


def _run(folder, kind, *known):
  """Runs the command on a batch of four MNIST digits, with an empty cache.

  Returns:
    What is said of the update, and the seconds of a processor.
  """
  command = [
    *(sys.executable, ROOT / "launch" / "audit.py", "--config=configs/audit.py", *known),
    *("--config.batch_size=4", "--config.statistics=mnist"),
    *(f"--config.before={folder}/before.npz", f"--config.{kind}={folder}/{kind}.npz"),
    *(f"--config.truth={folder}/truth.npz", f"--workdir={folder / kind}"),
  ]
  paths = f"{folder}:{ROOT}"
  empty = {"PYTHONPATH": paths, "JAX_COMPILATION_CACHE_DIR": str(folder / f"cache_{kind}")}
  start = _processor_seconds()
  done = subprocess.run(
    list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env={**os.environ, **empty}
  )
  seconds = _processor_seconds() - start
  assert done.returncode == 0, done.stderr
  (update,) = msgspec.json.decode((folder / kind / "audit.json").read_bytes(), type=Audit).updates
  return update, seconds


def _victims(folder):
  """Returns images, normalised, and labels of a client, and writes them as the truth."""
  victims = data.load("samples:mnist", 4)
  np.savez(folder / "truth.npz", images=victims.images, labels=victims.labels)
  images = jnp.asarray(data.normalize(victims.images, victims.statistics), jnp.float32)
  return images, jnp.asarray(victims.labels, jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_batch_of_four_digits_is_answered_by_one_command(tmp_path, library, capsys):
  """Prints the seconds of a processor."""
  needed = {"equinox": ("equinox",), "torch": ("torch", "torchax")}.get(library, ())
  if any(importlib.util.find_spec(name) is None for name in needed):
    pytest.skip(f"{library} is not installed")
  (tmp_path / "digits_nets.py").write_text(NETS)
  space: dict = {}
  exec(NETS, space)
  module = space[library]()
  images, labels = _victims(tmp_path)
  model = models.from_module(module, (28, 28, 1))
  before = model.init(jax.random.key(0))
  own = _own_gradient(library, module, before, images, labels)
  gradient = models.from_native(model, own, "gradient")
  after = jax.tree.map(lambda w, g: w - 0.1 * g, before, gradient)
  trees = {"before": before, "gradient": gradient, "after": after}
  _write(tmp_path, **{name: (model.network, tree) for name, tree in trees.items()})
  for kind, known in (("gradient", []), ("after", ["--config.learning_rate=0.1"])):
    update, seconds = _run(tmp_path, kind, f"--config.model.name=digits_nets:{library}", *known)
    worst = max(image.scores["mse"] for image in update.images)
    with capsys.disabled():
      print(
        f"\n{library}, {kind}: {update.count('certain')} of 4, MSE {worst:.1e}, {seconds:.0f} s"
      )
    assert update.count("certain") == 4 and worst < 1e-10 and seconds < 120


@pytest.mark.slow
def test_four_digits_behind_a_lenet_are_answered_by_one_command(tmp_path, capsys):
  """Prints their SSIM, and the seconds of a processor."""
  images, labels = _victims(tmp_path)
  model = models.create("lenet", (28, 28, 1), 10, 0.5)
  before = model.init(jax.random.key(0))
  statistics = data.STATISTICS["mnist"]
  sent, _ = observe(jax.random.key(1), model, before, images, labels, statistics=statistics)
  after = jax.tree.map(lambda w, g: w - 0.1 * g, before, sent.gradient)
  _write(tmp_path, before=(model.network, before), after=(model.network, after))
  known = ["--config.model.name=lenet", "--config.learning_rate=0.1", "--config.seconds=40"]
  update, seconds = _run(tmp_path, "after", *known)
  ssim = sorted(image.scores["ssim"] for image in update.images)
  with capsys.disabled():
    print(f"\n{update.count('likely')} of 4 likely, SSIM {np.round(ssim, 2)}, {seconds:.0f} s")
  assert update.count("likely") == 4 and ssim[0] > 0.8 and seconds < 120
