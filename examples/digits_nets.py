"""One network with dropout, in Flax and in PyTorch."""

import collections
import math

import jax
from flax import linen as nn

IMAGE_SHAPE, NUM_CLASSES, HIDDEN, DROPOUT = (8, 8, 1), 10, (256, 256), 0.5


class Net(nn.Module):
  """Dense layers with GELU and dropout."""

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, 10] logits of f[B, 8, 8, 1] images; drops only if `train`."""
    x = images.reshape(images.shape[0], -1)
    for i, size in enumerate(HIDDEN):
      x = nn.gelu(nn.Dense(size, name=f"hidden_{i}")(x), approximate=False)
      x = nn.Dropout(DROPOUT)(x, deterministic=not train)
    return nn.Dense(NUM_CLASSES, name="classifier")(x)


def torch_net():
  """Returns the same in PyTorch, with weights that are always the same."""
  import torch

  torch.manual_seed(0)
  layers = collections.OrderedDict(flatten=torch.nn.Flatten())
  inputs = math.prod(IMAGE_SHAPE)
  for i, size in enumerate(HIDDEN):
    layers[f"hidden_{i}"] = torch.nn.Linear(inputs, size)
    layers[f"gelu_{i}"] = torch.nn.GELU()
    layers[f"dropout_{i}"] = torch.nn.Dropout(DROPOUT)
    inputs = size
  layers["classifier"] = torch.nn.Linear(inputs, NUM_CLASSES)
  return torch.nn.Sequential(layers)
