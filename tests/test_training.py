"""Networks learn with their dropout on, and what is trained is what clients use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import models
from jaxdia.client import client_loss
from jaxdia.client.training import accuracy, train
from jaxdia.core.errors import InputError

MODEL = models.create("mlp", (4, 4, 1), 3, 0.5, hidden_sizes=(32, 32))


def _stripes(count, seed):
  """Returns images with one bright row among noise, and which row it is."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(3, size=count)
  images = rng.uniform(0, 0.3, (count, 4, 4, 1)).astype(np.float32)
  images[np.arange(count), labels] += 0.7
  return images, labels.astype(np.int32)


def test_what_is_learnt_holds_for_images_that_were_not_seen():
  images, labels = _stripes(200, 0)
  others = _stripes(200, 1)
  start = MODEL.init(jax.random.key(0))
  params, losses = train(jax.random.key(1), MODEL, start, images, labels, 150)
  assert losses.shape == (150,) and losses[-20:].mean() < losses[:20].mean() / 2
  assert accuracy(MODEL, start, *others) < 0.8
  assert accuracy(MODEL, params, *others) > 0.95


def test_dropout_is_on():
  """At the same params the loss of one and the same batch differs by the masks, and by rounding."""
  images, labels = _stripes(16, 0)
  start = MODEL.init(jax.random.key(0))
  plain = client_loss(MODEL, start, None, jnp.asarray(images), jnp.asarray(labels))
  firsts = [
    train(jax.random.key(k), MODEL, start, images, labels, 1, batch_size=16)[1][0] for k in range(4)
  ]
  losses = np.sort([float(x) for x in (*firsts, plain)])
  assert np.diff(losses).min() > 1e-4


def test_the_same_key_trains_the_same_and_another_not():
  images, labels = _stripes(64, 0)
  start = MODEL.init(jax.random.key(0))
  one, again, other = (
    train(jax.random.key(k), MODEL, start, images, labels, 5)[0] for k in (1, 1, 2)
  )
  same = jax.tree.map(np.array_equal, one, again)
  assert all(jax.tree.leaves(same))
  assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_too_few_images_are_refused():
  images, labels = _stripes(8, 0)
  with pytest.raises(InputError, match="batch_size is 9; expected no more than the 8 images"):
    train(jax.random.key(0), MODEL, MODEL.init(jax.random.key(0)), images, labels, 1, batch_size=9)
