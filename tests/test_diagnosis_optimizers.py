"""What an optimiser adds to a gradient, or makes of it, is told from the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_victims
from experiment_cases import silent

from jaxdia import audit, models, updates
from jaxdia.audit.diagnosis import diagnose
from jaxdia.client import observe
from jaxdia.client.losses import Loss

SHAPE = (6, 6, 1)


def network():
  return models.create("mlp", SHAPE, 10, 0.5, hidden_sizes=(128, 128), use_bias=True)


def update_of(model, size=1, *, bias=0.05, **options):
  """Returns an update at weights of which biases are not zero, as after some training."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + bias * rng.standard_normal(x.shape).astype(np.float32),
    model.init(jax.random.key(0)),
  )
  images = rng.uniform(size=(size, *model.image_shape)).astype(np.float32)
  key, labels = jax.random.key(1), np.arange(size)
  return observe(key, model, params, images, labels, reveal_labels=False, **options)[0]


def with_gradient(observation, gradient):
  return dataclasses.replace(observation, gradient=gradient)


def decayed(observation, decay, *, kernels_only=False):
  def add(g, w):
    return g if kernels_only and w.ndim == 1 else g + decay * w

  return with_gradient(observation, jax.tree.map(add, observation.gradient, observation.params))


def nearest(observation, other):
  """Returns the largest distance of two gradients, next to their params."""
  trees = (observation.gradient, other.gradient, observation.params)
  leaves = zip(*map(jax.tree.leaves, trees), strict=True)
  return max(np.abs(a - b).max() / max(np.abs(w).max(), 1e-3) for a, b, w in leaves)


@pytest.mark.parametrize("kernels_only", [False, True])
@pytest.mark.parametrize("size, decay", [(1, 1e-4), (2, 1e-4), (1, 5e-4)])
def test_little_weight_decay_is_found_by_how_well_it_fits(size, decay, kernels_only):
  model = network()
  update = update_of(model, size)
  diagnosis = diagnose(model, decayed(update, decay, kernels_only=kernels_only))
  (finding,) = diagnosis.findings
  assert finding.name == "weight decay" and finding.value == pytest.approx(decay, rel=1e-3)
  assert ("of kernels alone" in finding.text) == kernels_only
  assert nearest(diagnosis.observation, update) < 0.01 * decay


@pytest.mark.parametrize("kernels_only", [False, True])
@pytest.mark.parametrize("size, decay", [(1, 1e-4), (4, 5e-4)])
def test_weight_decay_of_a_vit_is_found(size, decay, kernels_only):
  """Of new weights too, in which the scales of normalisations alone tell of themselves."""
  model = models.create("vit", (16, 16, 1), 10, 0.5, width=64, depth=1, num_heads=2, mlp_size=32)
  update = update_of(model, size, bias=0.0)
  diagnosis = diagnose(model, decayed(update, decay, kernels_only=kernels_only))
  (finding,) = diagnosis.findings
  assert finding.name == "weight decay" and finding.value == pytest.approx(decay, rel=1e-3)
  assert ("of kernels alone" in finding.text) == kernels_only
  assert nearest(diagnosis.observation, update) < 0.01 * decay


@pytest.mark.parametrize("kind", ["mean_squared_error", "binary_cross_entropy"])
def test_weight_decay_shows_in_dropped_units_whatever_the_loss(kind):
  model = network()
  update = update_of(model, 2, loss=Loss(kind))
  diagnosis = diagnose(model, decayed(update, 5e-3))
  assert [f.name for f in diagnosis.findings] == ["weight decay"]
  assert nearest(diagnosis.observation, update) < 1e-4 * 5e-3
  assert diagnose(model, update).findings == []


def test_without_zeros_weight_decay_shows_in_the_classifier():
  model = network()
  update = update_of(models.evaluation_mode(model), 2)
  for kernels_only in (False, True):
    changed = decayed(update, 5e-4, kernels_only=kernels_only)
    diagnosis = diagnose(model, changed, training=False)
    (finding,) = diagnosis.findings
    assert finding.name == "weight decay" and finding.value == pytest.approx(5e-4, rel=1e-2)
    assert ("of kernels alone" in finding.text) == kernels_only


def test_no_factor_is_told_of_what_holds_noise():
  model = network()
  update = update_of(model)
  rng = np.random.default_rng(1)
  noisy = jax.tree.map(
    lambda g: 2 * (g + 1e-3 * np.abs(g).max() * rng.standard_normal(g.shape)), update.gradient
  )
  noisy = jax.tree.map(lambda g: np.asarray(g, np.float32), noisy)
  sent = with_gradient(update, noisy)
  outcome = audit.audit(jax.random.key(0), model, sent, seconds=0, say=silent)
  assert outcome.found.factor == pytest.approx(2, rel=0.1)
  assert [f.name for f in outcome.findings] == ["noise"]


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3, weight_decay=1e-2), optax.lion(1e-3)])
def test_the_first_step_with_decoupled_decay_is_no_gradient(optimizer):
  model = network()
  for size in (1, 4):
    update = update_of(model, size)
    params = update.params
    step, _ = optimizer.update(update.gradient, optimizer.init(params), params)
    sent = updates.from_weights(params, optax.apply_updates(params, step), 1e-3).gradient
    assert diagnose(model, with_gradient(update, sent)).stops


def test_the_first_step_of_adam_is_seen_in_weights_of_half_precision():
  model, optimizer = network(), optax.adam(1e-3)
  update = update_of(model, 4)
  step, _ = optimizer.update(update.gradient, optimizer.init(update.params))
  before, after = (
    jax.tree.map(lambda x: np.asarray(x, np.float16), tree)
    for tree in (update.params, optax.apply_updates(update.params, step))
  )
  sent = updates.from_weights(before, after, 1e-3)
  assert diagnose(model, with_gradient(update, sent.gradient), sent.rounding).stops
  # The same weights after plain SGD are no signs.
  after = jax.tree.map(lambda w, g: np.asarray(w - 0.01 * g, np.float16), before, update.gradient)
  sent = updates.from_weights(before, after, 0.01)
  assert not diagnose(model, with_gradient(update, sent.gradient), sent.rounding).stops


def test_a_later_step_of_adam_is_said_to_be_possible():
  model, optimizer = network(), optax.adam(1e-3)
  _, rounds, _ = make_victims(model, 6, 3, reveal_labels=False)
  state = optimizer.init(rounds[0].params)
  for one in rounds:
    step, state = optimizer.update(one.gradient, state)
  sent = with_gradient(rounds[0], jax.tree.map(jnp.negative, step))
  assert not diagnose(model, sent).stops
  texts = [f.text for f in diagnose(model, sent).findings if f.name in ("noise", "several steps")]
  assert "adaptive optimiser such as Adam" in texts[0]
