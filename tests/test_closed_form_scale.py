"""Closed forms do not depend on the size of the gradient, and say what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import make_model, observe_victims

from jaxdia import data, updates
from jaxdia.client import client_gradient, observe
from jaxdia.closed_form import Verdict, recover


def _scaled(observation, factor):
  gradient = jax.tree.map(lambda x: factor * x, observation.gradient)
  return dataclasses.replace(observation, gradient=gradient)


def _make_vit():
  return make_model("vit", width=64, depth=1, num_heads=4, mlp_size=32)


@pytest.mark.parametrize(
  ("make", "size"),
  [
    (lambda: make_model(hidden_sizes=(128, 96)), 1),
    (lambda: make_model(hidden_sizes=(128, 96)), 4),
    (_make_vit, 1),
  ],
)
def test_a_factor_is_found_and_nothing_depends_on_it(make, size):
  model = make()
  observation, secret = observe_victims(model, size)
  plain = recover(jax.random.key(0), model, observation)
  assert plain.scale == pytest.approx(1, abs=1e-5)
  # Of a sum; half the loss; clipped to norm 1e-3; scaled for 16 bits.
  leaves = jax.tree.leaves(observation.gradient)
  norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in leaves)))
  for factor in (size, 0.5, 1e-3 / norm, 2.0**15):
    recovery = recover(jax.random.key(0), model, _scaled(observation, factor))
    assert recovery.scale == pytest.approx(factor, rel=1e-5)
    assert (recovery.parts.verdict == Verdict.EXACT).all() and recovery.reason == ""
    np.testing.assert_allclose(recovery.parts.images, plain.parts.images, atol=1e-5)
    assert np.array_equal(recovery.parts.labels, plain.parts.labels)


def test_new_weights_minus_old_ones_are_recognised_by_a_negative_factor():
  model = make_model(hidden_sizes=(128, 96))  # without a bias, whose signs would tell
  observation, secret = observe_victims(model, 3)
  recovery = recover(jax.random.key(0), model, _scaled(observation, -0.1))
  assert recovery.scale == pytest.approx(-0.1, rel=1e-5)
  assert (recovery.parts.verdict == Verdict.EXACT).all()
  assert sorted(recovery.parts.labels) == sorted(np.asarray(secret.labels))


def _train(model, params, images, labels, target):
  """Descends by the mean loss in evaluation mode until it is at a target."""

  @jax.jit
  def step(params):
    gradient = client_gradient(model, params, None, images, labels)
    return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

  @jax.jit
  def losses(params):
    log = jax.nn.log_softmax(model.apply(params, None, images))
    return -jnp.take_along_axis(log, labels[:, None], axis=1)[:, 0]

  for _ in range(4000):
    if losses(params).mean() < target:
      return params
    params = step(params)
  raise AssertionError(f"the loss is still {losses(params).mean()}")


@pytest.mark.parametrize(("size", "target"), [(1, 1e-2), (1, 1e-4), (1, 1e-5), (3, 1e-2)])
def test_trained_weights_with_a_small_loss(size, target):
  model = make_model(rate=0.25, hidden_sizes=(128, 96))
  victims = data.load("samples:mnist", 8)
  images = data.normalize(victims.images, victims.statistics)
  labels = jnp.asarray(victims.labels, jnp.int32)
  trained = (images[:size], labels[:size]) if target < 1e-2 else (images, labels)
  params = _train(model, model.init(jax.random.key(0)), *trained, target)
  observation, secret = observe(
    jax.random.key(3),
    model,
    params,
    images[:size],
    labels[:size],
    statistics=victims.statistics,
    reveal_labels=False,
  )
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), (recovery.summary(), recovery.residual)
  for image, label in zip(np.asarray(secret.images), np.asarray(secret.labels), strict=True):
    distances = np.abs(recovery.parts.images - image).max(axis=(1, 2, 3))
    assert distances.min() < 1e-2 and recovery.parts.labels[np.argmin(distances)] == label


def test_the_rounding_of_weights_before_and_after_hides_no_mask_of_a_narrow_network():
  """In 64 units some are nearly zero by themselves, and rounding decides what seems dropped."""
  model = make_model(hidden_sizes=(96, 64), use_bias=True)
  for seed in range(6):
    observation, _ = observe_victims(model, 4, seed=seed)
    after = jax.tree.map(lambda w, g: w - 0.1 * g, observation.params, observation.gradient)
    update = updates.from_weights(observation.params, after, 0.1)
    recovery = recover(
      jax.random.key(0), model, dataclasses.replace(observation, gradient=update.gradient)
    )
    assert (recovery.parts.verdict == Verdict.EXACT).all(), (seed, recovery.summary())
