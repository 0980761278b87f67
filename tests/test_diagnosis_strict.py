"""A diagnosis claims nothing that the update does not show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims
from experiment_cases import silent

from jaxdia import audit, models
from jaxdia.audit.diagnosis import diagnose, negative, tells_sign
from jaxdia.client import observe
from jaxdia.client.losses import Loss
from jaxdia.core.errors import InputError

SIZE = 3
RNG = np.random.default_rng(0)


def network(**options):
  options = {"hidden_sizes": (128, 128), **options}
  return models.create("mlp", (6, 6, 1), 10, 0.5, **options)


def update_of(model, size=SIZE, **options):
  return make_victims(model, 1, size, reveal_labels=False, **options)[1][0]


def changed(observation, function):
  gradient = jax.tree.map(function, observation.gradient, observation.params)
  return dataclasses.replace(observation, gradient=gradient)


def findings(model, observation, **options):
  return {f.name: f for f in diagnose(model, observation, **options).findings}


def test_noise_that_fills_the_zeros_is_not_called_evaluation_mode():
  model = network()
  for size in (1e-3, 1e-7):  # of the second no rank tells
    update = changed(
      update_of(model), lambda g, w, s=size: g + s * jnp.max(abs(g)) * RNG.standard_normal(g.shape)
    )
    diagnosis = diagnose(model, update)
    assert diagnosis.training and "evaluation mode" not in {f.name for f in diagnosis.findings}


def test_steps_that_drop_other_units_are_not_called_evaluation_mode():
  model = network()
  _, updates, _ = make_victims(model, 6, SIZE, reveal_labels=False)
  mean = jax.tree.map(lambda *g: sum(g) / len(g), *[u.gradient for u in updates])
  found = findings(model, dataclasses.replace(updates[0], gradient=mean))
  assert set(found) == {"several steps"}


def test_units_that_a_relu_silences_do_not_speak_of_training_mode():
  model = network(activation="relu")
  update = update_of(models.evaluation_mode(model), 1)
  diagnosis = diagnose(model, update, training=False)
  assert diagnosis.findings == [] and diagnosis.training is False
  assert diagnose(model, update, training=True).findings == []


def test_what_was_said_of_the_mode_is_no_finding():
  model = network()
  assert findings(model, update_of(models.evaluation_mode(model)), training=False) == {}
  assert findings(model, update_of(model), training=True) == {}


def test_full_rank_may_be_a_larger_batch():
  model = network()
  text = findings(model, update_of(model, 48))  # as it should be
  assert text == {}
  found = findings(model, dataclasses.replace(update_of(model, 48), batch_size=SIZE))
  assert "larger batch" in found["noise"].text


def test_a_classifier_of_zeros_gives_no_weight_decay():
  model = network()
  update = update_of(model)
  head = model.classifier[0]
  params = {**update.params, head: jax.tree.map(jnp.zeros_like, update.params[head])}
  noisy = jax.tree.map(lambda g: g + 1e-3 * RNG.standard_normal(g.shape), update.gradient)
  diagnosis = diagnose(model, dataclasses.replace(update, params=params, gradient=noisy))
  assert "weight decay" not in {f.name for f in diagnosis.findings}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(diagnosis.observation.gradient))


def test_weights_that_are_not_finite_are_refused():
  model = network()
  update = update_of(model)
  params = jax.tree.map(lambda leaf: leaf * jnp.nan, update.params)
  with pytest.raises(InputError, match="NaN or infinite entries"):
    diagnose(model, dataclasses.replace(update, params=params))


@pytest.mark.parametrize("loss", [Loss(label_smoothing=0.1), Loss("mean_squared_error")])
def test_a_sign_that_no_rule_tells_is_tried_both_ways(loss):
  model = network(use_bias=True)
  update = update_of(model, loss=loss)
  assert not tells_sign(model, update) and not tells_sign(model, negative(update))
  outcome = audit.audit(jax.random.key(0), model, negative(update), seconds=0, say=silent)
  assert set(outcome.found.verdicts) == {"certain"}
  assert [f.name for f in outcome.findings] == ["sign"]


def test_a_sign_that_is_told_is_not_tried_the_other_way():
  """Of half as many images as classes too, where a closed form refuses the opposite."""
  model = network(use_bias=True)
  images, labels = RNG.uniform(size=(5, 6, 6, 1)), np.array([1, 1, 2, 3, 4])
  params = model.init(jax.random.key(0))
  right, _ = observe(jax.random.key(1), model, params, images, labels, reveal_labels=False)
  assert tells_sign(model, right) and tells_sign(model, negative(right))


def test_the_factor_of_a_summed_loss_is_told_against_the_stated_one():
  model = network()
  update = update_of(model, loss=Loss(reduction="sum"))
  mean = changed(update, lambda g, w: g / SIZE)
  for observation, text in (
    (update, None),
    (mean, "averaged"),
    (changed(mean, lambda g, w: 9 * g), "clipping"),
  ):
    outcome = audit.audit(jax.random.key(0), model, observation, seconds=0, say=silent)
    texts = [f.text for f in outcome.findings if f.name == "factor"]
    assert not texts if text is None else text in texts[0]
