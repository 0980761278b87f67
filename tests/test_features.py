"""Tables and sequences of features as images of their own box."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdia import attacks, data, models
from jaxdia.client import observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.core.errors import InputError


class _Table(nn.Module):
  @nn.compact
  def __call__(self, rows, train=True):
    assert rows.ndim == 2
    for _ in range(2):
      rows = nn.gelu(nn.Dense(64, use_bias=False)(rows))
      rows = nn.Dropout(0.5)(rows, deterministic=not train)
    return nn.Dense(3)(rows)


class _Sequence(nn.Module):
  @nn.compact
  def __call__(self, frames, train=True):
    assert frames.ndim == 3
    x = nn.Dense(16)(frames) + self.param(
      "where", nn.initializers.normal(), frames.shape[1:2] + (16,)
    )
    x = nn.Dropout(0.2)(nn.gelu(x), deterministic=not train).reshape(len(frames), -1)
    return nn.Dense(4)(x)


def _columns(rng, rows):
  category = np.eye(3)[rng.integers(0, 3, rows)]
  return np.concatenate([category, rng.uniform(20, 70, (rows, 4)), np.full((rows, 1), 5.0)], axis=1)


def test_rows_of_a_table_are_found_exactly():
  values = _columns(np.random.default_rng(0), 40)
  rows, statistics = data.normalize_features(values)
  assert rows.shape == (40, 1, 1, 8)
  model = models.from_flax(_Table(), (8,))
  assert model.image_shape == (1, 1, 8)
  params = model.init(jax.random.key(0))
  observation, _ = observe(
    jax.random.key(1), model, params, rows[:4], np.arange(4) % 3, statistics=statistics
  )
  recovery = recover(jax.random.key(2), model, observation)
  assert (np.asarray(recovery.parts.verdict) == Verdict.EXACT).all()
  found = data.denormalize_features(recovery.parts.images, values)
  apart = np.abs(found[:, None] - values[None, :4]).max(axis=-1)
  assert apart.min(axis=0).max() < 1e-3


def test_sequences_go_through_the_same_door():
  values = np.random.default_rng(0).normal(size=(20, 6, 5)).cumsum(axis=1)
  rows, statistics = data.normalize_features(values)
  assert rows.shape == (20, 6, 1, 5)
  np.testing.assert_allclose(data.denormalize_features(rows, values), values, atol=1e-5)
  model = models.from_flax(_Sequence(), (6, 5))
  assert model.image_shape == (6, 1, 5)
  assert model == models.from_flax(_Sequence(), (6, 5))
  assert model != models.from_flax(_Flat(), (6, 1, 5))
  params = model.init(jax.random.key(0))
  np.testing.assert_array_equal(
    model.apply(params, None, jnp.asarray(rows)),
    _Sequence().apply({"params": params}, rows[:, :, 0], train=False),
  )
  observation, _ = observe(
    jax.random.key(1), model, params, rows[:1], np.array([2]), statistics=statistics
  )
  attack = attacks.dia(model, max_iterations=300)
  state = attacks.solve(jax.random.key(0), attack, observation)
  assert np.mean((np.asarray(state.best.candidate.images) - rows[:1]) ** 2) < 0.1


class _Flat(nn.Module):
  @nn.compact
  def __call__(self, images, train=True):
    x = nn.Dropout(0.2)(images.reshape(len(images), -1), deterministic=not train)
    return nn.Dense(4)(x)


def test_the_box_is_that_of_the_columns():
  values = np.array([[0.0, 10.0, 3.0], [1.0, 30.0, 3.0], [0.0, 20.0, 3.0]])
  rows, statistics = data.normalize_features(values)
  mean, std = (np.asarray(x) for x in statistics)
  pixels = rows[:, 0, 0] * std + mean
  np.testing.assert_allclose(pixels[:, :2].min(axis=0), 0, atol=1e-6)
  np.testing.assert_allclose(pixels[:, :2].max(axis=0), 1, atol=1e-6)
  np.testing.assert_allclose(data.denormalize_features(rows, values), values, atol=1e-5)


@pytest.mark.parametrize("values", [[1.0, 2.0], np.full((2, 2), np.nan), np.zeros((0, 3))])
def test_values_that_are_no_features_are_refused(values):
  with pytest.raises(InputError, match="features have the shape"):
    data.normalize_features(values)


@pytest.mark.parametrize("shape", [(0,), (3, -1), (2, 3, 4, 5), ("a",)])
def test_shapes_that_cannot_be_are_refused(shape):
  with pytest.raises(InputError, match="image_shape"):
    models.from_flax(_Table(), shape)
