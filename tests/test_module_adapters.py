"""What modules of Flax NNX and Equinox do besides layers after layers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdia import models
from jaxdia.client import client_gradient
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_path

SHAPE, LABELS = (8, 8, 1), np.array([0, 1, 4])
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((3, *SHAPE)), jnp.float32)


def _loss(logits):
  return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), LABELS])


def _assert_same_gradient(model, native, rngs):
  params = model.init(jax.random.key(0))
  masks = models.read_masks(model, params, IMAGES, rngs)
  assert {site: mask.shape for site, mask in masks.items()} == model.mask_shapes(3)
  actual = leaves_by_path(jax.jit(client_gradient)(model, params, masks, IMAGES, LABELS))
  expected = leaves_by_path(models.from_native(model, native, what="gradient"))
  assert actual.keys() == expected.keys()
  for path, leaf in actual.items():
    np.testing.assert_allclose(leaf, expected[path], 1e-4, 1e-6, err_msg=str(path))


class Attention(nnx.Module):
  def __init__(self, rngs, broadcast=False, **options):
    self.attend = nnx.MultiHeadAttention(
      2, 16, dropout_rate=0.3, broadcast_dropout=broadcast, decode=False, rngs=rngs, **options
    )
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, broadcast_dims=(1,), rngs=rngs)
    self.out = nnx.Linear(64, 5, rngs=rngs)

  def __call__(self, images):
    x = self.dropout(self.norm(self.attend(images.reshape(len(images), 4, 16))))
    return self.out(x.reshape(len(x), -1))


@pytest.mark.parametrize("broadcast", [False, True])
def test_nnx_attention_batch_statistics_and_broadcast_masks(broadcast):
  module = Attention(nnx.Rngs(0), broadcast)
  module.train()
  model = models.from_nnx(module, SHAPE)
  attention = (1, 1, 4, 4) if broadcast else (2, 2, 4, 4)
  assert model.mask_shapes(2) == {"attend": attention, "dropout": (2, 1, 16)}
  before = nnx.clone(module)
  native = nnx.grad(lambda module: _loss(module(IMAGES)))(nnx.clone(module))
  _assert_same_gradient(model, native, before)


def test_nnx_running_averages_are_constants():
  module = Attention(nnx.Rngs(0))
  module.train()
  module(IMAGES)  # moves the averages
  evaluation = models.evaluation_mode(models.from_nnx(module, SHAPE))
  module.norm.use_running_average = True
  model = models.from_nnx(module, SHAPE)
  module.eval()
  actual = model.apply(model.init(jax.random.key(0)), models.expected_masks(model, 3), IMAGES)
  np.testing.assert_allclose(actual, module(IMAGES), 1e-5, 1e-6)
  actual = evaluation.apply(model.init(jax.random.key(0)), {}, IMAGES)
  np.testing.assert_allclose(actual, module(IMAGES), 1e-5, 1e-6)
  with pytest.raises(InputError, match=r"all dropout of Attention \(attend, dropout\) is switched"):
    models.from_nnx(module, SHAPE)


class Noisy(nnx.Module):
  def __init__(self, rngs):
    self.out, self.rngs = nnx.Linear(64, 5, rngs=rngs), rngs

  def __call__(self, images):
    x = images.reshape(len(images), -1)
    return self.out(x + jax.random.normal(self.rngs.noise(), x.shape))


def test_from_nnx_refuses_by_name():
  with pytest.raises(InputError, match="draws 128 random numbers"):
    models.from_nnx(Noisy(nnx.Rngs(0, noise=1)), SHAPE)
  with pytest.raises(InputError, match="'attend' has a custom attention_fn"):
    own = Attention(nnx.Rngs(0), attention_fn=lambda query, *args, **kwargs: query)
    models.from_nnx(own, SHAPE)
  with pytest.raises(InputError, match="from_module got the class Noisy"):
    models.from_module(Noisy, SHAPE)


def _equinox_attention(scanned=False):
  eqx = pytest.importorskip("equinox")

  class Attention(eqx.Module):
    attend: eqx.nn.MultiheadAttention
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
      keys = jax.random.split(key)
      self.attend = eqx.nn.MultiheadAttention(2, 16, dropout_p=0.3, key=keys[0])
      self.dropout = eqx.nn.Dropout(0.2)
      self.out = eqx.nn.Linear(64, 5, key=keys[1])

    def __call__(self, image, key):
      keys, x = jax.random.split(key, 6), image.reshape(4, 16)
      x = self.attend(x, x, x, key=keys[0])
      x = jax.vmap(lambda x: self.dropout(x, key=keys[1]))(x)  # one mask for all tokens
      if scanned:
        x, _ = jax.lax.scan(lambda x, key: (self.dropout(x, key=key), None), x, keys[2:])
      x = jax.vmap(lambda x, key: self.dropout(x, key=key))(x, keys[2:])  # one for each
      return self.out(x.ravel())

  return Attention(jax.random.key(0))


def test_equinox_maps_inside_the_map_over_images():
  module = _equinox_attention()
  eqx = pytest.importorskip("equinox")
  model = models.from_equinox(module, SHAPE)
  assert model.mask_shapes(2) == {
    "attend/dropout": (2, 2, 4, 4), "dropout": (2, 1, 16), "dropout#2": (2, 4, 16)
  }  # fmt: skip
  rows = {layer.path[-1]: layer.rows for layer in model.dense(3)}
  assert rows == {f"{name}_proj": (12,) for name in ("query", "key", "value", "output")} | {
    "out": (3,)
  }
  keys, images = jax.random.split(jax.random.key(7), 3), IMAGES.transpose(0, 3, 1, 2)
  native = eqx.filter_grad(lambda module: _loss(jax.vmap(module)(images, keys)))(module)
  _assert_same_gradient(model, native, keys)


def test_from_equinox_refuses_by_name():
  eqx = pytest.importorskip("equinox")
  with pytest.raises(InputError, match="'dropout' is inside a transformation"):
    models.from_equinox(_equinox_attention(scanned=True), SHAPE)
  with pytest.raises(InputError, match="keeps state"):
    norm = eqx.nn.BatchNorm(1, axis_name="batch", mode="batch")
    models.from_equinox(eqx.nn.Sequential([norm, eqx.nn.Lambda(jnp.ravel)]), SHAPE)
  off = eqx.nn.inference_mode(_equinox_attention())
  with pytest.raises(InputError, match="all dropout of Attention .* is switched off"):
    models.from_equinox(off, SHAPE)
  with pytest.raises(InputError, match="from_equinox got int"):
    models.from_equinox(3, SHAPE)
