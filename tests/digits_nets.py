"""An MLP and a LeNet for MNIST digits in each of four libraries, as their users write them."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

DROPOUT_RATE = 0.5
STRIDES, CHANNELS, HIDDEN = (2, 2, 1), 12, 256  # of the LeNet, which leaves 7x7 pixels
# Of the kernels of Linen and NNX, times 1 / inputs. PyTorch and Equinox draw theirs so; Flax has 1,
# with which a search behind convolutions needs other settings (docs/closed_forms.md).
VARIANCE = 1 / 3
MLP, LENET = (784, 512, 512, 10), (7 * 7 * CHANNELS, HIDDEN, 10)  # sizes of the dense layers


def _kernel(variance):
  return nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")


def _gelu(x):
  return jax.nn.gelu(x, approximate=False)


class _Linen(nn.Module):
  kind: str
  variance: float

  @nn.compact
  def __call__(self, x, train=True):
    kernel = _kernel(self.variance)
    drop = nn.Dropout(DROPOUT_RATE, deterministic=not train)
    if self.kind == "lenet":
      for stride in STRIDES:
        x = drop(_gelu(nn.Conv(CHANNELS, (5, 5), stride, padding=2, kernel_init=kernel)(x)))
    x = x.reshape(len(x), -1)
    sizes = LENET if self.kind == "lenet" else MLP
    for size in sizes[1:-1]:
      x = drop(_gelu(nn.Dense(size, kernel_init=kernel)(x)))
    return nn.Dense(sizes[-1], kernel_init=kernel)(x)


def linen_net(kind="mlp", variance=VARIANCE):
  return _Linen(kind, variance)


class _NNX(nnx.Module):
  def __init__(self, kind, rngs):
    drawn = {"kernel_init": _kernel(VARIANCE), "rngs": rngs}
    channels = (1, CHANNELS, CHANNELS) if kind == "lenet" else ()
    sizes = LENET if kind == "lenet" else MLP
    self.convs = nnx.List(
      [
        nnx.Conv(n, CHANNELS, (5, 5), strides=stride, padding=2, **drawn)
        for n, stride in zip(channels, STRIDES, strict=False)
      ]
    )
    self.hidden = nnx.List(
      [nnx.Linear(n, m, **drawn) for n, m in zip(sizes[:-2], sizes[1:-1], strict=True)]
    )
    self.out = nnx.Linear(*sizes[-2:], **drawn)
    self.drop = nnx.Dropout(DROPOUT_RATE, rngs=rngs)

  def __call__(self, x):
    for layer in self.convs:
      x = self.drop(_gelu(layer(x)))
    x = x.reshape(len(x), -1)
    for layer in self.hidden:
      x = self.drop(_gelu(layer(x)))
    return self.out(x)


def nnx_net(kind="mlp"):
  return _NNX(kind, nnx.Rngs(0))


def equinox_net(kind="mlp"):
  import equinox as eqx

  keys = iter(jax.random.split(jax.random.key(0), 8))
  gelu, drop = eqx.nn.Lambda(_gelu), eqx.nn.Dropout(DROPOUT_RATE)
  layers, sizes = [], MLP
  if kind == "lenet":
    sizes = LENET
    for channels, stride in zip((1, CHANNELS, CHANNELS), STRIDES, strict=True):
      layers += [eqx.nn.Conv2d(channels, CHANNELS, 5, stride, 2, key=next(keys)), gelu, drop]
  layers.append(eqx.nn.Lambda(jnp.ravel))
  for n, m in zip(sizes[:-1], sizes[1:], strict=True):
    layers += [eqx.nn.Linear(n, m, key=next(keys)), gelu, drop]
  return eqx.nn.Sequential(layers[:-2])


def torch_net(kind="mlp"):
  import torch
  from torch import nn as tnn

  torch.manual_seed(0)
  layers, sizes = [], MLP
  if kind == "lenet":
    sizes = LENET
    for channels, stride in zip((1, CHANNELS, CHANNELS), STRIDES, strict=True):
      conv = tnn.Conv2d(channels, CHANNELS, 5, stride, 2)
      layers += [conv, tnn.GELU(), tnn.Dropout(DROPOUT_RATE)]
  layers.append(tnn.Flatten())
  for n, m in zip(sizes[:-1], sizes[1:], strict=True):
    layers += [tnn.Linear(n, m), tnn.GELU(), tnn.Dropout(DROPOUT_RATE)]
  return tnn.Sequential(*layers[:-2])
