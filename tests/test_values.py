"""Models and attacks are trees of numbers, equal by value, and compiled once for all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations, make_victims
from flax import linen as nn

from jaxdia import attacks, models
from jaxdia.attacks import AttackSettings
from jaxdia.client import client_loss, observe
from jaxdia.core.errors import InputError


def _make(rate=0.25, **options):
  return models.create("mlp", (6, 6, 1), 5, rate, **{"hidden_sizes": (24, 24)} | options)


def test_equal_arguments_make_equal_models():
  assert _make() == _make() and hash(_make()) == hash(_make())
  assert _make() != _make(0.5) and _make() != _make(use_bias=True)
  with np.errstate(all="raise"):
    assert _make(np.float32(0.5), hidden_sizes=[np.int64(24), 24]) == _make(0.5)


def test_one_program_serves_equal_models_and_all_rates():
  traced = []

  @jax.jit
  def logits(model, params, images):
    traced.append(model.network)
    return model.apply(params, models.sample_masks(jax.random.key(0), model, 2), images)

  params = _make().init(jax.random.key(1))
  images = jnp.ones((2, 6, 6, 1))
  results = [logits(_make(rate), params, images) for rate in (0.25, 0.25, 0.5, 0.9)]
  assert len(traced) == 1
  np.testing.assert_array_equal(results[0], results[1])
  assert not np.allclose(results[0], results[2])
  logits(_make(0.0), params, images)  # no site: another program
  assert len(traced) == 2


def test_a_second_equal_model_and_attack_compile_nothing():
  def solve():
    model = _make(hidden_sizes=(20,))
    _, observations, _ = make_victims(model, 1, batch_size=2)
    return attacks.solve(
      jax.random.key(0), attacks.hybrid(model, max_iterations=3), observations[0]
    )

  first = solve()
  with compilations() as compiled:
    again = solve()
  assert not compiled
  jax.tree.map(np.testing.assert_array_equal, first.best, again.best)


def test_numbers_are_leaves_and_the_rest_is_structure(model):
  attack = attacks.dia(model)
  assert attack == attacks.dia(_make()) and attack != attacks.dia(model, tv_weight=0)
  numbers = {"image_std": 0, "learning_rate": 0.2, "tv_weight": 0, "mask_weight": 1}
  numbers |= {"tolerance": 0, "patience": 7}
  assert attacks.same_program(attack, attacks.dia(_make(0.7), **numbers, plateau_patience=3))
  for other in ({"masks": "expected"}, {"max_iterations": 3}, {"round_masks_after": 0}):
    assert not attacks.same_program(attack, attacks.dia(model, **other))
  assert not attacks.same_program(attack, attacks.dia(_make(0.0)))
  assert not attacks.same_program(attack, attacks.hybrid(model, labels="given"))


def test_the_structure_of_settings_does_not_depend_on_their_values():
  for settings in (AttackSettings(), AttackSettings(feature_weight=0.0, round_masks_after=0)):
    zeros = jax.tree.map(lambda x: 0.0, settings)
    assert jax.tree.structure(zeros) == jax.tree.structure(settings)
    leaves, structure = jax.tree.flatten(settings)
    assert jax.tree.unflatten(structure, leaves) == settings


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, int])
def test_numbers_of_any_kind_are_numbers(model, kind):
  one = attacks.dia(model, learning_rate=kind(1), patience=np.int64(9), tv_weight=kind(0))
  assert one == attacks.dia(model, learning_rate=1.0, patience=9, tv_weight=0.0)
  assert jax.tree.structure(one) == jax.tree.structure(attacks.dia(model))


def test_rates_can_be_replaced(model):
  steep = dataclasses.replace(model, rates={"dropout_1": 0.5, "dropout_0": 0.1})
  assert steep.sites == (models.Site("dropout_0", 0.1), models.Site("dropout_1", 0.5))
  with pytest.raises(InputError, match="rate of site 'dropout_0' is 1.0"):
    dataclasses.replace(model, rates=model.rates | {"dropout_0": 1.0})
  with pytest.raises(InputError, match="rates are given for the sites"):
    dataclasses.replace(model, rates={"dropout_0": 0.5})


def test_a_network_at_other_rates_is_that_of_a_module_with_them():
  built = models.create("lenet", (12, 12, 1), 4, 0.3)
  moved = dataclasses.replace(models.create("lenet", (12, 12, 1), 4, 0.6), rates=built.rates)
  own = models.from_flax(built.network.module.clone(dropout_rate=0.3), (12, 12, 1))
  params = built.init(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (2, 12, 12, 1))
  for key in range(2):
    results = [
      observe(jax.random.key(key), m, params, images, np.array([0, 3])) for m in (built, moved, own)
    ]
    for _, secret in results[1:]:
      jax.tree.map(np.testing.assert_array_equal, secret, results[0][1])
    for seen, _ in results[1:]:
      jax.tree.map(np.testing.assert_array_equal, seen.gradient, results[0][0].gradient)


def test_without_masks_a_model_is_in_evaluation_mode_and_has_no_rates(model):
  params, images = model.init(jax.random.key(0)), jnp.ones((2, 6, 6, 1))
  evaluated = model.apply(params, None, images)
  expected = model.apply(params, models.expected_masks(model, 2), images)
  np.testing.assert_array_equal(evaluated, expected)

  def with_rates(rates):
    return dataclasses.replace(model, rates=rates).apply(params, None, images).sum()

  slopes = jax.grad(with_rates)({site: jnp.float32(rate) for site, rate in model.rates.items()})
  assert not any(np.any(slope) for slope in slopes.values())


class Unhashable(nn.Module):
  sizes: list
  scale: np.ndarray

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(self.sizes[0])(x.reshape(len(x), -1) * self.scale)
    return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=not train))


def test_modules_with_attributes_that_have_no_hash_work():
  one, other = (models.from_flax(Unhashable([4], np.ones(4)), (2, 2, 1)) for _ in range(2))
  assert one == one and one != other  # arrays do not compare, so they may differ
  params = one.init(jax.random.key(0))
  assert jax.jit(one.apply)(params, None, jnp.ones((1, 2, 2, 1))).shape == (1, 3)


# Plain functions.


def _init(key):
  return {"w": jax.random.normal(key, (4, 6)), "v": jnp.ones((6, 3))}


def _apply(params, drop, images):
  hidden = drop("hidden", jnp.tanh(images.reshape(len(images), -1) @ params["w"]))
  return drop("shared", hidden, mask_shape=(1, 6)) @ params["v"]


RATES = {"hidden": 0.5, "shared": 0.25}


def test_plain_functions_are_models_too():
  model = models.from_functions(_init, _apply, (2, 2, 1), RATES)
  assert model == models.from_functions(_init, _apply, (2, 2, 1), RATES)
  assert model.mask_shapes(2) == {"hidden": (2, 6), "shared": (1, 6)} and model.num_classes == 3
  masks = models.sample_masks(jax.random.key(0), model, 2)
  params = model.init(jax.random.key(1))
  images = jax.random.normal(jax.random.key(2), (2, 2, 2, 1))
  loss = client_loss(model, params, masks, images, jnp.array([0, 1]))
  np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)  # equal columns of v: equal logits
  by_hand = jnp.tanh(images.reshape(2, -1) @ params["w"]) * masks["hidden"] / 0.5
  by_hand = (by_hand * masks["shared"] / 0.75) @ params["v"]
  np.testing.assert_allclose(model.apply(params, masks, images), by_hand, rtol=1e-5)
  _, observations, _ = make_victims(model, 1)
  state = attacks.solve(jax.random.key(0), attacks.dia(model, max_iterations=5), observations[0])
  assert np.isfinite(state.best.objective)


def _draws(params, drop, images):
  noise = jax.random.normal(jax.random.key(0), (len(images), 6))
  return drop("hidden", noise) @ params["v"]


def _twice(params, drop, images):
  return _apply(params, lambda site, x, **_: drop("hidden", x), images)


def _unused(params, drop, images):
  drop("hidden", images)
  return _apply(params, lambda site, x, **_: x, images)


def _turned(params, drop, images):
  return _apply(params, lambda site, x, **_: drop(x, site), images)


def _narrow(params, drop, images):
  hidden = jnp.tanh(images.reshape(len(images), -1) @ params["w"])
  return drop("hidden", hidden, mask_shape=(5,)) @ params["v"]


@pytest.mark.parametrize(
  "apply, rates, message",
  [
    (_apply, {"hiden": 0.5, "shared": 0.5}, "rates are given for the sites .*'hiden'"),
    (_apply, {"hidden": 0.5}, "rates are given for the sites"),
    (_apply, {"hidden": 50, "shared": 0.5}, "rate of site 'hidden' is 50; expected a number in"),
    (_draws, {"hidden": 0.5}, "_draws draws 12 random numbers for 2 images besides"),
    (_twice, {"hidden": 0.5}, "_twice drops at the site 'hidden' twice"),
    (_apply, [0.5], "rates is .0.5.; expected a dict"),
    (_unused, {"hidden": 0.5}, "do not depend on the mask of site 'hidden'"),
    (_turned, {"hidden": 0.5}, "calls drop with .* as its site"),
    (_narrow, {"hidden": 0.5}, r"mask_shape of site 'hidden' is \(5,\); expected \(2, 6\)"),
    (lambda drop, params, images: _apply(params, drop, images), {}, "apply.* ended in a TypeError"),
    (lambda params, drop, images: np.asarray(images), {}, "apply.* ended in a Tracer"),
    (lambda params, drop, images: images, {}, "expected one array of logits"),
    (lambda params, drop, images: images.reshape(len(images), -1)[:, :1], {}, "a single logit"),
  ],
)
def test_slips_in_plain_functions_are_refused_in_a_line(apply, rates, message):
  with pytest.raises(InputError, match=message):
    models.from_functions(_init, apply, (2, 2, 1), rates)


@pytest.mark.parametrize(
  "init, message",
  [
    (lambda: {}, "init.key. ended in a TypeError"),
    (lambda key: None, "returns no array at all"),
    (lambda key: {"w": jnp.ones((4, 6), int), "v": jnp.ones((6, 3))}, "leaf 'w' .* is int32"),
  ],
)
def test_params_that_are_none_are_refused_in_a_line(init, message):
  with pytest.raises(InputError, match=message):
    models.from_functions(init, _apply, (2, 2, 1), RATES)


@pytest.mark.parametrize("kind", [list, tuple])
def test_params_may_be_a_list_or_a_tuple(kind):
  def apply(params, drop, images):
    return _apply(dict(zip("wv", params, strict=True)), drop, images)

  model = models.from_functions(
    lambda key: kind(_init(key)[k] for k in "wv"), apply, (2, 2, 1), RATES
  )
  _, observations, _ = make_victims(model, 1)
  state = attacks.solve(jax.random.key(0), attacks.dia(model, max_iterations=5), observations[0])
  assert np.isfinite(state.best.objective)
