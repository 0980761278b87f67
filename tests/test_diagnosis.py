"""What is wrong with an update is found, named, and put right where that is possible."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_victims

from jaxdia import audit, closed_form, models
from jaxdia.audit.diagnosis import diagnose
from jaxdia.client.losses import Loss
from jaxdia.core.errors import InputError

SIZE = 3


@pytest.fixture(scope="module")
def wide():
  """An MLP wide enough that the zeros of dropout cannot be chance."""
  return models.create("mlp", (6, 6, 1), 10, 0.5, hidden_sizes=(128, 128))


@pytest.fixture(scope="module")
def update(wide):
  """What a server sees of one batch, without its labels."""
  _, (observation,), _ = make_victims(wide, 1, SIZE, reveal_labels=False)
  return observation


def changed(observation, function):
  """Returns the observation with another gradient."""
  gradient = jax.tree.map(function, observation.gradient, observation.params)
  return dataclasses.replace(observation, gradient=gradient)


def findings(model, observation, **options):
  return {f.name: f for f in diagnose(model, observation, **options).findings}


def same(observation, other, tolerance=1e-6):
  pairs = zip(jax.tree.leaves(observation.gradient), jax.tree.leaves(other.gradient), strict=True)
  return all(np.allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()) for a, b in pairs)


def test_nothing_is_found_in_a_gradient_as_it_should_be(wide, update):
  diagnosis = diagnose(wide, update)
  assert diagnosis.findings == [] and not diagnosis.stops
  assert diagnosis.training is True
  assert same(diagnosis.observation, update, 0)


@pytest.mark.parametrize("size", [1, SIZE])
def test_the_opposite_sign_is_turned(size):
  model = models.create("mlp", (6, 6, 1), 10, 0.5, hidden_sizes=(64, 64), use_bias=True)
  for seed in range(3):
    _, (observation,), _ = make_victims(model, 1, size, seed=seed, reveal_labels=False)
    assert "sign" not in findings(model, observation)
    diagnosis = diagnose(model, changed(observation, lambda g, w: -g))
    assert [f.name for f in diagnosis.findings] == ["sign"]
    assert same(diagnosis.observation, observation, 0)


def test_without_a_bias_the_sign_is_found_by_trying_both(wide, update):
  turned = changed(update, lambda g, w: -g)
  assert findings(wide, turned) == {}
  outcome = audit.audit(jax.random.key(0), wide, turned, seconds=0, say=lambda text: None)
  assert [f.name for f in outcome.findings] == ["sign"]
  assert set(outcome.found.verdicts) == {"certain"}


def test_weight_decay_that_was_not_named_is_taken_out(wide, update):
  for decay in (1e-4, 5e-2):
    diagnosis = diagnose(wide, changed(update, lambda g, w, d=decay: g + d * w))
    assert [f.name for f in diagnosis.findings] == ["weight decay"]
    assert diagnosis.findings[0].value == pytest.approx(decay, rel=0.02)
    left = [
      np.linalg.norm(a - b)
      for a, b in zip(
        jax.tree.leaves(diagnosis.observation.gradient),
        jax.tree.leaves(update.gradient),
        strict=True,
      )
    ]
    added = [decay * np.linalg.norm(w) for w in jax.tree.leaves(update.params)]
    assert sum(left) < 0.02 * sum(added)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_few_bits_are_seen_in_values_of_many(wide, update, kind):
  half = changed(update, lambda g, w: g.astype(kind).astype("float32"))
  diagnosis = diagnose(wide, half)
  found = {f.name: f for f in diagnosis.findings}["half precision"]
  assert kind in found.text
  truth = [
    np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-3 * np.abs(b).max()))
    for a, b in zip(jax.tree.leaves(half.gradient), jax.tree.leaves(update.gradient), strict=True)
  ]
  # The level is that of the largest error that rounding made.
  assert 0.4 * max(truth) < diagnosis.rounding < 3 * max(truth)


def test_the_first_step_of_adam_is_no_gradient(wide, update):
  optimizer = optax.adam(1e-3)
  step, _ = optimizer.update(update.gradient, optimizer.init(update.params))
  sent = dataclasses.replace(update, gradient=jax.tree.map(lambda s: -s, step))
  diagnosis = diagnose(wide, sent)
  assert diagnosis.stops and "Adam" in findings(wide, sent)["adam"].text
  outcome = audit.audit(jax.random.key(0), wide, sent, say=lambda text: None)
  assert outcome.found is None and outcome.attempts == []


def test_momentum_and_several_steps_show_in_the_rank(wide, update):
  _, others, _ = make_victims(wide, 2, SIZE, seed=0, reveal_labels=False)
  mixed = dataclasses.replace(
    others[0],
    gradient=jax.tree.map(lambda a, b: a + 0.9 * b, others[0].gradient, others[1].gradient),
  )
  found = findings(wide, mixed)
  assert found["several steps"].value == 2 * SIZE
  assert "at least 2 steps" in found["several steps"].text and "momentum" in (
    found["several steps"].text
  )
  assert "several steps" not in findings(wide, others[0])


def test_noise_is_told_from_several_steps(wide, update):
  key = jax.random.key(0)
  noisy = changed(update, lambda g, w: g + 1e-3 * jax.random.normal(key, g.shape))
  found = findings(wide, noisy)
  assert "noise" in found and "several steps" not in found


def test_a_layer_without_information_is_left_out(wide, update):
  first, *_ = sorted(update.gradient)
  bad = jax.tree.map(lambda leaf: leaf, update.gradient)
  for value, name in ((0.0, "zero layer"), (jnp.nan, "not finite")):
    bad[first]["kernel"] = jnp.full_like(update.gradient[first]["kernel"], value)
    diagnosis = diagnose(wide, dataclasses.replace(update, gradient=bad))
    found = {f.name: f for f in diagnosis.findings}
    assert f"{first}/kernel" in found[name].text
    assert diagnosis.observation.gradient[first]["kernel"] is None
    assert len(jax.tree.leaves(diagnosis.observation.gradient)) == len(bad) - 1
  frozen = {**update.gradient, first: None}
  found = findings(wide, dataclasses.replace(update, gradient=frozen))
  assert found["frozen layer"].effect == "noted"
  for value in (0.0, jnp.nan):
    empty = changed(update, lambda g, w, v=value: jnp.full_like(g, v))
    with pytest.raises(InputError, match="zero or not finite in every layer"):
      diagnose(wide, empty)


def test_evaluation_mode_is_seen_where_dropout_would_have_shown(wide):
  still = models.evaluation_mode(wide)
  _, (observation,), _ = make_victims(still, 1, SIZE, reveal_labels=False)
  diagnosis = diagnose(wide, observation)
  assert diagnosis.training is False
  assert [f.name for f in diagnosis.findings] == ["evaluation mode"]


def test_training_mode_is_seen_where_it_was_denied(wide, update):
  outcome = audit.audit(
    jax.random.key(0), wide, update, training=False, seconds=0, say=lambda text: None
  )
  assert "training mode" in [f.name for f in outcome.findings]
  assert set(outcome.found.verdicts) == {"certain"}


def test_a_factor_is_found_and_explained(wide, update):
  summed = changed(update, lambda g, w: SIZE * g)
  outcome = audit.audit(jax.random.key(0), wide, summed, seconds=0, say=lambda text: None)
  assert set(outcome.found.verdicts) == {"certain"}
  (factor,) = [f for f in outcome.findings if f.name == "factor"]
  assert factor.value == pytest.approx(SIZE, rel=1e-3) and "summed" in factor.text


def test_other_losses_are_not_judged_by_the_marks_of_the_cross_entropy(wide):
  loss = Loss("mean_squared_error")
  _, (observation,), _ = make_victims(wide, 1, SIZE, reveal_labels=False, loss=loss)
  found = findings(wide, observation)
  assert "weight decay" not in found and "sign" not in found
  assert closed_form.is_turned(wide, observation) is False
