import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import data, evaluation
from jaxdia.attacks import Candidate
from jaxdia.client import Secret
from jaxdia.core.types import Statistics
from jaxdia.models import DropoutModel

PIXELS = Statistics((0.0,), (1.0,))


@pytest.fixture(scope="module")
def images():
  return data.load("samples:cifar10", 4).images


def test_assignment_undoes_a_permutation(images):
  order = np.array([2, 0, 3, 1])
  noisy = images[order] + 0.05 * np.random.default_rng(0).normal(size=images.shape)
  found = evaluation.assign(noisy, images)
  np.testing.assert_array_equal(order[found], np.arange(4))


def test_assignment_is_the_best_in_all_not_the_nearest_each():
  originals = np.array([0.0, 1.0]).reshape(2, 1, 1, 1)
  reconstructions = np.array([0.9, 3.0]).reshape(2, 1, 1, 1)  # both are nearest to 1.0
  np.testing.assert_array_equal(evaluation.assign(reconstructions, originals), [0, 1])


def test_metrics_by_hand():
  a, b = np.zeros((2, 16, 16, 3), np.float32), np.full((2, 16, 16, 3), 0.1, np.float32)
  np.testing.assert_allclose(evaluation.mse(a, b), [0.01, 0.01], rtol=1e-5)
  np.testing.assert_allclose(evaluation.psnr(a, b), [20, 20], rtol=1e-5)
  # Of constant images only the luminance term of SSIM is left: c1 / (0.1^2 + c1).
  np.testing.assert_allclose(evaluation.ssim(a, b), [1e-4 / (0.01 + 1e-4)] * 2, rtol=1e-3)


def test_equal_images_get_finite_scores(images):
  np.testing.assert_array_equal(evaluation.mse(images, images), 0)
  np.testing.assert_array_equal(evaluation.psnr(images, images), 150)
  np.testing.assert_allclose(evaluation.ssim(images, images), 1, rtol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 5, 8, 10, 11, 12])
def test_ssim_of_images_smaller_than_its_window(side):
  image = np.random.default_rng(0).uniform(size=(1, side, 13, 1)).astype(np.float32)
  np.testing.assert_allclose(evaluation.ssim(image, image), 1, rtol=1e-5)
  assert evaluation.ssim(image, 1 - image)[0] < 0.9


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_lpips_orders_distortions(name):
  images = data.load(f"samples:{name}", 3).images
  lpips = evaluation.lpips(images.shape[-1])
  noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
  distances = [lpips(images, np.clip(images + s * noise, 0, 1)) for s in (0, 0.05, 0.5)]
  np.testing.assert_allclose(distances[0], 0, atol=1e-6)
  assert (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()
  assert distances[2].shape == (3,) and np.all(distances[2] < 2)


def test_lpips_may_be_missing(monkeypatch, images):
  assert evaluation.lpips(3) is not None
  assert evaluation.lpips(2) is None  # neither grey nor RGB
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert evaluation.lpips(3) is None


def _model(shapes):
  """A stand-in with mask shapes as functions of the batch size."""
  return DropoutModel(
    None, None, lambda batch: {name: shape(batch) for name, shape in shapes.items()}, (), (), 0
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


def test_rescaled_images_differ_by_no_contrast(images):
  np.testing.assert_allclose(
    evaluation.rescale(0.3 * images + 0.2), evaluation.rescale(images), atol=1e-5
  )
  assert not evaluation.rescale(np.full((1, 4, 4, 1), 0.7)).any()


def test_identification_by_the_nearest_in_a_pool():
  pool = data.load("samples:cifar10", 20).images
  rng = np.random.default_rng(0)
  near = pool[:4] + 0.05 * rng.normal(size=pool[:4].shape)
  assert evaluation.identified(near, pool[:4], pool).all()
  assert not evaluation.identified(pool[4:8], pool[:4], pool).any()


def test_success_counts_all_that_was_attempted():
  curve = evaluation.success_curve("ssim", [0.6, 0.95, None, 0.2], 5)
  rates = dict(zip(curve["thresholds"], curve["rate"], strict=True))
  assert (rates[0.1], rates[0.6], rates[0.9], rates[0.99]) == (0.6, 0.4, 0.2, 0.0)
  curve = evaluation.success_curve("lpips", [0.01, 0.3], 2)
  rates = dict(zip(curve["thresholds"], curve["rate"], strict=True))
  assert (rates[0.7], rates[0.1], rates[0.01]) == (1.0, 0.5, 0.5)


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


def test_a_recording_approaches_the_original(images):
  secret = Secret(images, np.zeros(4, int), {})
  order = np.array([1, 0, 3, 2])
  noise = np.random.default_rng(0).normal(size=images.shape)
  recorded = np.stack([images[order] + s * noise for s in (1.0, 0.1, 0.0)])
  ssim = evaluation.ssim_of_recording(secret, recorded.astype(np.float32), order, PIXELS)
  assert ssim.shape == (3, 4) and (np.diff(ssim, axis=0) > 0).all()
  np.testing.assert_allclose(ssim[-1], 1, atol=1e-5)
