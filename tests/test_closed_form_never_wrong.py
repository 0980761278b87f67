"""Nothing is called exact or known that is wrong, whatever was done to the gradient."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import models
from jaxdia.client import client_gradient, observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.core.errors import InputError

# An exact image is nearer than this to one of the batch, mean squared, normalised.
_MOST = 1e-4


def _each(change):
  return lambda o, rng: jax.tree.map(lambda x: change(np.asarray(x), rng), o.gradient)


def _quantised(x, rng):
  step = np.abs(x).max() / 127
  return np.round(x / step) * step


def _pruned(x, rng):
  return np.where(np.abs(x) < np.quantile(np.abs(x), rng.choice([0.3, 0.7, 0.9])), 0, x)


def _noised(x, rng):
  return x + 10.0 ** rng.uniform(-7, -0.5) * x.std() * rng.normal(size=x.shape)


def _factor(observation, rng):
  factor = rng.uniform(0.1, 9)
  return jax.tree.map(lambda x: factor * x, observation.gradient)


def _decayed(observation, rng):
  decay = 10.0 ** rng.uniform(-7, -2)
  return jax.tree.map(lambda x, w: x + decay * w, observation.gradient, observation.params)


SPOILS = {
  "plain": lambda o, rng: o.gradient,
  "noise": _each(_noised),
  "bfloat16": _each(lambda x, rng: x.astype(jnp.bfloat16)),
  "float16": _each(lambda x, rng: x.astype(np.float16)),
  "factor": _factor,
  "pruned": _each(_pruned),
  "quantised": _each(_quantised),
  "decay": _decayed,
  "batch size": lambda o, rng: o.gradient,
  "two steps": lambda o, rng: o.gradient,
  "copies": lambda o, rng: o.gradient,
  "learnt": lambda o, rng: o.gradient,
  "blank": lambda o, rng: o.gradient,
}


@jax.jit
def _learn(model, params, images, labels):
  """Returns weights that an image of the batch is learnt by, so that its gradient is small."""

  def step(_, params):
    gradient = client_gradient(model, params, None, images, labels)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

  return jax.lax.fori_loop(0, 200, step, params)


class _Found(NamedTuple):
  verdict: Verdict
  distance: float  # to the batch
  wrong: int  # entries of its masks that are called known, and are not those of that image


def _play(kind, seed):
  """Returns what was found of each image of one spoiled gradient."""
  rng = np.random.default_rng(seed)
  size = int(rng.integers(1, 4))
  model = models.create("mlp", (6, 6, 1), 10, 0.5, hidden_sizes=(96, 96), use_bias=bool(seed % 2))
  params = model.init(jax.random.key(seed))
  images = rng.uniform(size=(size, 6, 6, 1)).astype(np.float32)
  if kind == "blank":
    images[0] = 0
  if kind == "copies":
    images[-1] = images[0]
  labels = rng.integers(0, 10, size)
  if kind == "learnt":
    params = _learn(model, params, jnp.asarray(images[:1]), jnp.asarray(labels[:1], jnp.int32))
  seen, secret = observe(jax.random.key(seed + 1), model, params, images, labels)
  gradient = SPOILS[kind](seen, rng)
  known = images
  if kind == "two steps":
    other = rng.uniform(size=images.shape).astype(np.float32)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    second = client_gradient(model, moved, secret.masks, other, jnp.asarray(labels))
    gradient = jax.tree.map(lambda a, b: a + b, gradient, second)
    known = np.concatenate([images, other])
  named = size + 1 if kind == "batch size" and seed % 3 else max(size - (kind == "batch size"), 1)
  gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
  seen = dataclasses.replace(seen, gradient=gradient, batch_size=named, labels=None)
  try:
    parts = recover(jax.random.key(2), model, seen).parts
  except InputError:  # of a gradient of the opposite sign, as noise makes it
    return []
  found = []
  for i, image in enumerate(np.asarray(parts.images)):
    distances = np.mean((known - image) ** 2, axis=(1, 2, 3))
    # An image that is there twice has one of two masks.
    same = np.flatnonzero(distances <= distances.min() + 1e-12) % size
    wrong = min(
      sum(
        int(np.sum(told[i] & (parts.masks[site][i] != np.asarray(secret.masks[site])[number])))
        for site, told in parts.known_masks.items()
      )
      for number in same
    )
    found.append(_Found(Verdict(int(parts.verdict[i])), float(distances.min()), wrong))
  return found


@pytest.mark.parametrize("kind", SPOILS)
def test_what_is_called_exact_is_in_the_batch(kind):
  found = [each for seed in range(3) for each in _play(kind, seed)]
  assert not [each for each in found if _is_wrong(each)]
  if kind in ("plain", "factor"):
    assert found and all(each.verdict == Verdict.EXACT for each in found)


@pytest.mark.parametrize("size", [1, 3])
def test_masks_that_their_rate_cannot_have_make_nothing_exact(size):
  """Of a network in which they alone tell the size of an image, as without biases behind ReLUs."""
  options = {"hidden_sizes": (96, 96), "use_bias": False, "activation": "relu"}
  model = models.create("mlp", (6, 6, 1), 10, 0.5, **options)
  params = model.init(jax.random.key(0))
  images = np.random.default_rng(0).uniform(size=(size, 6, 6, 1)).astype(np.float32)
  labels = np.arange(size)
  for client, exact in ((model, True), (models.evaluation_mode(model), False)):
    seen, _ = observe(jax.random.key(1), client, params, images, labels, reveal_labels=False)
    found = recover(jax.random.key(2), model, seen)
    assert np.all((np.asarray(found.parts.verdict) == Verdict.EXACT) == exact)
    if not exact:
      assert np.asarray(found.parts.verdict).any() and not np.any(found.determined)
      assert "evaluation mode" in found.reason and "up to a factor" in found.reason
      assert not any(np.any(known) for known in found.parts.known_masks.values())


def _is_wrong(each):
  return each.verdict == Verdict.EXACT and (not each.distance < _MOST or each.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPOILS)
def test_it_is_so_in_ten_thousand_gradients(kind):
  for seed in range(3, 3 + 10_000 // len(SPOILS) + 1):
    wrong = [each for each in _play(kind, seed) if _is_wrong(each)]
    assert not wrong, (kind, seed, wrong)
