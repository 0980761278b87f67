"""Weights before and after a step, differences and gradients of other optimizers' making."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from update_cases import assert_same, random_like, small

from jaxdia import updates
from jaxdia.core.errors import InputError

MODEL, PARAMS = small()
GRADIENT = random_like(PARAMS, seed=1)


def train(optimizer, params=PARAMS, gradients=(GRADIENT,)):
  """Returns the weights after steps with these gradients."""
  state = optimizer.init(params)
  for gradient in gradients:
    updates_, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates_)
  return jax.tree.map(np.asarray, params)


def difference(after, before=PARAMS):
  return jax.tree.map(lambda a, b: a - b, after, before)


def error(tree, truth=GRADIENT):
  """Returns the norm of what differs, relative to that of the truth."""
  norm = optax.tree.norm
  return float(norm(jax.tree.map(lambda a, b: a - b, tree, truth)) / norm(truth))


def test_a_step_of_sgd_is_undone_as_far_as_rounding_allows():
  after = train(optax.sgd(0.01))
  for update in (
    updates.from_weights(PARAMS, after, 0.01),
    updates.from_difference(PARAMS, difference(after), 0.01),
  ):
    assert error(update.gradient) < 1e-5
    # The rounding is not a bound, but the size of the error.
    assert 0.5 < update.rounding / error(update.gradient) < 2
    assert not update.frozen and not update.notes
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(update.gradient))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_the_rounding_of_half_precision_is_known_and_said(dtype):
  def cast(tree):
    return jax.tree.map(lambda x: x.astype(dtype), tree)

  after = train(optax.sgd(0.01))
  weights = updates.from_weights(PARAMS, cast(after), 0.01)
  changes = updates.from_difference(PARAMS, cast(difference(after)), 0.01)
  gradient = updates.from_gradient(PARAMS, cast(GRADIENT))
  for update in (weights, changes, gradient):
    assert 0.7 < update.rounding / error(update.gradient) < 1.5
  assert any("rounding" in note for note in weights.notes)
  assert weights.rounding > 10 * changes.rounding


def test_a_double_gradient_stays_one():
  before = random_like(PARAMS, dtype=np.float64)
  gradient = random_like(PARAMS, seed=1, dtype=np.float64)
  after = jax.tree.map(lambda w, g: w - 0.01 * g, before, gradient)
  update = updates.from_weights(before, after, 0.01)
  assert error(update.gradient, gradient) < 1e-12
  assert jax.tree.leaves(update.gradient)[0].dtype == np.float64


def test_weight_decay_is_taken_out():
  optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01))
  after = train(optimizer)
  assert error(updates.from_weights(PARAMS, after, 0.01).gradient) > 0.01
  assert error(updates.from_weights(PARAMS, after, 0.01, weight_decay=0.1).gradient) < 1e-5
  decayed = jax.tree.map(lambda g, w: g + 0.1 * w, GRADIENT, PARAMS)
  assert error(updates.from_gradient(PARAMS, decayed, weight_decay=0.1).gradient) < 1e-6


def test_several_steps_give_their_mean_and_say_so():
  gradients = [random_like(PARAMS, seed=i) for i in range(3)]
  mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *gradients)
  after = train(optax.sgd(0.01), gradients=gradients)
  update = updates.from_weights(PARAMS, after, 0.01, local_steps=3)
  assert error(update.gradient, mean) < 1e-5
  assert "mean of those of 3 steps" in update.notes[0]


def test_layers_that_did_not_change_are_frozen():
  after = train(optax.sgd(0.01))
  after["conv"] = PARAMS["conv"]
  for update in (
    updates.from_weights(PARAMS, after, 0.01, weight_decay=0.1),
    updates.from_difference(PARAMS, difference(after), 0.01),
    updates.from_gradient(PARAMS, difference(after)),
    # Not sent at all.
    updates.from_weights(PARAMS, {k: v for k, v in after.items() if k != "conv"}, 0.01),
    updates.from_weights(PARAMS, after | {"conv": {"kernel": None, "bias": None}}, 0.01),
  ):
    assert update.gradient["conv"] == {"kernel": None, "bias": None}
    assert set(update.frozen) == {"conv/kernel", "conv/bias"}
  assert "'conv/bias', 'conv/kernel'" in updates.from_weights(PARAMS, after, 0.01).notes[0]
  # An entry that did not change is no frozen layer.
  after["conv"] = {"kernel": PARAMS["conv"]["kernel"].copy(), "bias": PARAMS["conv"]["bias"]}
  after["conv"]["kernel"][0, 0, 0, 0] += 1
  assert updates.from_weights(PARAMS, after, 0.01).frozen == ("conv/bias",)


def test_values_that_are_not_finite_are_kept():
  after = train(optax.sgd(0.01))
  after["conv"]["bias"] = np.array([np.nan, np.inf, 0, 0, 0, 0], np.float32)
  update = updates.from_weights(PARAMS, after, 0.01)
  assert np.isnan(update.gradient["conv"]["bias"][0])
  assert np.isinf(update.gradient["conv"]["bias"][1])


def test_what_is_sent_makes_an_observation():
  from jaxdia.client import Observation

  update = updates.from_weights(PARAMS, train(optax.sgd(0.01)), 0.01)
  observation = Observation(PARAMS, update.gradient, None, [0.0], [1.0], 1)
  assert_same(observation.gradient, jax.tree.map(jnp.asarray, update.gradient))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"learning_rate": 0}, "learning_rate is 0; expected a number above 0"),
    ({"learning_rate": -1}, "learning_rate is -1"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"local_steps": 0}, "local_steps"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"after": PARAMS}, "zero in all entries"),
    ({"after": {"conv": {"bias": np.ones(3)}}}, "'conv/bias'"),
    ({"after": {"other": np.ones(3)}}, "no such leaf"),
  ],
)
def test_what_does_not_fit_is_refused(options, words):
  options = {"after": GRADIENT, "learning_rate": 0.1} | options
  with pytest.raises(InputError, match=words) as caught:
    updates.from_weights(PARAMS, **options)
  assert "\n" not in str(caught.value)
