"""Networks with batch statistics, in each mode, and what is not seen through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_model_refusals import SpectrallyNormed

from jaxdia import attacks, gradients, models
from jaxdia.client import CROSS_ENTROPY, client_gradient, observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.core.errors import InputError

SHAPE = (6, 6, 1)
LABELS = jnp.array([0, 3, 4])


class Net(nn.Module):
  """A dense layer, BatchNorm, dropout, a dense layer."""

  frozen: bool = False

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(24, name="hidden")(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=self.frozen or not train, name="norm")(x)
    x = nn.Dropout(0.3)(nn.sigmoid(x), deterministic=not train)
    return nn.Dense(5, name="classifier")(x)


class Pooled(nn.Module):
  """A convolutional network with BatchNorm and max-pooling."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(6, (3, 3))(x))
    x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
    x = nn.Dropout(0.3)(x.reshape(len(x), -1), deterministic=not train)
    return nn.Dense(5)(x)


def _averages(module, seed=0):
  """Running averages as after some training."""
  stats = module.init(jax.random.key(0), jnp.ones((1, *SHAPE)), train=False)["batch_stats"]
  rng = np.random.default_rng(seed)
  return {
    "batch_stats": jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32), stats)
  }


def _images(count=3, seed=1):
  return np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(np.float32)


CASES = {
  "batch": (Net(), None),
  "batch_with_averages": (Net(), _averages(Net())),
  "frozen": (Net(frozen=True), _averages(Net())),
  "frozen_as_initialised": (Net(frozen=True), None),
  "max_pool": (Pooled(), _averages(Pooled())),
}


@pytest.mark.parametrize("module, variables", CASES.values(), ids=CASES)
def test_the_gradient_is_that_of_the_plain_module(module, variables):
  model = models.from_flax(module, SHAPE, variables=variables)
  params, images = model.init(jax.random.key(0)), jnp.asarray(_images())
  rngs = {"dropout": jax.random.key(5)}
  masks = models.read_masks(model, params, images, rngs)
  stats = variables or {
    "batch_stats": module.init(jax.random.key(3), images, train=False)["batch_stats"]
  }

  def loss(params):
    logits, _ = module.apply({"params": params, **stats}, images, rngs=rngs, mutable="batch_stats")
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), LABELS])

  expected = jax.grad(loss)(params)
  actual = client_gradient(model, params, masks, images, LABELS)
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-6), actual, expected)
  # Factored, as formed, and at the truth nothing is left.
  seen, secret = observe(jax.random.key(2), model, params, images, LABELS)
  for method in ("formed", "factored"):
    target = gradients.prepare(model, seen, method).target
    found = gradients.compare(model, params, target, secret.masks, images, LABELS, CROSS_ENTROPY)
    assert gradients.cosine_distance(found) < 1e-5


def test_without_masks_the_mode_of_batch_norm_is_the_clients():
  images = jnp.asarray(_images())
  for frozen in (True, False):
    module, variables = Net(frozen), _averages(Net())
    model = models.from_flax(module, SHAPE, variables=variables)
    params = model.init(jax.random.key(0))
    hidden = images.reshape(3, -1) @ params["hidden"]["kernel"]
    averages = variables["batch_stats"]["norm"]
    mean, var = averages["mean"], averages["var"]
    if not frozen:
      mean, var = jnp.mean(hidden, axis=0), jnp.var(hidden, axis=0)
    features = jax.nn.sigmoid((hidden - mean) / jnp.sqrt(var + 1e-5))
    expected = features @ params["classifier"]["kernel"]
    np.testing.assert_allclose(model.apply(params, None, images), expected, 1e-4, 1e-5)


def test_a_client_in_evaluation_mode_has_no_dropout_and_takes_the_averages():
  module, variables, images = Net(), _averages(Net()), jnp.asarray(_images())
  told = {"variables": variables, "call_kwargs": {"train": False}}
  training = models.from_flax(module, SHAPE, variables=variables)
  params = training.init(jax.random.key(0))
  expected = module.apply({"params": params, **variables}, images, train=False)
  for model in (models.from_flax(module, SHAPE, **told), models.evaluation_mode(training)):
    assert not model.sites
    np.testing.assert_allclose(model.apply(params, {}, images), expected, 1e-5, 1e-6)


def test_models_with_equal_averages_are_equal():
  first, second, third = (
    models.from_flax(Net(), SHAPE, variables=_averages(Net(), seed)) for seed in (0, 0, 1)
  )
  assert first == second and hash(first) == hash(second) and first != third
  initial = models.from_flax(Net(), SHAPE)
  assert initial == models.from_flax(Net(), SHAPE) and initial not in (first, third)
  assert first.network.constants() == ("batch_stats.norm.mean", "batch_stats.norm.var")


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda v: {}, "lack the leaf 'batch_stats/norm/mean', which Net has"),
    (lambda v: v | {"cache": {"x": np.ones(3)}}, "have the leaf 'cache/x', which Net lacks"),
    (lambda v: v["batch_stats"], "have the leaf 'norm/mean', which"),
    (
      lambda v: {"batch_stats": jax.tree.map(lambda x: x[:3], v["batch_stats"])},
      r"'batch_stats/norm/mean' of variables has shape \(3,\); expected \(24,\)",
    ),
  ],
)
def test_variables_that_do_not_fit_are_refused(change, message):
  with pytest.raises(InputError, match=message):
    models.from_flax(Net(), SHAPE, variables=change(_averages(Net())))


def test_the_whole_of_a_modules_variables_may_be_given():
  variables = Net().init(jax.random.key(4), jnp.ones((1, *SHAPE)), train=False)
  model = models.from_flax(Net(), SHAPE, variables=variables)
  assert set(model.network.collections.tree) == {"batch_stats"}


def test_spectral_norm_works_with_the_vectors_of_the_client():
  module, images = SpectrallyNormed(), jnp.asarray(_images())
  variables = module.init(jax.random.key(0), images)
  model = models.from_flax(module, SHAPE, variables=variables)

  def loss(params):
    stats = {"batch_stats": variables["batch_stats"]}
    logits, _ = module.apply({"params": params, **stats}, images, mutable="batch_stats")
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 1])

  actual = client_gradient(model, variables["params"], {}, images, jnp.ones(3, int))
  expected = jax.grad(loss)(variables["params"])
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-6), actual, expected)


def test_new_running_averages_tell_the_moments_of_the_batch():
  module, images = Pooled(), jnp.asarray(_images(8))
  variables = module.init(jax.random.key(0), images, train=False)
  new = module.apply(variables, images, rngs={"dropout": jax.random.key(1)}, mutable="batch_stats")
  old, new = variables["batch_stats"], new[1]["batch_stats"]
  moments = models.batch_moments(old, new, momentum=0.9)["BatchNorm_0"]
  x = nn.Conv(6, (3, 3)).apply({"params": variables["params"]["Conv_0"]}, images)
  np.testing.assert_allclose(moments["mean"], jnp.mean(x, (0, 1, 2)), atol=1e-5)
  np.testing.assert_allclose(moments["var"], jnp.var(x, (0, 1, 2)), atol=1e-5)
  with pytest.raises(InputError, match="momentum is 1; expected"):
    models.batch_moments(old, new, momentum=1)
  with pytest.raises(InputError, match="the new running averages have the leaf"):
    models.batch_moments({}, new)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_closed_forms_know_that_a_batch_is_normalised_together(frozen, batch_size):
  model = models.from_flax(Net(frozen), SHAPE, variables=_averages(Net()))
  params, images = model.init(jax.random.key(0)), _images(batch_size)
  seen, secret = observe(jax.random.key(2), model, params, images, LABELS[:batch_size])
  recovery = recover(jax.random.key(3), model, seen)
  exact = recovery.parts.verdict == Verdict.EXACT
  if frozen:  # then it is a function of single entries like any other
    order = [np.argmin([np.abs(x - y).max() for y in images]) for x in recovery.parts.images]
    assert exact.all(), recovery.reason
    np.testing.assert_allclose(recovery.parts.images, images[order], atol=1e-4)
  else:
    assert not exact.any() and "normalised together (BatchNorm)" in recovery.reason


@pytest.mark.parametrize("name", ["dia", "ig"])
def test_attacks_run_on_batch_norm_and_max_pooling(name):
  model = models.from_flax(Pooled(), SHAPE, variables=_averages(Pooled()))
  params = model.init(jax.random.key(0))
  seen, _ = observe(jax.random.key(2), model, params, _images(2), [0, 3])
  short, long = (
    attacks.solve(
      jax.random.key(0), attacks.create(name, model, max_iterations=count, patience=500), seen
    ).best.distance
    for count in (1, 100)
  )
  assert long < 0.5 * short


def _of_several(params, drop, images):
  """As PyTorch's BatchNorm over a single value a channel, which takes no single image."""
  x = images.reshape(len(images), -1) @ params["hidden"]["kernel"]
  if len(x) == 1:
    raise ValueError("Expected more than 1 value per channel when training")
  x = (x - jnp.mean(x, axis=0)) / jnp.sqrt(jnp.var(x, axis=0) + 1e-5)
  return drop("dropout", jax.nn.relu(x)) @ params["out"]["kernel"]


def test_a_network_may_refuse_single_images():
  def init(key):
    shapes = {"hidden": (36, 12), "out": (12, 5)}
    return {name: {"kernel": jax.random.normal(key, shape)} for name, shape in shapes.items()}

  model = models.from_functions(init, _of_several, SHAPE, {"dropout": 0.5})
  params, images = model.init(jax.random.key(0)), _images(2)
  assert models.batch_axes(model) == {"dropout": 0} and model.convolutions == ()
  seen, _ = observe(jax.random.key(2), model, params, images, [0, 3])
  state = attacks.solve(jax.random.key(0), attacks.dia(model, max_iterations=2), seen)
  assert np.isfinite(state.best.distance)
  recovery = recover(jax.random.key(3), model, seen)
  assert "cannot be computed on one image alone (Expected more than 1 value" in recovery.reason
  with pytest.raises(InputError, match=r"ended in a ValueError: Expected more than 1 .* 1 image\("):
    observe(jax.random.key(2), model, params, images[:1], [0])
