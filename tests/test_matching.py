"""Factored comparison of gradients against the formed gradient, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdia import gradients, models
from jaxdia.client import CROSS_ENTROPY, client_gradient, observe
from jaxdia.core.trees import shapes_of
from jaxdia.gradients import Factors

SHAPE = (8, 8, 3)


class SharedDense(nn.Module):
  """Calls one dense layer twice, on inputs of different leading shapes."""

  @nn.compact
  def __call__(self, x, train=True):
    shared = nn.Dense(12, name="shared")
    x = nn.Dense(12)(x.reshape(x.shape[0], 4, -1))
    x = nn.gelu(shared(x))
    x = nn.Dropout(0.3)(x, deterministic=not train)
    return nn.Dense(5)(nn.gelu(shared(x.mean(axis=1))))


def _triple(variables):
  return jax.tree.map(lambda x: 3 * x, variables)


def _doubling_product(a, b, *args, **kwargs):
  return jax.lax.dot_general(a, 2 * b, *args, **kwargs)


class Hidden(nn.Module):
  """Has dense layers of all kinds that cannot be tapped, a rounded and a plain one."""

  @nn.compact
  def __call__(self, x, train=True):
    tripled = nn.map_variables(nn.Dense, "params", trans_in_fn=_triple, mutable=True)
    x = nn.gelu(tripled(12, name="tripled")(x.reshape(x.shape[0], -1)))
    x = nn.gelu(nn.Dense(12, dot_general=_doubling_product, name="doubled")(x))
    x = nn.Dense(12, dtype=jnp.bfloat16, name="rounded")(x).astype(x.dtype)
    x = nn.gelu(nn.remat(nn.Dense)(12, name="inside")(x.reshape(x.shape[0], -1)))
    tied = nn.Dense(12, name="tied")
    x = nn.gelu(tied(x)) @ tied.variables["params"]["kernel"].T
    x = nn.Dropout(0.3)(x, deterministic=not train)
    return nn.Dense(5, name="plain")(x)


VIT = {"width": 16, "depth": 1, "num_heads": 2, "mlp_size": 24}
MODELS = {
  "mlp": lambda: models.create("mlp", SHAPE, 5, 0.25, hidden_sizes=(16, 16)),
  "mlp_bias": lambda: models.create("mlp", SHAPE, 5, 0.25, hidden_sizes=(16, 16), use_bias=True),
  "lenet": lambda: models.create("lenet", SHAPE, 5, 0.25, channels=3, hidden_size=16),
  "resnet18": lambda: models.create("resnet18", SHAPE, 5, 0.25, width=4, groups=2),
  "vit": lambda: models.create("vit", SHAPE, 5, 0.25, **VIT),
  "vit_b16": lambda: models.create(
    "vit_b16", SHAPE, 5, 0.25, **VIT | {"depth": 2, "patch_size": 4}
  ),
  "shared": lambda: models.from_flax(SharedDense(), SHAPE),
  "hidden": lambda: models.from_flax(Hidden(), SHAPE),
}


# The ResNet takes long to compile.
CASES = [
  pytest.param(name, size, marks=[pytest.mark.slow] if name in ("resnet18", "vit_b16") else [])
  for name in MODELS
  for size in (1, 4)
]


def _case(model, size):
  dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
  params = jax.jit(model.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  images = jax.random.uniform(jax.random.key(1), (2, size, *SHAPE), dtype)
  labels = jnp.arange(size) % 5
  observation, _ = observe(jax.random.key(2), model, params, images[0], labels)
  return model, observation, images[1], labels


def _differentiate(model, observation, images, labels, compare):
  """Returns value and derivatives of both distances, by images and masks."""

  def distances(images, masks):
    comparison = compare(masks, images)
    # Their sum has all parts of a comparison in it.
    return gradients.cosine_distance(comparison) + gradients.squared_l2_distance(comparison)

  masks = models.expected_masks(model, len(labels), jnp.float64)
  # Compiled in haste: it runs once.
  haste = {"xla_backend_optimization_level": 0}
  return jax.jit(jax.value_and_grad(distances, argnums=(0, 1)), compiler_options=haste)(
    images, masks
  )


def _formed(model, observation, labels):
  """Compares with the whole gradient, written down independently."""
  target = jnp.concatenate([x.ravel() for x in jax.tree.leaves(observation.gradient)])

  def compare(masks, images):
    tree = client_gradient(model, observation.params, masks, images, labels)
    gradient = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    inner, norm = gradient @ target, gradient @ gradient
    left = target - inner / norm * gradient
    return gradients.Comparison(inner, norm, target @ target, left @ left)

  return compare


def _prepared(model, observation, labels, method):
  target = gradients.prepare(model, observation, method).target

  def compare(masks, images):
    return gradients.compare(
      model, observation.params, target, masks, images, labels, CROSS_ENTROPY
    )

  return target, compare


def _assert_close(actual, expected):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      a, e, rtol=1e-10, atol=1e-10 * float(jnp.max(jnp.abs(e)))
    ),
    actual,
    expected,
  )


@pytest.mark.parametrize("name, size", CASES)
def test_value_and_derivatives_are_those_of_the_formed_gradient(name, size):
  with jax.enable_x64(True):
    case = _case(MODELS[name](), size)
    model, observation, images, labels = case
    expected = _differentiate(*case, _formed(model, observation, labels))
    choices = {m: gradients.choose_layers(model, size, m) for m in ("factored", "auto", "formed")}
    for method in {layers: method for method, layers in choices.items()}.values():
      _, compare = _prepared(model, observation, labels, method)
      _assert_close(_differentiate(*case, compare), expected)


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_target_of_full_rank_is_kept_whole_and_matched(name):
  with jax.enable_x64(True):
    model, observation, images, labels = _case(MODELS[name](), 1)
    noised = jax.tree.map(
      lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
      observation.gradient,
    )
    observation = dataclasses.replace(observation, gradient=noised)
    target, compare = _prepared(model, observation, labels, "factored")
    assert target.kernels and not any(isinstance(k, Factors) for k in target.kernels.values())
    case = (model, observation, images, labels)
    _assert_close(
      _differentiate(*case, compare),
      _differentiate(*case, _formed(model, observation, labels)),
    )


def test_kernels_of_a_client_become_thin_factors():
  model = models.create("mlp", (28, 28, 1), 10, 0.5)
  params = jax.jit(model.init)(jax.random.key(0))
  images = np.random.default_rng(0).uniform(size=(4, 28, 28, 1)).astype(np.float32)
  observation, _ = observe(jax.random.key(1), model, params, images, np.arange(4))
  target = gradients.prepare(model, observation).target
  assert len(target.kernels) == 4 and not target.formed
  factors = target.kernels[("hidden_0",)]
  assert factors.left.shape == (784, 4) and factors.right.shape == (512, 4)
  kernel = observation.gradient["hidden_0"]["kernel"]
  error = np.linalg.norm(factors.left @ factors.right.T - kernel) / np.linalg.norm(kernel)
  assert error < 1e-6


def test_prepared_observations_differ_in_form_only_where_rank_is_not_low():
  model = MODELS["mlp"]()
  params = jax.jit(model.init)(jax.random.key(0))
  images = np.random.default_rng(0).uniform(size=(2, 1, *SHAPE)).astype(np.float32)
  observations = [
    observe(jax.random.key(i), model, params, images[i], np.array([i]))[0] for i in range(2)
  ]
  kernel = observations[0].gradient["hidden_0"]["kernel"]
  noise = 0.1 * jax.random.normal(jax.random.key(0), kernel.shape)
  hidden = observations[0].gradient["hidden_0"] | {"kernel": kernel + noise}
  noised = dataclasses.replace(
    observations[0], gradient=observations[0].gradient | {"hidden_0": hidden}
  )
  first, second, third = (
    gradients.prepare(model, observation) for observation in (*observations, noised)
  )
  assert shapes_of(first) == shapes_of(second) != shapes_of(third)
  np.testing.assert_array_equal(third.target.kernels[("hidden_0",)], kernel + noise)


def test_a_frozen_layer_has_no_part_in_the_distance():
  """Its kernel, tapped or formed, is in neither gradient; the rest is compared as before."""
  model, observation, images, labels = _case(MODELS["mlp_bias"](), 2)
  for name in ("hidden_0", "classifier"):
    gradient = observation.gradient | {name: None}
    frozen = dataclasses.replace(observation, gradient=gradient)
    for method in ("formed", "factored"):
      target = gradients.prepare(model, frozen, method).target
      masks = models.expected_masks(model, 2)
      comparison = gradients.compare(
        model, observation.params, target, masks, images, labels, CROSS_ENTROPY
      )
      tree = client_gradient(model, observation.params, masks, images, labels) | {name: None}
      pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(gradient), strict=True))
      inner = sum(float(jnp.sum(a * b)) for a, b in pairs)
      np.testing.assert_allclose(comparison.inner, inner, rtol=1e-4)
      norm = sum(float(jnp.sum(b * b)) for _, b in pairs)
      np.testing.assert_allclose(comparison.target_squared_norm, norm, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_a_perfect_match_is_near_0_however_small_the_gradient(scale):
  """As that of trained weights is; on the authors' side of it, their 1e-8 is added."""
  square = jnp.float32(scale**2)
  match = gradients.Comparison(square, square, square, jnp.float32(0))
  assert 0 <= float(gradients.cosine_distance(match)) < 2e-6
  opposite = match._replace(inner=-square)
  np.testing.assert_allclose(gradients.cosine_distance(opposite), 2, rtol=1e-5)
  with jax.enable_x64(True):
    large = gradients.Comparison(*(jnp.float64(x) for x in (0.9, 1.0, 1.0, 0.2)))
    np.testing.assert_allclose(gradients.cosine_distance(large), 1 - 0.9 / (1 + 1e-8), rtol=1e-13)


def test_a_cosine_distance_is_never_negative_and_keeps_its_derivative():
  beyond = gradients.Comparison(jnp.float32(1.001), *(jnp.float32(1),) * 3)
  assert float(gradients.cosine_distance(beyond)) == 0
  slope = jax.grad(lambda x: gradients.cosine_distance(beyond._replace(inner=x)))(beyond.inner)
  np.testing.assert_allclose(slope, -1, rtol=1e-6)


def test_layers_that_cannot_be_tapped_are_formed():
  model = MODELS["hidden"]()
  assert [layer.path for layer in model.dense(2)] == [("rounded",), ("plain",)]
  model = MODELS["shared"]()
  assert {layer.path: layer.rows for layer in model.dense(2)} == {
    ("Dense_0",): (8,),
    ("shared",): (8, 2),
    ("Dense_1",): (2,),
  }


def test_the_cheaper_way_is_chosen():
  model = models.create("vit", (32, 32, 3), 10)
  assert gradients.choose_layers(model, 1, "formed") == ()
  chosen = {layer.path for layer in gradients.choose_layers(model, 1, "auto")}
  assert ("block_0", "mlp_hidden") in chosen
  assert ("patch_embedding",) not in chosen  # 48 inputs, 64 rows
  assert len(gradients.choose_layers(model, 1, "factored")) == 18
  many = {layer.path for layer in gradients.choose_layers(model, 64, "auto")}
  assert many < chosen


def test_models_of_plain_functions_are_formed():
  model = models.from_functions(
    lambda key: jnp.ones((192, 5)),
    lambda params, drop, x: x.reshape(len(x), -1) @ params,
    SHAPE,
    {},
  )
  assert gradients.choose_layers(model, 1, "factored") == ()


@pytest.mark.parametrize("shape, rank", [((30, 20), 3), ((20, 30), 1), ((64, 64), 8)])
def test_factorize(shape, rank):
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
  factors = gradients.factorize(jnp.asarray(matrix, jnp.float32), rank)
  np.testing.assert_allclose(factors.left @ factors.right.T, matrix, atol=1e-4)
  higher = matrix + 1e-3 * rng.normal(size=shape)
  assert gradients.factorize(jnp.asarray(higher, jnp.float32), rank) is None
  spoiled = gradients.factorize(jnp.asarray(matrix * np.nan, jnp.float32), rank)
  assert np.isnan(spoiled.left @ spoiled.right.T).all()
  assert gradients.factorize(jnp.zeros(shape), rank) is not None
  assert gradients.factorize(jnp.zeros(shape, jnp.bfloat16), rank) is None


def test_factors_of_a_lower_rank_are_filled_with_zeros():
  """Without dropout the gradient of a batch that holds one image twice has rank 1."""
  model = models.create("mlp", SHAPE, 5, 0.0, hidden_sizes=(16, 16))
  params = jax.jit(model.init)(jax.random.key(0))
  images = np.random.default_rng(0).uniform(size=(3, *SHAPE)).astype(np.float32)
  prepared = []
  for pair, rank in (((0, 0), 1), ((1, 2), 2)):
    labels = np.array([1, 1])
    observation, _ = observe(jax.random.key(0), model, params, images[list(pair)], labels)
    prepared.append(gradients.prepare(model, observation))
    left, right = prepared[-1].target.kernels[("hidden_0",)]
    assert left.shape[1] == right.shape[1] == 2
    assert np.sum(np.any(left != 0, axis=0)) == rank
    kernel = observation.gradient["hidden_0"]["kernel"]
    np.testing.assert_allclose(left @ right.T, kernel, atol=1e-5 * np.abs(kernel).max())
  assert shapes_of(prepared[0]) == shapes_of(prepared[1])


def test_only_the_class_token_of_the_last_block_has_a_gradient():
  model = models.create("vit", SHAPE, 5, 0.25, **VIT | {"depth": 2})
  rows = {layer.path[0]: layer.rows for layer in model.dense(2) if layer.path[-1] == "mlp_hidden"}
  assert rows == {"block_0": (10,), "block_1": (2,)}
  assert model.mask_shapes(2)["block_1/hidden_dropout"] == (2, 5, 24)
  assert model.mask_shapes(2)["block_1/attention_dropout"] == (2, 2, 5, 5)


def test_forward_derivatives_and_second_ones_are_right_too():
  """Those of the products that are written by hand in gradients."""
  with jax.enable_x64(True):
    model, observation, images, labels = _case(MODELS["mlp"](), 2)
    _, compare = _prepared(model, observation, labels, "factored")
    masks = models.expected_masks(model, 2, jnp.float64)
    formed = _formed(model, observation, labels)
    directions = jax.random.normal(jax.random.key(5), (2, *images.shape), jnp.float64)

    def second(compare):
      def along(direction):
        return lambda x: jax.jvp(lambda y: compare(masks, y)[:2], (x,), (direction,))[1]

      return jax.jvp(along(directions[0]), (images,), (directions[1],))

    _assert_close(second(compare), second(formed))


def test_the_squared_distance_is_taken_of_formed_gradients():
  assert gradients.suits("squared_l2", "auto") == "formed"
  assert gradients.suits("cosine", "auto") == "auto"
  assert gradients.suits("squared_l2", "factored") == "factored"


@pytest.mark.parametrize("method", ["formed", "factored"])
def test_no_distance_sees_a_factor_of_the_gradient(method):
  with jax.enable_x64(True):
    model, observation, images, labels = _case(MODELS["mlp"](), 2)
    masks = models.expected_masks(model, 2, jnp.float64)
    found = []
    for factor in (1, 4, 0.1, -1):
      scaled = jax.tree.map(lambda x: factor * x, observation.gradient)  # noqa: B023
      target, compare = _prepared(
        model, dataclasses.replace(observation, gradient=scaled), labels, method
      )
      comparison = compare(masks, images)
      found.append([distance(comparison) for distance in gradients.DISTANCES.values()])
    np.testing.assert_allclose(found[1:3], [found[0]] * 2, rtol=1e-6)
    # But a gradient of the opposite sign is as far on the other side.
    np.testing.assert_allclose(found[3], 2 - np.array(found[0]), rtol=1e-6)
    nothing = gradients.Comparison(0.0, 0.0, 1.0, 1.0)
    assert gradients.squared_l2_distance(nothing) == 1
