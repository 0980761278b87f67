"""Equal small networks of four libraries, each trained as its own users do."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxdia import models

LIBRARIES = ("linen", "nnx", "equinox", "torch")
IMAGE_SHAPE = (8, 8, 1)
NUM_CLASSES = 5
SIZES = (96, 64)


@dataclasses.dataclass(frozen=True)
class Case:
  """A network of a library, and what the library itself computes.

  Attributes:
    make: `make(seed)` gives the module with new weights.
    module: with dropout on.
    model: of the module.
    params: of the module.
    gradient: `gradient(images, labels)` gives the gradient of a training step in the library's own
      form, and what tells `read_masks` of its masks.
    evaluate: `evaluate(images)` gives the logits of the evaluation mode.
    count: number of arrays.
  """

  make: Callable[[int], Any]
  module: Any
  model: models.DropoutModel
  params: Any
  gradient: Callable[..., tuple[Any, Any]]
  evaluate: Callable[..., Any]
  count: int


@functools.cache
def make_case(library, kind):
  """Returns the network "mlp" or "cnn" of a library; skips the test where that is not installed."""
  needed = {"equinox": ("equinox",), "torch": ("torch", "torchax")}.get(library, ())
  if any(importlib.util.find_spec(name) is None for name in needed):
    pytest.skip(f"{library} is not installed")
  return globals()[f"_{library}"](kind)


def _loss(logits, labels):
  return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def gelu(x):
  return jax.nn.gelu(x, approximate=False)


class LinenNet(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x, train=True):
    if self.kind == "cnn":
      x = nn.Dropout(0.25, deterministic=not train)(gelu(nn.Conv(4, (3, 3), 2, padding=1)(x)))
    x = x.reshape(len(x), -1)
    for size in SIZES:
      x = nn.Dropout(0.5, deterministic=not train)(gelu(nn.Dense(size)(x)))
    return nn.Dense(NUM_CLASSES)(x)


def _linen(kind):
  module = LinenNet(kind)
  model = models.from_flax(module, IMAGE_SHAPE)
  params = model.init(jax.random.key(0))

  def gradient(images, labels):
    rngs = {"dropout": jax.random.key(7)}
    loss = lambda p: _loss(module.apply({"params": p}, images, rngs=rngs), labels)  # noqa: E731
    return jax.grad(loss)(params), rngs

  def evaluate(images):
    return module.apply({"params": params}, images, train=False)

  make = lambda seed: LinenNet(kind)  # noqa: E731
  return Case(make, module, model, params, gradient, evaluate, 8 if kind == "cnn" else 6)


class NNXNet(nnx.Module):
  def __init__(self, kind, rngs):
    sizes, with_conv = (64, *SIZES), kind == "cnn"
    self.conv = nnx.Conv(1, 4, (3, 3), strides=2, padding=1, rngs=rngs) if with_conv else None
    self.early = nnx.Dropout(0.25, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.hidden = nnx.List(
      [nnx.Linear(n, m, rngs=rngs) for n, m in zip(sizes[:-1], sizes[1:], strict=True)]
    )
    self.out = nnx.Linear(sizes[-1], NUM_CLASSES, rngs=rngs)

  def __call__(self, x):
    if self.conv is not None:
      x = self.early(gelu(self.conv(x)))
    x = x.reshape(len(x), -1)
    for layer in self.hidden:
      x = self.drop(gelu(layer(x)))
    return self.out(x)


def _nnx(kind):
  make = lambda seed: NNXNet(kind, nnx.Rngs(seed))  # noqa: E731
  module = make(0)
  model = models.from_nnx(module, IMAGE_SHAPE)

  def gradient(images, labels):
    before = nnx.clone(module)
    return nnx.grad(lambda m: _loss(m(images), labels))(nnx.clone(module)), before

  def evaluate(images):
    other = nnx.clone(module)
    other.eval()
    return other(images)

  params = model.init(jax.random.key(0))
  return Case(make, module, model, params, gradient, evaluate, 8 if kind == "cnn" else 6)


def equinox_net(kind, key):
  import equinox as eqx

  keys, sizes = jax.random.split(key, 4), (64, *SIZES, NUM_CLASSES)
  layers = [eqx.nn.Lambda(jnp.ravel)]
  if kind == "cnn":
    conv = eqx.nn.Conv2d(1, 4, 3, 2, 1, key=keys[0])
    layers = [conv, eqx.nn.Lambda(gelu), eqx.nn.Dropout(0.25), *layers]
  for i in range(3):
    layers.append(eqx.nn.Linear(sizes[i], sizes[i + 1], key=keys[i + 1]))
    if i < 2:
      layers += [eqx.nn.Lambda(gelu), eqx.nn.Dropout(0.5)]
  return eqx.nn.Sequential(layers)


def _equinox(kind):
  import equinox as eqx

  make = lambda seed: equinox_net(kind, jax.random.key(seed))  # noqa: E731
  module = make(0)
  model = models.from_equinox(module, IMAGE_SHAPE)

  def gradient(images, labels):
    keys = jax.random.split(jax.random.key(7), len(images))
    images = images.transpose(0, 3, 1, 2)

    def loss(module):
      return _loss(jax.vmap(lambda x, key: module(x, key=key))(images, keys), labels)

    return eqx.filter_grad(loss)(module), keys

  def evaluate(images):
    return jax.vmap(eqx.nn.inference_mode(module))(images.transpose(0, 3, 1, 2))

  params = model.init(jax.random.key(0))
  return Case(make, module, model, params, gradient, evaluate, 8 if kind == "cnn" else 6)


def torch_net(kind):
  from torch import nn

  layers = [nn.Flatten()]
  if kind == "cnn":
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.GELU(), nn.Dropout(0.25), *layers]
  for n, m in ((64, SIZES[0]), SIZES):
    layers += [nn.Linear(n, m), nn.GELU(), nn.Dropout(0.5)]
  return nn.Sequential(*layers, nn.Linear(SIZES[1], NUM_CLASSES))


def to_torch(images):
  import torch

  return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))


def _torch(kind):
  import torch

  def make(seed):
    torch.manual_seed(seed)
    return torch_net(kind)

  module = make(0)
  model = models.from_torch(module, IMAGE_SHAPE)

  def gradient(images, labels):
    torch.manual_seed(7)
    module.zero_grad()
    labels = torch.from_numpy(np.array(labels)).long()
    torch.nn.functional.cross_entropy(module(to_torch(images)), labels).backward()
    return {name: x.grad for name, x in module.named_parameters()}, 7

  def evaluate(images):
    with torch.no_grad():
      logits = module.eval()(to_torch(images)).numpy()
    module.train()
    return logits

  params = model.init(jax.random.key(0))
  return Case(make, module, model, params, gradient, evaluate, 8 if kind == "cnn" else 6)
