"""Batches with images that leave little or nothing, or of fewer images than were named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdia import models
from jaxdia.client import observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.closed_form.batch import _rank
from jaxdia.closed_form.noise import spectrum

SINGLE = float(np.finfo(np.float32).eps)


def seen(images, **options):
  model = models.create("mlp", (6, 6, 1), 10, 0.5, hidden_sizes=(128, 128), **options)
  params = model.init(jax.random.key(0))
  labels = np.arange(len(images))
  return model, observe(jax.random.key(1), model, params, images, labels, reveal_labels=False)[0]


def missing(recovery, images):
  """Returns the images that are not among those called exact."""
  exact = np.asarray(recovery.parts.images)[recovery.parts.verdict == Verdict.EXACT]
  near = [min((np.abs(image - other).max() for other in exact), default=1) for image in images]
  return [i for i, distance in enumerate(near) if distance > 1e-4]


def test_a_blank_image_costs_none_of_the_others():
  """Without biases it leaves nothing in the gradient of any kernel."""
  images = np.random.default_rng(0).uniform(size=(4, 6, 6, 1))
  images[1] = 0
  model, observation = seen(images)
  recovery = recover(jax.random.key(0), model, observation)
  assert missing(recovery, images) == [1]
  assert np.sum(recovery.parts.verdict == Verdict.EXACT) == 3
  assert "blank" in recovery.reason


def test_a_smaller_batch_than_was_named_is_found_whole_and_nothing_else():
  images = np.random.default_rng(0).uniform(size=(3, 6, 6, 1))
  model, observation = seen(images)
  named = dataclasses.replace(observation, batch_size=6)
  recovery = recover(jax.random.key(0), model, named)
  assert missing(recovery, images) == []
  assert np.sum(recovery.parts.verdict == Verdict.EXACT) == 3
  assert abs(recovery.scale - 2) < 1e-2  # a mean of 3 is twice a sixth of their sum


@pytest.mark.slow
def test_images_that_leave_next_to_nothing_hide_no_other():
  """As at trained weights, where images that are learnt have a loss of nearly zero."""
  weights = jnp.array([1.0, 0.03, 4e-6, 2e-6, 1e-6, 5e-7])

  def weighted(logits, targets):
    return jnp.mean(weights * optax.softmax_cross_entropy(logits, targets))

  images = np.random.default_rng(0).uniform(size=(6, 6, 6, 1))
  model = models.create("mlp", (6, 6, 1), 10, 0.5, hidden_sizes=(128, 128))
  params, labels = model.init(jax.random.key(0)), np.arange(6)
  observation, _ = observe(
    jax.random.key(1), model, params, images, labels, reveal_labels=False, loss=weighted
  )
  recovery = recover(jax.random.key(0), model, observation)
  assert not {0, 1} & set(missing(recovery, images)), recovery.reason


@pytest.mark.parametrize(
  "sizes, rank",
  [
    ([1, 0.1, 1e-2], 3),
    ([1, 0.1, 1.2e-6, 9e-7], 4),  # the smallest are learnt, and still more than rounding
    ([1, 0.1, 1e-11, 1e-12], 2),  # and here they are not
  ],
)
def test_the_rank_is_what_stands_out_of_the_rounding(sizes, rank):
  rng = np.random.default_rng(0)
  inputs, deltas = (rng.normal(size=(len(sizes), n)) for n in (60, 90))
  matrix = np.einsum("b,bi,bj->ij", sizes, inputs, deltas).astype(np.float32).astype(np.float64)
  found, noise = _rank(spectrum(matrix, len(sizes)), len(sizes), 0.1, SINGLE)
  assert found == rank and noise < 0.1
  noisy = matrix + 1e-2 * rng.normal(size=matrix.shape)
  assert _rank(spectrum(noisy, len(sizes)), len(sizes), 0.1, SINGLE)[1] > 0.1


@pytest.mark.parametrize("least", [5e-8, 9e-8, 1.2e-7, 1e-6])
def test_no_size_of_the_smallest_image_makes_noise_of_an_exact_gradient(least):
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (60, 90))
  matrix = left @ np.diag([1, 0.1, least, 1e-8]) @ right.T
  assert _rank(spectrum(matrix, 3), 3, 0.1, SINGLE)[1] < 0.1


@pytest.mark.parametrize("alive", [3, 40])
def test_units_that_are_off_in_all_images_add_no_rank(alive):
  rng = np.random.default_rng(0)
  matrix = np.zeros((60, 90))
  matrix[:, rng.permutation(90)[:alive]] = np.outer(rng.normal(size=60), rng.normal(size=alive))
  matrix = matrix.astype(np.float32).astype(np.float64)
  assert _rank(spectrum(matrix, 3), 3, 0.1, SINGLE)[0] == 1
  assert _rank(spectrum(np.zeros((60, 90)), 3), 3, 0.1, SINGLE) == (0, 0.0)
