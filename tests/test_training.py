"""Networks learn with their dropout on, and what is trained is what clients use."""

import jax
import numpy as np
import pytest

from jaxdia import models
from jaxdia.client import defences
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
  params = train(jax.random.key(1), MODEL, start, images, labels, 150)
  assert accuracy(MODEL, start, *others) < 0.8
  assert accuracy(MODEL, params, *others) > 0.95


def _equal(one, other):
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_dropout_is_on():
  """Two draws of masks for one and the same batch lead elsewhere; without dropout they do not."""
  images, labels = _stripes(16, 0)
  for rate, differs in ((0.5, True), (0.0, False)):
    model = models.create("mlp", (4, 4, 1), 3, rate, hidden_sizes=(32, 32))
    start = model.init(jax.random.key(0))
    first, second = (
      train(jax.random.key(k), model, start, images, labels, 1, batch_size=16) for k in (1, 2)
    )
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    # Adam's first step is one of signs, but for gradients near zero.
    share = np.mean(np.concatenate([np.ravel(np.abs(a - b) > 1e-4) for a, b in leaves]))
    assert (share > 0.1) == differs


def test_a_shorter_training_is_the_beginning_of_a_longer_one():
  images, labels = _stripes(64, 0)
  start = MODEL.init(jax.random.key(0))
  given = (jax.random.key(1), MODEL, start, images, labels)
  assert _equal(train(*given, 5), train(*given, 5))
  assert not _equal(train(*given, 5), train(*given, 6))
  assert not _equal(train(*given, 5), train(jax.random.key(2), *given[1:], 5))


def test_the_server_takes_the_mean_of_what_clients_send():
  """Without dropout the mean over all images is the same, however they are shared out."""
  model = models.create("mlp", (4, 4, 1), 3, 0.0, hidden_sizes=(16,))
  images, labels = _stripes(12, 0)
  start = model.init(jax.random.key(0))
  one, four = (
    train(
      jax.random.key(1), model, start, images, labels, 3, batch_size=12 // clients, clients=clients
    )
    for clients in (1, 4)
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)  # of steps of 1e-3


def test_each_client_defends_what_it_sends():
  """Noise that swamps every gradient leaves a walk at random, which learns nothing."""
  images, labels = _stripes(200, 0)
  start = MODEL.init(jax.random.key(0))
  noise = defences.create("gaussian_noise", std=1e4)
  params = train(
    jax.random.key(1), MODEL, start, images, labels, 150, batch_size=4, clients=4, defence=noise
  )
  assert accuracy(MODEL, params, *_stripes(200, 1)) < 0.6


def test_too_few_images_are_refused():
  images, labels = _stripes(8, 0)
  start = MODEL.init(jax.random.key(0))
  with pytest.raises(InputError, match="take 9 images a step; expected no more than the 8 images"):
    train(jax.random.key(0), MODEL, start, images, labels, 1, batch_size=3, clients=3)
