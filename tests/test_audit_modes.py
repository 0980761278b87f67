"""An update of the other mode than was said is audited in the mode that it was computed in."""

import jax
import numpy as np
import pytest
from experiment_cases import silent
from flax import linen as nn

from jaxdia import audit, models
from jaxdia.audit.attempts import Rebuilt
from jaxdia.audit.diagnosis import diagnose
from jaxdia.audit.schema import Attempt
from jaxdia.client import observe
from jaxdia.closed_form import Parts, Recovery

SHAPE = (8, 8, 1)


def seen(model, size=1, shape=SHAPE):
  """Returns what a server sees of a client, and the images."""
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(size, *shape)).astype(np.float32)
  params, labels = model.init(jax.random.key(0)), np.arange(size)
  sent, _ = observe(jax.random.key(1), model, params, images, labels, reveal_labels=False)
  return sent, images


def audited(model, observation, **options):
  return audit.audit(jax.random.key(0), model, observation, seconds=0, say=silent, **options)


class Normed(nn.Module):
  """A network in which the modes differ by more than dropout."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(64, use_bias=False)(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.1)(nn.gelu(x), deterministic=not train)
    return nn.Dense(10)(x)


@pytest.mark.parametrize("width, size", [(128, 4), (512, 8)])
def test_batches_whose_units_no_image_dropped_alone_tell_the_mode(width, size):
  model = models.create("mlp", SHAPE, 10, 0.5, hidden_sizes=(width, width), use_bias=True)
  still, _ = seen(models.evaluation_mode(model), size)
  diagnosis = diagnose(model, still)
  assert diagnosis.mode_shows and not diagnosis.training
  assert [f.name for f in diagnosis.findings] == ["evaluation mode"]
  for stated in (True, False):
    diagnosis = diagnose(model, seen(model, size)[0], training=stated)
    assert diagnosis.training is True


def test_a_client_without_dropout_behind_relus_gives_no_image_of_a_wrong_size():
  """There both modes explain the gradient, of images that differ by a factor."""
  options = {"hidden_sizes": (128, 128), "use_bias": False, "activation": "relu"}
  model = models.create("mlp", SHAPE, 10, 0.5, **options)
  update, images = seen(models.evaluation_mode(model))
  outcome = audited(model, update)
  assert outcome.found.verdicts == ["certain"]
  np.testing.assert_allclose(outcome.found.images, images, atol=1e-4)
  assert [f.name for f in outcome.findings] == ["evaluation mode"]
  assert len(outcome.attempts) == 3  # the opposite sign of the stated mode among them


def test_the_other_mode_is_tried_where_none_shows():
  model = models.from_flax(Normed(), SHAPE)
  update, images = seen(models.evaluation_mode(model))
  outcome = audited(model, update)
  assert outcome.found.verdicts == ["certain"]
  np.testing.assert_allclose(outcome.found.images, images, atol=1e-4)
  assert [f.name for f in outcome.findings] == ["evaluation mode"]
  assert outcome.attempts[1].outcome.startswith("of evaluation mode: ")


@pytest.mark.parametrize("stated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_image_that_both_modes_tell_does_not_hide_the_mode(stated):
  model = models.create("vit", SHAPE, 10, 0.5, width=32, depth=1, num_heads=2, mlp_size=32)
  client = models.evaluation_mode(model) if stated else model
  outcome = audited(model, seen(client)[0], training=stated)
  assert outcome.found.verdicts == ["certain"]
  names = [f.name for f in outcome.findings]
  assert names == ["evaluation mode" if stated else "training mode"]


@pytest.mark.parametrize("masks, shares", [(None, [3.0, 1.0]), (1, [4.0]), (0, [3.0, 1.0])])
def test_both_modes_share_the_time_of_the_search(masks, shares, monkeypatch):
  """Unless linear algebra knows masks, which tell the mode."""
  model = models.create("mlp", SHAPE, 10, 0.5, hidden_sizes=(128, 128), use_bias=True)
  update, _ = seen(model, 4)
  given = []

  def algebra(key, model, observation, rounding):
    attempt = Attempt(name="closed form", outcome="a stub", seconds=0.0)
    if masks is None or not model.rates:
      return attempt, None, None
    known = {"dropout_0": np.full((4, 128), bool(masks))}
    parts = Parts(np.zeros(0), np.zeros(4, int), {}, known, np.zeros(4), np.zeros(4), {}, {})
    return attempt, Recovery(parts, np.zeros(4), "a stub"), None

  def search(key, model, observation, recovery, seconds, say):
    given.append(seconds)
    images = np.zeros((4, *SHAPE))
    nothing = (np.full(4, np.nan), [""] * 4, np.zeros(4), np.zeros(4, bool), {}, None)
    found = Rebuilt(["stub"] * 4, images, ["none"] * 4, *nothing)
    return Attempt(name="stub", outcome="a stub", seconds=seconds), found

  monkeypatch.setattr("jaxdia.audit.pipeline.by_algebra", algebra)
  monkeypatch.setattr("jaxdia.audit.pipeline.by_search", search)
  monkeypatch.setattr("jaxdia.audit.diagnosis.find_mode", lambda *_: (None, ""))
  audit.audit(jax.random.key(0), model, update, seconds=4.0, say=silent)
  assert given == shares
