"""Batches of images behind a vision transformer, by linear algebra."""

import jax
import numpy as np
import pytest

from jaxdia import data, evaluation, models
from jaxdia.attacks import Candidate
from jaxdia.client import defences, observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.closed_form.patch_rows import find_patch_rows, smooth_prior
from jaxdia.closed_form.span import find_span

SIZE = 2


def _case(rate=0.1, width=128, **options):
  victims = data.load("samples:mnist", count=SIZE, image_size=12)
  images = data.normalize(victims.images, victims.statistics)
  model = models.create(
    "vit", images.shape[1:], 10, rate, width=width, depth=2, num_heads=4, mlp_size=32
  )
  observation, secret = observe(
    jax.random.key(1),
    model,
    model.init(jax.random.key(0)),
    images,
    victims.labels,
    statistics=victims.statistics,
    **options,
  )
  return model, observation, secret


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, pytest.param(0.75, marks=pytest.mark.slow)])
def test_patches_and_masks_of_two_images_are_found(rate):
  model, observation, secret = _case(rate)
  recovery = recover(jax.random.key(2), model, observation)
  assert (recovery.parts.verdict == Verdict.APPROXIMATE).all(), recovery.reason
  assert "smooth borders" in recovery.reason and "100%" in recovery.reason
  # Each patch is one of the two originals' to rounding, whichever image it was given to.
  found, truth = _patches(recovery.parts.images), _patches(secret.images)
  apart = np.abs(found[:, None] - truth[None]).max(axis=-1)
  assert apart.min(axis=1).max() < 1e-3 and apart.min(axis=0).max() < 1e-3
  site = "embedding_dropout"
  known = np.asarray(recovery.parts.known_masks[site])
  assert known[:, 1:].all() and not known[:, 0].any()
  for position in range(1, 10):
    right = [
      np.mean(recovery.parts.masks[site][0, position] == secret.masks[site][b, position])
      for b in range(SIZE)
    ]
    assert max(right) > 0.98


def _rows(rate, images, chance, width=96, pixels=12, positions=6):
  """Returns what `find_patch_rows` is given of random images, and the truth."""
  kernel = chance.uniform(-0.3, 0.3, (pixels, width))
  offsets = chance.standard_normal((positions, width))
  places = np.stack(np.unravel_index(np.arange(pixels), (2, 2, 3)), axis=-1).astype(float)
  prior = smooth_prior(places)
  patches = chance.multivariate_normal(prior.mean, prior.covariance, (images, positions))
  masks = chance.random((images, positions, width)) > rate
  rows = (masks * (offsets + patches @ kernel)).reshape(-1, width)
  span = find_span([rows.T @ chance.standard_normal((len(rows), width))], len(rows))
  sums = np.sum(masks * chance.standard_normal(masks.shape), axis=0)
  return (span, offsets, kernel, sums, images, rate, prior), patches, masks


@pytest.mark.parametrize(
  ("rate", "images", "least"),
  [(0.1, 2, 0.9), (0.3, 2, 0.9), (0.5, 2, 0.9), (0.75, 2, 0.9), (0.1, 3, 0.4), (0.3, 3, 0.4)],
)
def test_rows_of_random_images_are_found_with_their_masks(rate, images, least):
  given, patches, masks = _rows(rate, images, np.random.default_rng(3))
  found = find_patch_rows(*given)
  assert sum(map(len, found)) >= least * patches.shape[0] * patches.shape[1]
  for t, rows in enumerate(found):
    for row in rows:
      apart = np.abs(row.patch - patches[:, t]).max(axis=1)
      assert apart.min() < 1e-6  # what is found is right
      assert np.mean(row.mask != masks[apart.argmin(), t]) < 0.02


def test_of_a_space_of_chance_no_row_is_found():
  chance = np.random.default_rng(4)
  (_, *given), _, _ = _rows(0.5, 2, chance)
  span = find_span([chance.standard_normal((96, 12)) @ chance.standard_normal((12, 96))], 12)
  assert not any(find_patch_rows(span, *given))


def _patches(images):
  return np.asarray(images).reshape(SIZE, 3, 4, 3, 4).swapaxes(2, 3).reshape(SIZE, 9, 16)


@pytest.mark.slow
def test_two_digits_behind_the_papers_vit_are_put_together():
  victims = data.load("samples:mnist", count=SIZE)
  images = data.normalize(victims.images, victims.statistics)
  model = models.create("vit", images.shape[1:], 10, 0.1)
  params, statistics = model.init(jax.random.key(0)), victims.statistics
  observation, secret = observe(
    jax.random.key(1), model, params, images, victims.labels, statistics=statistics
  )
  recovery = recover(jax.random.key(2), model, observation)
  candidate = Candidate(recovery.parts.images, None, None)
  scores = evaluation.evaluate(model, secret, candidate, statistics).scores
  assert min(score["ssim"] for score in scores) > 0.9


def test_nothing_is_called_exact_or_found_where_it_cannot_be():
  model, observation, _ = _case(width=32)
  recovery = recover(jax.random.key(2), model, observation)
  assert not recovery.parts.verdict.any() and "nothing is left that tells masks" in recovery.reason
  model, observation, _ = _case(defence=defences.create("gaussian_noise", std=1.0))
  recovery = recover(jax.random.key(2), model, observation)
  assert not recovery.parts.verdict.any()
