"""The image that a first dense layer with a bias tells, whatever comes after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdia import models
from jaxdia.client import Observation, observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.closed_form.first_layer import FirstLayer, find_first_layer, read_inputs
from jaxdia.closed_form.structure import Input

SHAPE = (6, 6, 1)


class Net(nn.Module):
  """A dense layer, and after it what is unusual.

  Attributes:
    kind: of what comes after it, or before.
  """

  kind: str

  @nn.compact
  def __call__(self, x, train=True):
    if self.kind == "cast":
      x = ((x - 0.5) / 0.3).astype(jnp.float32)
    x = x.reshape(x.shape[0], -1)
    if self.kind == "permuted":
      x = jnp.concatenate([2 * x[:, ::-1] - 0.5, jnp.ones((len(x), 3))], axis=1)
    if self.kind == "dropped":
      x = nn.Dropout(0.25)(x, deterministic=not train)
    dense = nn.remat(nn.Dense) if self.kind == "remat" else nn.Dense
    x = dense(48, name="first")(x)
    if self.kind == "residual":
      x = x + nn.Dense(48)(nn.relu(x))
    if self.kind == "cast":
      x = nn.LayerNorm()(x)
    if self.kind == "attention":
      y = x.reshape(len(x), 6, 8)
      x = nn.MultiHeadAttention(2)(y, deterministic=True).reshape(len(x), -1)
    if self.kind == "convolution":
      x = nn.Conv(4, (3, 3))(x.reshape(len(x), 4, 4, 3)).reshape(len(x), -1)
    x = nn.Dropout(0.5)(nn.relu(x), deterministic=not train)
    return nn.Dense(5)(x) * (2 if self.kind == "scaled" else 1)


def _victim(kind, seed=0):
  model = models.from_flax(Net(kind), SHAPE)
  image = np.random.default_rng(seed).uniform(size=(1, *SHAPE)).astype(np.float32)
  return model, *observe(
    jax.random.key(seed), model, model.init(jax.random.key(1)), image, [3], reveal_labels=False
  )


def test_the_image_is_read_where_no_label_can_be():
  model, observation, secret = _victim("scaled")
  assert model.classifier is None
  recovery = recover(jax.random.key(0), model, observation)
  assert recovery.parts.verdict[0] == Verdict.EXACT and not recovery.parts.known_labels.any()
  np.testing.assert_allclose(recovery.parts.images, secret.images, atol=1e-5)
  granted = dataclasses.replace(observation, labels=[3])
  parts = recover(jax.random.key(0), model, granted).parts
  assert parts.known_labels.all() and list(parts.labels) == [3]


def _changed(observation, change):
  return dataclasses.replace(observation, gradient=jax.tree.map(change, observation.gradient))


@pytest.mark.parametrize(
  "kind", ["relu", "residual", "attention", "convolution", "remat", "permuted", "cast"]
)
def test_the_image_is_read_whatever_comes_after(kind):
  model, observation, secret = _victim(kind)
  recovery = recover(jax.random.key(0), model, observation)
  assert recovery.parts.verdict[0] == Verdict.EXACT and recovery.reason == "", recovery.summary()
  np.testing.assert_allclose(recovery.parts.images, secret.images, atol=1e-5)
  assert recovery.residual[0] < 1e-5


def _clipped(x):
  return np.clip(x, -0.02, 0.02)


def _pruned(x):
  return np.where(np.abs(x) < np.quantile(np.abs(x), 0.5), 0, x)


@pytest.mark.parametrize("change", [_clipped, _pruned, lambda x: 7 * x, lambda x: 1e-6 * x])
def test_what_changes_single_entries_or_all_alike_does_no_harm(change):
  model, observation, secret = _victim("relu")
  recovery = recover(
    jax.random.key(0), model, _changed(observation, lambda x: change(np.asarray(x)))
  )
  found = np.abs(recovery.parts.images - secret.images).ravel()
  # A pixel near 0 may have lost all of its entries.
  assert np.median(found) < 1e-5 and found.max() < 0.2
  assert recovery.parts.verdict[0] == (Verdict.EXACT if found.max() < 1e-4 else 1)


def test_the_error_bar_is_as_large_as_the_error():
  model, observation, secret = _victim("relu")
  rng = np.random.default_rng(0)
  kernel = np.asarray(observation.gradient["first"]["kernel"])
  size = 0.05 * kernel.std()

  def noised(x):
    return x + (size * rng.standard_normal(x.shape) if x.shape == kernel.shape else 0)

  recovery = recover(jax.random.key(0), model, _changed(observation, noised))
  error = np.sqrt(np.mean(np.square(recovery.parts.images - secret.images)))
  assert recovery.parts.verdict[0] == Verdict.APPROXIMATE
  assert 0.5 * error < recovery.error[0] < 2 * error and "standard error" in recovery.reason


def test_pixels_that_were_dropped_are_not_called_known():
  model, observation, secret = _victim("dropped")
  site = find_first_layer(model.network).source.site
  recovery = recover(jax.random.key(0), model, observation)
  kept = np.asarray(secret.masks[site]).reshape(-1) > 0
  found, true = (np.ravel(x) for x in (recovery.parts.images, secret.images))
  np.testing.assert_allclose(found[kept], true[kept], atol=1e-5)
  assert np.all(found[~kept] == 0) and 0 < np.sum(~kept)
  assert recovery.parts.verdict[0] == Verdict.APPROXIMATE and "were dropped" in recovery.reason
  assert np.array_equal(recovery.parts.masks[site], secret.masks[site])
  assert recovery.parts.known_masks[site].all()


def test_a_gradient_of_two_images_is_no_image():
  model, observation, _ = _victim("relu")
  _, other, _ = _victim("relu", 4)
  both = jax.tree.map(jnp.add, observation.gradient, other.gradient)
  recovery = recover(jax.random.key(0), model, dataclasses.replace(observation, gradient=both))
  assert recovery.parts.verdict[0] != Verdict.EXACT and recovery.residual[0] > 1e-2


@pytest.mark.parametrize("kind", ["bent", "features"])
def test_what_is_bent_a_little_or_fed_with_features_is_no_first_layer(kind):
  def apply(params, drop, images):
    x = images.astype(jnp.float32).reshape(len(images), -1)
    x = x + 1e-3 * x**2 if kind == "bent" else x @ params["mix"]
    return drop("hidden", jnp.tanh(x @ params["w"] + params["b"])) @ params["v"]

  def init(key):
    shapes = {"w": (36, 40), "b": (40,), "v": (40, 5), "mix": (36, 36)}
    return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

  model = models.from_functions(init, apply, SHAPE, {"hidden": 0.5})
  assert find_first_layer(model.network) is None


def test_an_average_over_positions_or_a_layer_without_bias_is_no_first_layer():
  class Rows(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = nn.Dense(48)(x.reshape(len(x), 1, -1).repeat(2, axis=1) * jnp.array([[[1.0], [2.0]]]))
      return nn.Dense(5)(nn.gelu(x).mean(axis=1))

  assert find_first_layer(models.from_flax(Rows(), SHAPE).network) is None
  assert find_first_layer(models.create("mlp", SHAPE, 5, 0.5).network) is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_of_plain_functions_has_whatever_names_and_layout(turned):
  """As Haiku's `w` and `b`, or hand-written weights that are outputs x inputs."""
  size = int(np.prod(SHAPE))

  def init(key):
    w, v = jax.random.normal(key, (size, 24)) / 8, jax.random.normal(key, (24, 5))
    return {"linear": {"w": w.T if turned else w, "b": jnp.zeros(24)}, "out": {"w": v}}

  def apply(params, drop, images):
    w = params["linear"]["w"].T if turned else params["linear"]["w"]
    hidden = images.reshape(len(images), -1) @ w + params["linear"]["b"]
    return drop("hidden", jnp.maximum(hidden, 0)) @ params["out"]["w"]

  model = models.from_functions(init, apply, SHAPE, {"hidden": 0.5})
  images = np.random.default_rng(0).uniform(size=(1, *SHAPE))
  params = model.init(jax.random.key(0))
  observation, secret = observe(jax.random.key(1), model, params, images, np.array([3]))
  layer = find_first_layer(model.network)
  assert (layer.name, layer.turned) == ("linear", turned)
  recovery = recover(jax.random.key(0), model, observation)
  assert recovery.parts.verdict[0] == Verdict.EXACT, recovery.reason
  np.testing.assert_allclose(recovery.parts.images, secret.images, atol=1e-5)


@pytest.mark.parametrize(
  "kernel, bias, name",
  [
    (("net", "linear", "w"), ("net", "linear", "b"), "net/linear"),
    (("w", "0"), ("b", "0"), "w/0"),  # lists of kernels and of biases have no place in common
  ],
)
def test_a_layer_is_called_by_what_its_arrays_lie_in(kernel, bias, name):
  nothing = np.zeros(0)
  layer = FirstLayer(kernel, bias, False, nothing, nothing, nothing, Input())
  assert layer.name == name


def test_inputs_are_read_from_float16_and_none_from_nothing():
  rng = np.random.default_rng(0)
  inputs, deltas = rng.standard_normal(30), rng.standard_normal(40)
  kernel = np.outer(inputs, deltas).astype(np.float16).astype(float)
  read = read_inputs(kernel, deltas.astype(np.float16).astype(float))
  np.testing.assert_allclose(read.values, inputs, rtol=1e-3)
  assert 1e-5 < read.residual < 1e-3 and np.all(read.errors < 1e-3 * np.abs(inputs).max())
  assert read_inputs(0 * kernel, 0 * deltas).residual == np.inf
  assert np.all(read_inputs(0 * kernel, deltas).values == 0)


def test_entries_that_are_equal_are_not_thrown_away_as_clipped():
  inputs, deltas = np.array([2.0] * 5 + [1.0]), np.array([0.0, 3.0, 0.0])
  read = read_inputs(np.outer(inputs, deltas), deltas)
  np.testing.assert_allclose(read.values, inputs)
  assert read.residual < 1e-12
  # Where all entries of an input were clipped, it is not known, and not called so.
  deltas = np.array([1.0, 2.0, 3.0])
  read = read_inputs(np.minimum(np.outer(inputs, deltas), 1.5), deltas)
  assert read.residual > 0.1 and np.all(read.errors[:5] > 0.1)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 0.995])
@pytest.mark.parametrize("number", [1, 2])
def test_what_pruning_left_over_is_not_called_certain(number, share):
  rng = np.random.default_rng(0)
  inputs, deltas = rng.uniform(0.1, 1, (number, 36)), rng.standard_normal((number, 48))
  kernel, bias = inputs.T @ deltas, deltas.sum(axis=0)
  limit = np.quantile(np.abs(kernel), share)
  read = read_inputs(*(np.where(np.abs(x) < limit, 0, x) for x in (kernel, bias)))
  wrong = np.abs(read.values - inputs[0]).max() > 1e-3
  error = np.linalg.norm(read.errors) / np.linalg.norm(read.values)
  assert wrong == (not read.checked or max(read.residual, error) > 1e-3)


def test_a_layer_whose_gradient_was_not_sent_tells_nothing():
  model, observation, _ = _victim("residual")
  first = {"kernel": observation.gradient["first"]["kernel"], "bias": None}
  partly = Observation(
    observation.params, observation.gradient | {"first": first}, None, [0.0], [1.0], 1
  )
  recovery = recover(jax.random.key(0), model, partly)
  assert recovery.parts.verdict[0] == Verdict.NOT_APPLICABLE and recovery.reason
