"""Closed forms of gradients that lack something: bits, of which nothing is exact, or layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import compute_scores, make_model, observe_victims

from jaxdia.closed_form import Verdict, recover
from jaxdia.closed_form.sparse import MOST_ROUNDING, split_zeros
from jaxdia.gradients import find_rounding

HALVES = [jnp.bfloat16, jnp.float16]


def _rounded(observation, dtype):
  gradient = jax.tree.map(lambda x: x.astype(dtype), observation.gradient)
  return dataclasses.replace(observation, gradient=gradient)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_all_images_are_found_and_none_is_exact(dtype, size):
  model = make_model(hidden_sizes=(128, 96))
  observation, secret = observe_victims(model, size)
  recovery = recover(jax.random.key(0), model, _rounded(observation, dtype))
  assert (recovery.parts.verdict == Verdict.APPROXIMATE).all(), recovery.summary()
  assert np.all(recovery.determined) and "of the gradient, so the pixels" in recovery.reason
  scores = compute_scores(model, secret, recovery)
  assert min(score["ssim"] for score in scores) > 0.99
  assert sorted(recovery.parts.labels) == sorted(np.asarray(secret.labels))
  assert recovery.parts.known_labels.all()
  for image, error in zip(np.asarray(recovery.parts.images), recovery.error, strict=True):
    true = np.sqrt(np.mean((np.asarray(secret.images) - image) ** 2, axis=(1, 2, 3))).min()
    assert true < 2 * error < 0.05
  assert recovery.scale == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("level", [10 * MOST_ROUNDING, 0.2])
def test_a_level_that_is_told_is_a_level_that_is_seen(level):
  """As of weights before and after, whose difference has as many bits as ever."""
  model = make_model(hidden_sizes=(128, 96))
  observation, _ = observe_victims(model, 2)
  plain = recover(jax.random.key(0), model, observation)
  assert (plain.parts.verdict == Verdict.EXACT).all() and np.all(plain.determined)
  told = recover(jax.random.key(0), model, observation, level)
  assert (told.parts.verdict == Verdict.APPROXIMATE).all() and np.all(told.determined)
  # In any order: what tells it differs between versions of JAX.
  apart = np.asarray(told.parts.images)[:, None] - np.asarray(plain.parts.images)
  apart = np.abs(apart).max(axis=(2, 3, 4))
  assert apart.min(axis=0).max() < 1e-4 and apart.min(axis=1).max() < 1e-4


def test_a_frozen_classifier_hides_nothing_and_half_a_layer_is_said():
  model = make_model(hidden_sizes=(128, 96), use_bias=True)
  observation, secret = observe_victims(model, 2)
  (last,), gradient = model.classifier, observation.gradient
  frozen = dataclasses.replace(observation, gradient=gradient | {last: None})
  recovery = recover(jax.random.key(0), model, frozen)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), recovery.summary()
  assert sorted(recovery.parts.labels) == sorted(np.asarray(secret.labels))
  part = gradient["hidden_0"] | {"bias": None}
  half = dataclasses.replace(observation, gradient=gradient | {"hidden_0": part})
  recovery = recover(jax.random.key(0), model, half)
  assert not recovery.parts.verdict.any() and "hidden_0 is frozen" in recovery.reason


def test_noise_of_a_millionth_leaves_images_exact():
  model = make_model(hidden_sizes=(128, 96))
  observation, secret = observe_victims(model, 2)
  leaves, tree = jax.tree.flatten(observation.gradient)
  norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in leaves) / sum(x.size for x in leaves))
  rng = np.random.default_rng(0)
  noised = [x + np.float32(1e-6 * norm) * rng.standard_normal(x.shape, np.float32) for x in leaves]
  seen = dataclasses.replace(observation, gradient=jax.tree.unflatten(tree, noised))
  recovery = recover(jax.random.key(0), model, seen)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), recovery.summary()
  assert max(score["mse_normalized"] for score in compute_scores(model, secret, recovery)) < 1e-9


@pytest.mark.parametrize("dtype", HALVES)
def test_the_level_is_that_of_what_rounding_changed(dtype):
  rng = np.random.default_rng(0)
  whole = {"a": rng.standard_normal((40, 30)), "b": rng.standard_normal(30), "c": None}
  for size in (1.0, 1e-6):  # the second has but a few bits left in float16
    leaves = {name: x if x is None else np.float32(size * x) for name, x in whole.items()}
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype), np.float32), leaves)
    error, norm = (
      np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
      for tree in (jax.tree.map(lambda a, b: a - b, leaves, rounded), rounded)
    )
    found = find_rounding(rounded)
    assert found.dtype == np.dtype(dtype).name
    assert 0.8 < found.level / (error / norm) < 4
    assert find_rounding(leaves).dtype is None


def test_zeros_are_split_from_others_where_there_is_no_gap():
  rng = np.random.default_rng(0)
  zero = np.arange(200) < 90
  values = np.where(zero, 0.02, 1.0) * rng.standard_normal(200)
  assert np.abs(values[~zero]).min() < np.abs(values[zero]).max()
  split = split_zeros(values, np.ones(200), 40, 160, 4e-3)
  assert np.sum(np.asarray(split.zero) != zero) <= 6 and split.gap > 8
  # What was not counted is no zero, and of one distribution no part stands out.
  counts = np.arange(200) % 2.0
  split = split_zeros(values, counts, 20, 80, 4e-3)
  assert not np.any(np.asarray(split.zero)[counts == 0])
  assert np.sum((np.asarray(split.zero) != zero)[counts == 1]) <= 4
  assert split_zeros(rng.standard_normal(200), np.ones(200), 40, 160, 4e-3).gap < 8


@pytest.mark.parametrize("rounding", [0.0, 4e-3])
def test_where_no_number_of_zeros_is_allowed_there_is_no_gap(rounding):
  """As in a small layer of which any few points lie on a plane."""
  values = np.array([1e-6, 1.0, 1.1, 2.0, 3.0, 4.0])
  assert split_zeros(values, np.ones(6), 1, 3, rounding).gap > 8
  assert split_zeros(values, np.ones(6), 5, 3, rounding).gap < 1


@pytest.mark.parametrize("level", [0.03, 0.2, 1.0])
def test_no_rounding_makes_the_mean_of_two_images_fit(level):
  """However much rounding is told, as of weights of few bits whose learning rate is small."""
  model = make_model(hidden_sizes=(128, 96), use_bias=True)
  observation, _ = observe_victims(model, 2)
  named = dataclasses.replace(observation, batch_size=1, labels=None)
  recovery = recover(jax.random.key(0), model, named, level)
  assert not np.any(recovery.determined), recovery.summary()
  assert not np.any(recovery.parts.verdict == Verdict.EXACT) and recovery.residual[0] > 0.1
