import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_model_refusals import OffByDefault, Tempered

from jaxdia import models
from jaxdia.client import client_gradient
from jaxdia.core.random import draw
from jaxdia.models.zoo.convnet import ConvNet
from jaxdia.models.zoo.lenet import LeNet
from jaxdia.models.zoo.mlp import MLP
from jaxdia.models.zoo.resnet import ResNet18
from jaxdia.models.zoo.vit import ViT

SMALL_VIT = {"width": 16, "depth": 1, "num_heads": 4, "mlp_size": 24}


class Attention(nn.Module):
  """A user's module: Flax's attention, a shared Dropout, and broadcast masks."""

  broadcast: bool

  @nn.compact
  def __call__(self, x, *, deterministic):
    x = x.reshape(x.shape[0], 4, -1)
    attention = nn.MultiHeadDotProductAttention(
      2, qkv_features=8, dropout_rate=0.3, broadcast_dropout=self.broadcast
    )
    x = attention(x, deterministic=deterministic)
    shared = nn.Dropout(0.2, broadcast_dims=(1,), name="shared")
    x = shared(x, deterministic)
    x = shared(nn.Dense(8)(x), deterministic)
    x = nn.Dropout(0.0)(x, deterministic=deterministic)  # no site
    return nn.Dense(5)(x.reshape(x.shape[0], -1))


CASES = {
  "mlp": (MLP(5, 0.25, (8, 8)), {"train": True}, (8, 8, 3)),
  "lenet": (LeNet(5, 0.25, 3, 8), {"train": True}, (8, 8, 3)),
  "convnet": (ConvNet(5, 0.25, 2, 2), {"train": True}, (9, 9, 3)),
  "resnet18": (ResNet18(5, 0.25, 4, 2), {"train": True}, (8, 8, 3)),
  "vit": (ViT(5, 0.25, 4, **SMALL_VIT), {"train": True}, (8, 8, 3)),
  "attention": (Attention(broadcast=False), {"deterministic": False}, (4, 4, 1)),
  "broadcast": (Attention(broadcast=True), {"deterministic": False}, (4, 4, 1)),
}


@pytest.fixture(params=CASES)
def case(request):
  module, kwargs, image_shape = CASES[request.param]
  model = models.from_flax(module, image_shape)
  params = jax.jit(model.init)(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (3, *image_shape))
  return module, kwargs, model, params, images


def test_expected_masks_are_the_network_without_dropout_exactly(case):
  module, kwargs, model, params, images = case
  evaluation = {name: not value for name, value in kwargs.items()}
  expected = module.apply({"params": params}, images, **evaluation)
  # As products, convolutions are the same but for rounding.
  model = dataclasses.replace(model, convolve="native")
  actual = model.apply(params, models.expected_masks(model, 3), images)
  np.testing.assert_array_equal(actual, expected)


def test_gradient_is_that_of_the_plain_module_with_the_same_masks(case, monkeypatch):
  module, kwargs, model, params, images = case
  masks = models.sample_masks(jax.random.key(2), model, 3)
  labels = jnp.array([0, 3, 4])
  actual = jax.jit(client_gradient, static_argnums=0)(model, params, masks, images, labels)

  # The plain module draws its masks with bernoulli, site by site: hand it ours.
  draws = iter(model.sites)

  def bernoulli(key, p, shape):
    site = next(draws)
    assert tuple(shape) == masks[site.name].shape
    np.testing.assert_allclose(p, 1 - site.rate)
    return masks[site.name] == 1

  monkeypatch.setattr(jax.random, "bernoulli", bernoulli)

  def loss(params):
    logits = module.apply({"params": params}, images, rngs={"dropout": jax.random.key(0)}, **kwargs)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), labels])

  expected = jax.jit(jax.grad(loss))(params)
  assert next(draws, None) is None
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-6), actual, expected)


def test_sites_of_the_papers_vit():
  model = models.create("vit", (32, 32, 3), 10, 0.5)
  shapes = model.mask_shapes(1)
  assert len(model.sites) == 17
  assert sum(np.prod(shape) for shape in shapes.values()) == 486_720
  assert model.classifier == ("classifier",)
  assert {site.rate for site in model.sites} == {0.5}
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert set(params["block_0"]["qkv"]) == {"kernel"}  # no bias


def test_sites_of_vit_b16():
  model = models.create("vit_b16", (224, 224, 3), 1000)
  entries = sum(np.prod(shape) for shape in model.mask_shapes(1).values())
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert len(model.sites) == 49
  assert round(entries / 1e6, 1) == 16.6
  assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6) == 87


def test_initial_weights_are_as_in_the_paper():
  model = models.create("vit", (16, 16, 3), 10, **SMALL_VIT)
  params = jax.jit(model.init)(jax.random.key(0))
  assert abs(float(jnp.std(params["position_embedding"])) - 1) < 0.1
  assert abs(float(jnp.std(params["class_token"])) - 1) < 0.5
  layer = params["block_0"]["mlp_output"]  # fan_in 24
  for leaf in layer.values():
    assert float(jnp.max(jnp.abs(leaf))) <= 24**-0.5
  assert float(jnp.max(jnp.abs(layer["kernel"]))) > 0.95 * 24**-0.5


def test_a_site_that_is_called_twice_has_two_masks():
  model = models.from_flax(Attention(broadcast=True), (4, 4, 1))
  shapes = model.mask_shapes(3)
  assert shapes == {
    "MultiHeadDotProductAttention_0": (1, 1, 4, 4),
    "shared": (3, 1, 4),
    "shared#2": (3, 1, 8),
  }
  assert [site.rate for site in model.sites] == [0.3, 0.2, 0.2]
  assert model.classifier == ("Dense_1",)


def test_sampled_masks_keep_one_minus_rate(model):
  masks = models.sample_masks(jax.random.key(0), model, 400)
  for mask in masks.values():
    assert set(np.unique(mask)) == {0, 1}
    assert abs(float(jnp.mean(mask)) - 0.75) < 0.02
  again = models.sample_masks(jax.random.key(1), model, 400)
  assert not np.array_equal(masks["dropout_0"], again["dropout_0"])


def test_a_network_without_dropout_has_no_sites():
  model = models.create("mlp", (4, 4, 1), 3, 0)
  assert model.sites == () and model.mask_shapes(2) == {}
  images = jnp.ones((2, 4, 4, 1))
  assert model.apply(model.init(jax.random.key(0)), {}, images).shape == (2, 3)


def test_a_module_wrapped_in_remat_works():
  class Remat(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = nn.remat(nn.Dense)(6)(x.reshape(len(x), -1))
      return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=not train))

  model = models.from_flax(Remat(), (2, 2, 1))
  params, masks = model.init(jax.random.key(0)), models.sample_masks(jax.random.key(1), model, 2)
  gradient = client_gradient(model, params, masks, jnp.ones((2, 2, 2, 1)), jnp.array([0, 1]))
  assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_call_kwargs_turn_on_what_the_adapter_does_not_know():
  model = models.from_flax(OffByDefault(), (2, 2, 1), call_kwargs={"is_learning": True})
  assert model.sites == (models.Site("off", 0.5),)
  model = models.from_flax(Tempered(), (2, 2, 1), call_kwargs={"temperature": 2.0})
  assert model.num_classes == 3


class MySelfAttention(nn.MultiHeadDotProductAttention):
  """Has a __call__ without a dropout_rng, and einsums of its own."""

  @nn.compact
  def __call__(self, x, *, deterministic):
    return super().__call__(x, x, deterministic=deterministic)


@pytest.mark.parametrize("layer", [nn.SelfAttention, nn.MultiHeadAttention, MySelfAttention])
@pytest.mark.parametrize("own_einsums", [False, True])
def test_attention_layers_of_all_kinds(layer, own_einsums):
  def tripled():
    return lambda equation, a, b: 3 * jnp.einsum(equation, a, b)

  options = {"qk_attn_weights_einsum_cls": tripled, "attn_weights_value_einsum_cls": tripled}

  class Module(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = x.reshape(len(x), 4, -1)
      attend = layer(2, dropout_rate=0.4, **options if own_einsums else {})
      return nn.Dense(3)(attend(x, deterministic=not train).reshape(len(x), -1))

  model = models.from_flax(Module(), (4, 4, 1))
  assert [site.rate for site in model.sites] == [0.4]
  assert list(model.mask_shapes(2).values()) == [(1, 1, 4, 4)]
  params = jax.jit(model.init)(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
  actual = model.apply(params, models.expected_masks(model, 2), images)
  expected = Module().apply({"params": params}, images, train=False)
  np.testing.assert_array_equal(actual, expected)
  masks = models.sample_masks(jax.random.key(2), model, 2)
  assert not np.allclose(model.apply(params, masks, images), expected)


def test_the_classifier_is_the_layer_that_gives_the_logits():
  class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = x.reshape(len(x), -1)
      return nn.Dense(3, name="value")(x) * nn.sigmoid(nn.Dense(3, name="gate")(x))

  class Narrow(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Conv(3, (1,))(nn.gelu(nn.Dense(3)(x.reshape(len(x), -1)))[:, None])[:, 0]

  assert models.from_flax(Gated(), (2, 2, 1)).classifier is None
  assert models.from_flax(Narrow(), (2, 2, 1)).classifier is None
  assert models.create("lenet", (8, 8, 1), 3).classifier == ("classifier",)


def test_batch_axes():
  model = models.from_flax(Attention(broadcast=True), (4, 4, 1))
  assert models.batch_axes(model) == {
    "MultiHeadDotProductAttention_0": None,
    "shared": 0,
    "shared#2": 0,
  }


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (2, 3, 4, 3)])
@pytest.mark.parametrize("sampler", [jax.random.normal, jax.random.uniform, jax.random.bernoulli])
def test_arrays_are_drawn_with_the_numbers_of_their_shape(sampler, shape):
  key = jax.random.key(0)
  assert np.array_equal(draw(sampler, key, shape), sampler(key, shape=shape))


class _FirstConvolution(nn.Module):
  """That of the built-in LeNet, drawn by Flax's own initialiser."""

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Conv(12, (5, 5), 2, kernel_init=init, name="conv_0")(x)


def test_built_in_networks_have_the_weights_that_flax_draws():
  key, images = jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)
  params = models.create("lenet", (8, 8, 3), 5, 0.5).init(key)
  expected = _FirstConvolution().init(key, images)["params"]
  assert np.array_equal(params["conv_0"]["kernel"], expected["conv_0"]["kernel"])
