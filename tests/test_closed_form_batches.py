"""Batches with blank images, or of fewer images than were named."""

import dataclasses

import jax
import numpy as np

from jaxdia import models
from jaxdia.client import observe
from jaxdia.closed_form import Verdict, recover


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
