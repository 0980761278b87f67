"""Reconstructions against the secret."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import data, evaluation
from jaxdia.attacks import Candidate
from jaxdia.client import Secret
from jaxdia.closed_form import NO_LABEL
from jaxdia.core.errors import InputError
from jaxdia.core.types import Statistics

PIXELS = Statistics((0.0,), (1.0,))


@pytest.fixture(scope="module")
def images():
  return data.load("samples:cifar10", 4).images


def _model(shapes):
  """A stand-in with mask shapes as functions of the batch size."""
  return types.SimpleNamespace(
    mask_shapes=lambda batch: {name: shape(batch) for name, shape in shapes.items()}
  )


def _accuracy(model, masks, true):
  diagnostics = evaluation.mask_diagnostics(model, masks, true, np.array([1, 0]))
  return {site: values["accuracy"] for site, values in diagnostics.items()}


def test_mask_accuracy():
  model = _model({"own": lambda b: (b, 4), "shared": lambda b: (1, 2), "weights": lambda b: (4, 1)})
  true = {
    "own": jnp.array([[1, 0, 1, 1], [0, 0, 0, 1]]),
    "shared": jnp.array([[1.0, 0.0]]),
    "weights": jnp.array([[1], [0], [0], [0]]),
  }
  masks = {
    "own": jnp.array([[0.4, 0.2, 0.1, 0.9], [0.9, 0.1, 0.3, 0.8]]),
    "shared": jnp.array([[0.7, 0.6]]),
    "weights": jnp.zeros((4, 1)),
  }
  accuracy = _accuracy(model, masks, true)
  np.testing.assert_allclose(accuracy["own"], [0.75, 1.0])
  np.testing.assert_allclose(accuracy["shared"], [0.5, 0.5])
  np.testing.assert_allclose(accuracy["weights"], [0.75, 0.75])


def test_mask_accuracy_where_tokens_are_folded_into_the_batch():
  true = {"site": np.array([[1], [1], [0], [0]])}  # two images of two tokens
  masks = {"site": np.array([[0], [0], [1], [0]])}
  model = _model({"site": lambda b: (2 * b, 1)})
  accuracy = _accuracy(model, masks, true)
  np.testing.assert_allclose(accuracy["site"], [0.5, 1.0])


def test_mask_accuracy_where_time_comes_first():
  true = {"site": np.array([[[1], [0]], [[1], [0]]])}  # two times of two images
  model = _model({"site": lambda b: (2, b, 1)})
  accuracy = _accuracy(model, true, true)
  np.testing.assert_allclose(accuracy["site"], [0, 0])


def test_evaluate_a_shuffled_batch(images):
  order = np.array([3, 1, 0, 2])
  masks = {"site": (np.arange(24).reshape(4, 6) % 5 > 1).astype(float)}
  secret = Secret(images, np.array([5, 6, 7, 8]), masks)
  candidate = Candidate(images[order], {"site": masks["site"][order]}, None)
  model = _model({"site": lambda b: (b, 6)})
  result = evaluation.evaluate(model, secret, candidate, PIXELS, np.array([5, 6, 7, 8])[order])
  np.testing.assert_array_equal(result.reconstructions, images)
  for score in result.scores:
    assert score["mse_normalized"] == 0 and score["mask_accuracy"] == 1
    assert score["label_accuracy"] == 1 and score["mask_accuracy_by_site"] == {"site": 1.0}


def test_evaluate_scores_in_normalised_space_and_in_pixels(images):
  statistics = data.STATISTICS["cifar10"]
  normalized = data.normalize(images, statistics)
  secret = Secret(normalized, np.zeros(4, int), {})
  result = evaluation.evaluate(
    _model({}), secret, Candidate(normalized + 0.1, None, None), statistics
  )
  for score in result.scores:
    np.testing.assert_allclose(score["mse_normalized"], 0.01, rtol=1e-3)
    assert 0 < score["mse"] < 0.01 * 0.27**2  # std of the data set, and clipped
    assert score["mask_accuracy"] is None and score["label_accuracy"] is None


def test_a_label_that_nothing_tells_is_not_scored(images):
  secret = Secret(jnp.asarray(images), np.array([0, 1, 2, 3]), None)
  candidate = Candidate(images, None, None)
  labels = np.array([0, NO_LABEL, 1, NO_LABEL])
  scores = evaluation.evaluate(None, secret, candidate, PIXELS, labels).scores
  assert [score["label_accuracy"] for score in scores] == [1, None, 0, None]


def test_found_labels():
  soft = np.array([[0.0, 3.0], [2.0, 1.0]])
  candidate = Candidate(np.zeros((2, 1, 1, 1)), None, soft)
  np.testing.assert_array_equal(evaluation.found_labels(candidate, None), [1, 0])
  assert evaluation.found_labels(candidate._replace(labels=None), None) is None


def test_mask_diagnostics_by_hand():
  true = {"site": np.array([[1, 1, 0, 0], [1, 1, 1, 1]])}
  masks = {"site": np.array([[0.95, 0.3, 0.3, 0.0], [0.5, 0.2, 1.0, 1.0]])}
  model = _model({"site": lambda b: (b, 4)})
  found = evaluation.mask_diagnostics(model, masks, true, np.arange(2))["site"]
  np.testing.assert_allclose(found["accuracy"], [0.75, 0.75])
  # Of four pairs three are in order, and one is a tie.
  np.testing.assert_allclose(found["auc"], [0.875, np.nan])
  np.testing.assert_allclose(found["undecided"], [0.5, 0.5])
  np.testing.assert_allclose(found["dropped"], [1 - 1.55 / 4, 1 - 2.7 / 4])
  known = {"site": np.array([[1, 0, 0, 1], [0, 0, 0, 0]], bool)}
  found = evaluation.mask_diagnostics(model, masks, true, np.arange(2), known)["site"]
  np.testing.assert_allclose(found["accuracy"], [1, np.nan])
  np.testing.assert_allclose(found["undecided"], [0, np.nan])


def test_bootstrap_interval_holds_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(1)
  held = 0
  for _ in range(200):
    low, high = evaluation.bootstrap_interval(rng.normal(3.0, 1.0, size=40))
    held += low <= 3.0 <= high
  assert 175 <= held <= 200
  assert evaluation.bootstrap_interval([2.0]) == (2.0, 2.0)


def test_floors_are_what_a_guess_gets(images):
  statistics = data.STATISTICS["cifar10"]
  floors = evaluation.floors(images, images, statistics)
  guess = np.broadcast_to(images.mean(axis=0), images.shape)
  expected = np.mean((images - guess) ** 2)
  assert abs(floors["mean_image"]["mse"] - expected) < 1e-6
  assert floors["random_image"]["ssim"] < 0.1
  assert floors["random_image"]["mse_normalized"] > floors["mean_image"]["mse_normalized"]


def test_a_gradient_whose_masks_nobody_knows_is_scored_without_them(images):
  secret = Secret(images, np.arange(4), None)
  candidate = Candidate(images[::-1], {"site": np.ones((4, 6))}, None)
  result = evaluation.evaluate(_model({"site": lambda b: (b, 6)}), secret, candidate, PIXELS)
  for score in result.scores:
    assert score["ssim"] > 0.999
    assert score["mask_accuracy"] is None and score["mask_auc_by_site"] is None


def test_arrays_of_bfloat16_are_scored(images):
  half = jnp.asarray(images, jnp.bfloat16)
  masks = {"site": np.arange(24).reshape(4, 6) % 5 > 1}
  searched = {"site": jnp.asarray(np.where(masks["site"], 0.75, 0.125), jnp.bfloat16)}
  secret = Secret(half, np.arange(4), masks)
  model = _model({"site": lambda b: (b, 6)})
  result = evaluation.evaluate(
    model, secret, Candidate(half[::-1], {"site": searched["site"][::-1]}, None), PIXELS
  )
  for score in result.scores:
    assert score["mse_normalized"] == 0 and score["mask_accuracy"] == 1
    assert score["mask_auc_by_site"] == {"site": 1.0}


def test_a_score_that_is_no_number_is_none(images):
  broken = images.copy()
  broken[0] = np.nan
  secret = Secret(images, np.arange(4), None)
  result = evaluation.evaluate(_model({}), secret, Candidate(broken, None, None), PIXELS)
  assert result.scores[0]["mse_normalized"] is None and result.scores[0]["ssim"] is None
  assert [score["mse_normalized"] for score in result.scores[1:]] == [0, 0, 0]


def test_what_is_no_candidate_or_secret_is_refused(model):
  images = np.full((1, 6, 6, 1), 0.5, np.float32)
  secret, candidate = Secret(images, np.array([1]), None), Candidate(images, None, None)
  statistics = Statistics(0.0, 1.0)
  for given, message in (
    ((images, candidate), "secret is of type ndarray; expected a jaxdia.client.Secret"),
    ((secret, images), "candidate is of type ndarray; .* such as state.best.candidate"),
    ((secret, Candidate(images[:, 1:], None, None)), "the same. They may be of other clients"),
  ):
    with pytest.raises(InputError, match=message):
      evaluation.evaluate(model, *given, statistics)
  with pytest.raises(InputError, match="traced, as inside of jax.jit"):
    jax.jit(lambda s: evaluation.evaluate(model, s, candidate, statistics).scores[0]["ssim"])(
      secret
    )
