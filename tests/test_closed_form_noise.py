"""Closed forms of gradients with noise, or of which a part was not sent."""

import dataclasses

import jax
import numpy as np
import pytest
from closed_form_cases import compute_scores, make_model, observe_victims

from jaxdia.closed_form import Verdict, recover
from jaxdia.closed_form.missing import complete, is_pruned
from jaxdia.closed_form.noise import find_levels, spectrum


def _spoiled(observation, change, seed=0):
  rng = np.random.default_rng(seed)
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(observation.gradient)]
  rms = np.sqrt(sum(np.sum(x**2) for x in leaves) / sum(x.size for x in leaves))
  tree = jax.tree.structure(observation.gradient)
  changed = [change(x, rms, rng).astype(x.dtype) for x in leaves]
  return dataclasses.replace(observation, gradient=jax.tree.unflatten(tree, changed)), rms


def _noised(observation, share, seed=0):
  return _spoiled(observation, lambda x, rms, rng: x + share * rms * rng.normal(size=x.shape), seed)


def _pruned(observation, share):
  return _spoiled(
    observation, lambda x, *_: np.where(np.abs(x) < np.quantile(np.abs(x), share), 0, x)
  )[0]


def _errors(secret, recovery):
  """Returns of each image how far it is from the nearest true one, root mean square."""
  true = np.asarray(secret.images)
  return np.array(
    [
      np.sqrt(np.mean((true - image) ** 2, axis=(1, 2, 3))).min()
      for image in np.asarray(recovery.parts.images)
    ]
  )


def test_the_noise_of_layers_is_what_lies_outside_their_rank():
  rng = np.random.default_rng(0)
  wide, other = (rng.normal(size=(n, 4)) @ rng.normal(size=(4, 60)) for n in (90, 80))
  narrow = rng.normal(size=(7, 4)) @ rng.normal(size=(4, 60))
  noised = [x + 0.01 * rng.normal(size=x.shape) for x in (wide, other, narrow)]
  levels = find_levels([spectrum(x, 4) for x in noised], 4, 1e-7, None)
  for matrix, level in zip(noised, levels, strict=True):
    assert level.std == pytest.approx(0.01, rel=0.05)
    assert level.share == pytest.approx(0.01 * matrix.size**0.5 / np.linalg.norm(matrix), rel=0.05)
  # More samples than were named are no noise, and what is told is taken as it is.
  assert find_levels([spectrum(wide, 2)], 2, 1e-7, None)[0].share == 1e-7
  assert find_levels([spectrum(wide, 4)], 4, 1e-7, 0.5)[0].std == pytest.approx(0.5)


@pytest.mark.parametrize("share", [1e-4, 1e-3, 2e-2])
def test_the_stated_error_covers_the_true_one(share):
  """Of twelve images a noise level, at least nine in ten; and it is not stated too large."""
  ratios = []
  model = make_model(hidden_sizes=(128, 96))
  for seed in range(3):
    observation, secret = observe_victims(model, 4, seed)
    recovery = recover(jax.random.key(0), model, _noised(observation, share, seed)[0])
    assert (recovery.parts.verdict == Verdict.APPROXIMATE).all(), recovery.summary()
    assert min(score["ssim"] for score in compute_scores(model, secret, recovery)) > 0.9
    ratios.append(_errors(secret, recovery) / recovery.error)
  ratios = np.concatenate(ratios)
  assert np.mean(ratios < 1.96) >= 0.9, ratios
  assert 0.5 < np.median(ratios) < 1.5, ratios


def test_a_level_that_is_told_serves_as_one_that_is_estimated():
  model = make_model(hidden_sizes=(128, 96))
  observation, _ = observe_victims(model, 2)
  noised, rms = _noised(observation, 1e-3)
  estimated = recover(jax.random.key(0), model, noised)
  told = recover(jax.random.key(0), model, noised, noise=float(1e-3 * rms))
  assert (told.parts.verdict == Verdict.APPROXIMATE).all()
  np.testing.assert_allclose(told.error, estimated.error, rtol=0.1)
  np.testing.assert_allclose(told.parts.images, estimated.parts.images, atol=1e-3)


def test_a_matrix_of_low_rank_is_told_by_half_of_it():
  rng = np.random.default_rng(0)
  whole = rng.normal(size=(90, 4)) @ rng.normal(size=(4, 60))
  sent = np.where(np.abs(whole) > np.median(np.abs(whole)), whole, 0)
  assert is_pruned(sent) and not is_pruned(whole)
  sent[:3] = 0  # of which nothing was sent
  found = complete(sent, 4)
  assert not found.rows[:3].any() and found.rows[3:].mean() > 0.9
  known = np.ix_(found.rows > 0, found.columns > 0)
  np.testing.assert_allclose(found.matrix[known], whole[known], atol=1e-4)


def test_zeros_of_dropout_and_equal_steps_are_not_taken_for_pruned():
  rng = np.random.default_rng(0)
  kept = rng.uniform(size=(2, 60)) < 0.5
  whole = (
    rng.normal(size=(90, 2)) * (rng.uniform(size=(90, 2)) < 0.5) @ (kept * rng.normal(size=(2, 60)))
  )
  assert np.mean(whole == 0) > 0.4 and not is_pruned(whole)
  assert not is_pruned(np.round(4 * rng.normal(size=(90, 60))))


def test_a_half_of_the_gradient_tells_the_images_and_none_is_called_exact():
  model = make_model(hidden_sizes=(256, 192))
  observation, secret = observe_victims(model, 4)
  recovery = recover(jax.random.key(0), model, _pruned(observation, 0.5))
  assert (recovery.parts.verdict == Verdict.APPROXIMATE).all(), recovery.summary()
  assert "was not sent" in recovery.reason
  assert _errors(secret, recovery).max() < 0.05


def test_a_layer_of_which_nothing_was_sent_is_no_error():
  """As the smallest entries of all layers together may be all of one."""
  model = make_model()
  observation, _ = observe_victims(model, 4)
  is_first = lambda x: x.shape[:1] == (784,)  # noqa: E731
  gradient = jax.tree.map(lambda x: x * (not is_first(x)), observation.gradient)
  assert any(is_first(x) and not x.any() for x in jax.tree.leaves(gradient))
  changed = dataclasses.replace(observation, gradient=gradient, labels=None)
  recovery = recover(jax.random.key(0), model, changed)
  assert not np.any(recovery.parts.verdict == Verdict.EXACT)
