"""Convolutions as products: values and two derivatives are those of XLA's convolution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdia import models
from jaxdia.client import observe
from jaxdia.closed_form.geometry import find_geometry
from jaxdia.closed_form.kernel_equations import Equations
from jaxdia.core.trees import leaves_by_path
from jaxdia.gradients import compare, prepare
from jaxdia.models import Convolution
from jaxdia.models.convolutions import PlainConvolution

# What is unlike 3x3 with zeros around: (kernel, channels in and out, the convolution).
KINDS = {
  "plain": ((3, 3), (2, 4), {"padding": ((1, 1), (1, 1))}),
  "strides": ((3, 2), (2, 4), {"strides": (2, 3), "padding": ((1, 0), (2, 1))}),
  "same": ((4, 3), (2, 4), {"strides": (2, 1), "padding": "SAME"}),
  "same_lower": ((4, 3), (2, 4), {"strides": (2, 1), "padding": "SAME_LOWER"}),
  "valid": ((5, 5), (3, 2), {"strides": (2, 2)}),
  "cropped": ((3, 3), (2, 4), {"padding": ((-1, 1), (0, -2))}),
  "dilated": ((3, 2), (2, 4), {"kernel_dilation": (2, 3), "padding": "SAME"}),
  "transposed": ((3, 3), (2, 4), {"input_dilation": (2, 3), "padding": ((1, 2), (0, 1))}),
  "groups": ((3, 3), (4, 6), {"groups": 2, "padding": "SAME"}),
  "depthwise": ((3, 3), (4, 8), {"groups": 4, "strides": (2, 2), "padding": "SAME"}),
  "pointwise": ((1, 1), (3, 4), {"strides": (2, 2)}),
  "circular": ((3, 4), (2, 4), {"padding": "CIRCULAR", "kernel_dilation": (2, 1)}),
  "reflect": ((3, 4), (2, 4), {"padding": "REFLECT", "strides": (2, 1)}),
}


def _make_layer(kind, layout, rng):
  """Returns a convolution, its leaves, and the shape of an image before it."""
  size, (channels, outputs), options = KINDS[kind]
  layer = PlainConvolution(**({"strides": (1, 1), "padding": "VALID"} | options), layout=layout)
  kernel = rng.normal(size=(*size, channels // layer.groups, outputs))
  shape = {"H": 11, "W": 10, "C": channels}
  before = tuple(shape[axis] for axis in layout[1:])
  return layer, {"kernel": kernel, "bias": rng.normal(size=outputs)}, before


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_has_the_values_and_derivatives_of_a_convolution(kind, layout):
  rng = np.random.default_rng(0)
  layer, leaves, shape = _make_layer(kind, layout, rng)
  with jax.enable_x64(True):
    inputs = jnp.asarray(rng.normal(size=(2, *shape)))
    leaves = jax.tree.map(jnp.asarray, leaves)
    towards = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (leaves, inputs))

    def of(convolve):
      def loss(leaves, inputs):
        return jnp.sum(jnp.sin(convolve(leaves, inputs)))

      gradient = jax.grad(loss, (0, 1))

      def match(leaves, inputs):
        pairs = zip(*map(jax.tree.leaves, (gradient(leaves, inputs), towards)), strict=True)
        return sum(jnp.sum((a - b) ** 2) for a, b in pairs)

      second = jax.grad(match, (0, 1))
      return convolve(leaves, inputs), gradient(leaves, inputs), second(leaves, inputs)

    actual, expected = jax.jit(lambda: (of(layer.product), of(layer)))()
    for found, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
      np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-11 * np.abs(wanted).max())


class Unusual(nn.Module):
  """A network with a convolution of each kind that a network has."""

  @nn.compact
  def __call__(self, x, train=True):
    """Returns logits."""
    x = nn.gelu(nn.Conv(6, (3, 3), 2, padding="CIRCULAR", name="around")(x))
    shared = nn.Conv(6, (3, 3), feature_group_count=2, name="grouped")
    x = nn.gelu(shared(nn.gelu(shared(x))))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.Dropout(0.5)(x, deterministic=not train)
    x = nn.gelu(nn.Conv(5, (2, 2), use_bias=False, kernel_dilation=2, name="dilated")(x))
    return nn.Dense(4)(x.mean((1, 2)))


def _networks():
  yield "lenet", models.create("lenet", (12, 12, 1), 4, 0.5, channels=3, hidden_size=8)
  yield "resnet18", models.create("resnet18", (8, 8, 2), 4, 0.5, width=2, groups=1)
  yield "convnet", models.create("convnet", (27, 27, 1), 4, 0.5, width=2, groups=1)
  yield "unusual", models.from_flax(Unusual(), (12, 12, 2))


NETWORKS = dict(_networks())


@functools.lru_cache
def _match(name, convolve, method):
  """Returns the derivative by a dummy image of how a client's gradient is matched, and that."""
  with jax.enable_x64(True):
    model = dataclasses.replace(NETWORKS[name], convolve=convolve)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.init(jax.random.key(0)))
    shape, labels = (2, *model.image_shape), jnp.array([0, 3])
    images = jax.random.uniform(jax.random.key(1), shape, jnp.float64)
    observation, secret = observe(jax.random.key(2), model, params, images, labels)
    target = prepare(model, observation, method).target

    def distance(images):
      comparison = compare(model, params, target, secret.masks, images, labels, observation.loss)
      return comparison.inner, comparison

    start = jax.random.normal(jax.random.key(3), shape, jnp.float64)
    return jax.jit(jax.grad(distance, has_aux=True))(start)


@pytest.mark.parametrize(
  ("name", "matching"),
  [
    # What takes longest to compile is an inner part of the others' too.
    pytest.param(name, method, marks=[pytest.mark.slow] * (name in ("resnet18", "convnet")))
    for name in NETWORKS
    for method in ("formed", "factored")
  ],
)
def test_a_network_of_products_is_matched_as_one_of_convolutions(name, matching):
  actual, expected = _match(name, "product", matching), _match(name, "native", "formed")
  for found, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_every_built_in_network_with_convolutions_is_tried():
  for name in models.MODELS:
    if name not in NETWORKS:
      shape = (224, 224, 3) if name == "vit_b16" else (16, 16, 1)
      assert not models.create(name, shape, 4, 0.5).convolutions, name


def test_convolutions_are_dense_layers_with_a_row_a_position():
  model = NETWORKS["unusual"]
  layers = {layer.path[0]: layer for layer in model.products(3)}
  assert set(layers) == {"around", "dilated", "Dense_0"}  # not in groups
  assert (layers["around"].rows, layers["around"].inputs, layers["around"].outputs) == (
    (3 * 36,),
    18,
    6,
  )
  assert [layer.path for layer in model.dense(3)] == [("Dense_0",)]


def test_no_convolution_is_left_where_products_are_asked_for():
  model, images = NETWORKS["unusual"], jnp.zeros((2, 12, 12, 2))
  params = model.init(jax.random.key(0))

  def program(convolve):
    chosen = dataclasses.replace(model, convolve=convolve)
    masks = {name: jnp.ones(shape) for name, shape in model.mask_shapes(2).items()}
    return jax.jit(chosen.apply).lower(params, masks, images).compile().as_text()

  assert "convolution(" in program("native") and "convolution(" not in program("product")
  assert {dataclasses.replace(model, convolve=c) for c in ("auto", "native")} != {model}
  assert leaves_by_path(params)["grouped", "kernel"].shape == (3, 3, 3, 6)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", KINDS)
def test_normal_equations_are_those_of_all_equations(kind, layout):
  rng = np.random.default_rng(0)
  apply, leaves, before = _make_layer(kind, layout, rng)
  after = jax.eval_shape(apply, leaves, jax.ShapeDtypeStruct((1, *before), "float32")).shape[1:]
  geometry = find_geometry(Convolution(("conv",), before, after, apply), leaves, count=2)
  inputs = rng.normal(size=geometry.order.shape)
  parts = rng.normal(size=(3, *geometry.positions.shape))
  equations = Equations(geometry, inputs, *parts, scales=(0.3, 0.7))
  each = np.eye(inputs.size).reshape(-1, *inputs.shape)
  matrix = np.stack([equations.forward(one) for one in each])
  np.testing.assert_allclose(np.tril(equations.normal()), np.tril(matrix @ matrix.T), atol=1e-9)
