"""An MLP and a LeNet for MNIST digits in each of four libraries, as their users write them."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

DROPOUT_RATE = 0.5
# Channels before and after each convolution, of 5x5 pixels, and its stride.
CONVOLUTIONS = {"mlp": (), "lenet": ((1, 12, 2), (12, 12, 2), (12, 12, 1))}
SIZES = {"mlp": (784, 512, 512, 10), "lenet": (7 * 7 * 12, 256, 10)}  # of the dense layers
# Of the kernels of Linen and NNX, times 1 / inputs. PyTorch and Equinox draw theirs so; Flax has 1,
# with which a search behind convolutions finds less (docs/audit.md).
VARIANCE = 1 / 3
KERNEL_INIT = nn.initializers.variance_scaling(VARIANCE, "fan_in", "truncated_normal")


def _gelu(x):
  return jax.nn.gelu(x, approximate=False)


class _Linen(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x, train=True):
    drop = nn.Dropout(DROPOUT_RATE, deterministic=not train)
    for _, channels, stride in CONVOLUTIONS[self.kind]:
      x = nn.Conv(channels, (5, 5), stride, padding=2, kernel_init=KERNEL_INIT)(x)
      x = drop(_gelu(x))
    x = x.reshape(len(x), -1)
    *hidden, classes = SIZES[self.kind][1:]
    for size in hidden:
      x = drop(_gelu(nn.Dense(size, kernel_init=KERNEL_INIT)(x)))
    return nn.Dense(classes, kernel_init=KERNEL_INIT)(x)


def linen_net(kind="mlp"):
  return _Linen(kind)


class _NNX(nnx.Module):
  def __init__(self, kind, rngs):
    drawn = {"kernel_init": KERNEL_INIT, "rngs": rngs}
    convs = [
      nnx.Conv(n, m, (5, 5), strides=stride, padding=2, **drawn)
      for n, m, stride in CONVOLUTIONS[kind]
    ]
    sizes = SIZES[kind]
    dense = [nnx.Linear(n, m, **drawn) for n, m in zip(sizes[:-1], sizes[1:], strict=True)]
    self.convs, self.hidden, self.out = nnx.List(convs), nnx.List(dense[:-1]), dense[-1]
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
  layers, sizes = [], SIZES[kind]
  for n, m, stride in CONVOLUTIONS[kind]:
    layers += [eqx.nn.Conv2d(n, m, 5, stride, 2, key=next(keys)), gelu, drop]
  layers.append(eqx.nn.Lambda(jnp.ravel))
  for n, m in zip(sizes[:-1], sizes[1:], strict=True):
    layers += [eqx.nn.Linear(n, m, key=next(keys)), gelu, drop]
  return eqx.nn.Sequential(layers[:-2])


def torch_net(kind="mlp"):
  import torch
  from torch import nn as tnn

  torch.manual_seed(0)
  layers, sizes = [], SIZES[kind]
  for n, m, stride in CONVOLUTIONS[kind]:
    layers += [tnn.Conv2d(n, m, 5, stride, 2), tnn.GELU(), tnn.Dropout(DROPOUT_RATE)]
  layers.append(tnn.Flatten())
  for n, m in zip(sizes[:-1], sizes[1:], strict=True):
    layers += [tnn.Linear(n, m), tnn.GELU(), tnn.Dropout(DROPOUT_RATE)]
  return tnn.Sequential(*layers[:-2])
