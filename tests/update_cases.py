"""Networks and arrays that the tests of updates share."""

import dataclasses

import jax
import numpy as np
from flax import linen as nn

from jaxdia import models
from jaxdia.core.trees import leaves_by_path
from jaxdia.models.flax import FlaxNetwork

IMAGE_SHAPE = (4, 4, 3)


class Small(nn.Module):
  """A convolution, a square dense layer between two others, and a normalisation."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.gelu(nn.Conv(6, (3, 3), strides=2, name="conv")(x))
    x = x.reshape(x.shape[0], -1)  # 2 x 2 x 6
    x = nn.LayerNorm(name="norm")(nn.Dense(24, name="square")(x))
    x = nn.Dropout(0.5)(x, deterministic=not train)
    return nn.Dense(5, name="classifier")(x)


class NamedNetwork(FlaxNetwork):
  """The same, as an adapter of a library that has PyTorch's names and layouts."""

  def entries(self):
    return {
      f"net.{name}": models.Entry(path, axes)
      for name, path, axes in [
        ("conv.weight", ("conv", "kernel"), (2, 3, 1, 0)),
        ("conv.bias", ("conv", "bias"), None),
        ("square.weight", ("square", "kernel"), (1, 0)),
        ("square.bias", ("square", "bias"), None),
        ("norm.weight", ("norm", "scale"), None),
        ("norm.bias", ("norm", "bias"), None),
        ("classifier.weight", ("classifier", "kernel"), (1, 0)),
        ("classifier.bias", ("classifier", "bias"), None),
      ]
    }


def small():
  """Returns the model and params whose entries are all different."""
  model = models.from_flax(Small(), IMAGE_SHAPE)
  return model, random_like(model.init(jax.random.key(0)))


def named():
  """Returns the model with the names and layouts of PyTorch."""
  network = small()[0].network
  fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
  return models.model_of(NamedNetwork(**fields))


def random_like(tree, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), tree)


def flat(tree, separator="."):
  """Returns the arrays of a tree by name, as a file of Flax's params has them."""
  return {separator.join(p): np.asarray(a) for p, a in leaves_by_path(tree).items()}


def native(network, tree):
  """Returns the arrays of a tree by the names and in the layouts of the network's library."""
  leaves = leaves_by_path(tree)
  return {
    name: leaves[path] if axes is None else leaves[path].transpose(np.argsort(axes))
    for name, (path, axes) in network.entries().items()
  }


def assert_same(tree, other):
  """Asserts that trees have the same leaves, types included."""
  leaves, others = leaves_by_path(tree), leaves_by_path(other)
  assert set(leaves) == set(others)
  for path, leaf in leaves.items():
    assert leaf.dtype == others[path].dtype, path
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(others[path]), err_msg=str(path))
