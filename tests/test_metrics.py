"""Metrics of images, each by itself, and what one entry in their registry does."""

import itertools
import json
import tracemalloc

import dm_pix
import jax
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linear_sum_assignment

from jaxdia import data, evaluation, experiment, report, study
from jaxdia.client import Secret
from jaxdia.core.types import Statistics
from jaxdia.evaluation import Metric
from jaxdia.experiment.config import config_for
from jaxdia.experiment.schema import Summary
from jaxdia.experiment.table import metrics_markdown, table

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
  noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
  distances = [evaluation.lpips(images, np.clip(images + s * noise, 0, 1)) for s in (0, 0.05, 0.5)]
  np.testing.assert_allclose(distances[0], 0, atol=1e-6)
  assert (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()
  assert distances[2].shape == (3,) and np.all(distances[2] < 2)


def test_lpips_may_be_missing(monkeypatch, images):
  assert evaluation.lpips(images, images) is not None
  assert evaluation.lpips(images[..., :2], images[..., :2]) is None  # neither grey nor RGB
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert evaluation.lpips(images, images) is None


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
  rates = evaluation.success_rates([0.6, 0.95, None, 0.2], 5, (0.1, 0.6, 0.9, 0.99), True)
  assert rates == [0.6, 0.4, 0.2, 0.0]
  assert evaluation.success_rates([0.01, 0.3], 2, (0.7, 0.1, 0.01), False) == [1.0, 0.5, 0.5]


def test_a_recording_approaches_the_original(images):
  secret = Secret(images, np.zeros(4, int), {})
  order = np.array([1, 0, 3, 2])
  noise = np.random.default_rng(0).normal(size=images.shape)
  recorded = np.stack([images[order] + s * noise for s in (1.0, 0.1, 0.0)])
  ssim = evaluation.ssim_of_recording(secret, recorded.astype(np.float32), order, PIXELS)
  assert ssim.shape == (3, 4) and (np.diff(ssim, axis=0) > 0).all()
  np.testing.assert_allclose(ssim[-1], 1, atol=1e-5)


def _naive_assignment(reconstructions, originals):
  cost = [[np.mean((a.astype(float) - b) ** 2) for b in reconstructions] for a in originals]
  return linear_sum_assignment(np.array(cost))[1]


@pytest.mark.parametrize("seed", range(5))
def test_assignment_and_identification_are_those_of_all_differences(seed):
  """Ties included, as coinciding images and equal distances make them."""
  rng = np.random.default_rng(seed)
  pool = rng.integers(0, 3, size=(40, 3, 3, 1)).astype(np.float32)
  pool[1] = pool[3] = pool[7]
  originals = pool[:8]
  found = originals[rng.permutation(8)]
  found[:4] += rng.normal(size=(4, 3, 3, 1)).astype(np.float32)
  np.testing.assert_array_equal(
    evaluation.assign(found, originals), _naive_assignment(found, originals)
  )

  def nearest(image):
    return pool[np.argmin([np.mean((image.astype(float) - other) ** 2) for other in pool])]

  expected = [np.array_equal(nearest(a), nearest(b)) for a, b in zip(found, originals, strict=True)]
  np.testing.assert_array_equal(evaluation.identified(found, originals, pool), expected)


def test_assignment_of_many_images_takes_little_memory():
  images = np.random.default_rng(0).uniform(size=(64, 64, 64, 3)).astype(np.float32)
  tracemalloc.start()
  np.testing.assert_array_equal(evaluation.assign(images[::-1], images), np.arange(64)[::-1])
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 6 * images.nbytes  # both in float64 are 4; all differences would be 128


def test_recordings_of_all_lengths_take_one_program_and_score_as_by_hand(images):
  secret, order = Secret(images[:3, :23], np.zeros(3, int), None), np.array([2, 0, 1])
  rng, compilations = np.random.default_rng(0), []

  def listen(event, seconds, **kwargs):
    if event.endswith("backend_compile_duration"):
      compilations.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for length in (1, 2, 3, 5, 8, 13, 21):
      frames = rng.uniform(size=(length, 3, 23, 32, 3)).astype(np.float32)
      found = evaluation.ssim_of_recording(secret, frames, order, PIXELS)
      assert len(compilations) <= 1, length
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compilations
  expected = [dm_pix.ssim(secret.images, frame[order]) for frame in frames]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_entry_brings_a_metric_everywhere(tmp_path, monkeypatch):
  """Into rows, summaries, floors, all tables, CSV, the report, and the list of metrics."""

  def contrast(pairs):
    originals, found = (x.std(axis=(1, 2, 3)) for x in pairs.pixels)
    return found / originals

  entry = Metric(
    name="contrast", label="contrast kept", meaning="deviation of pixels, over the original's",
    format="{:.2f}", larger_is_better=True, function=contrast, thresholds=(0.0, 1e6),
  )  # fmt: skip
  monkeypatch.setitem(evaluation.REGISTRY, "contrast", entry)
  base = config_for("mlp", "mnist", hidden_sizes=(16,))
  base.data.count, base.attack.max_iterations = 2, 3
  config = study.study_config("T", "Q?", base, grid=[("seed", (0, 1))])
  said = []
  study.run(config, tmp_path, say=said.append)
  assert "contrast_mean" in "".join(said)
  cell = next((tmp_path / "cells").iterdir())
  rows = [json.loads(line) for line in (cell / "results.jsonl").read_text().splitlines()]
  images = np.load(cell / "reconstructions.npz")
  expected = images["dia"].std(axis=(1, 2, 3)) / images["originals"].std(axis=(1, 2, 3))
  np.testing.assert_allclose([row["contrast"] for row in rows], expected, rtol=1e-5)
  summary = Summary.from_json(json.loads((cell / "summary.json").read_text()))
  mean = summary.attacks["dia"].metrics["contrast"].mean
  np.testing.assert_allclose(mean, np.mean(expected), rtol=1e-5)
  assert summary.attacks["dia"].success["contrast"].rate == [1.0, 0.0]
  assert summary.floors["mean_image"]["contrast"] > 0
  assert "contrast kept" in table(summary.attacks) and f"{mean:.2f}" in table(summary.attacks)
  assert pd.read_csv(tmp_path / "table.csv")["contrast_mean"].notna().all()
  assert pd.read_csv(tmp_path / "results.csv")["contrast"].notna().all()
  page = report.write_report(tmp_path).read_text()
  assert page.count(f'data-metric="contrast" data-statistic="mean" data-value="{mean}"') >= 2
  assert entry.meaning in page.replace("&#39;", "'")
  assert "Share of images over thresholds of contrast kept" in page
  assert "contrast kept" in report.publish(tmp_path, tmp_path / "docs", "t").read_text()
  assert f"| `contrast` | contrast kept | image | more | {entry.meaning} |" in metrics_markdown()


def test_results_with_metrics_of_elsewhere_are_shown(tmp_path):
  base = config_for("mlp", "mnist", hidden_sizes=(16,))
  base.data.count, base.attack.max_iterations = 1, 3
  experiment.run(base, tmp_path, say=lambda text: None)
  for name in ("results.jsonl", "summary.json"):
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace('"psnr_scaled"', '"far_from_here"'))
  assert "far from here" in report.write_report(tmp_path).read_text()
  (row,) = report.read_experiment(tmp_path).rows
  assert row.score("far_from_here") == row.to_json()["far_from_here"] > 0


def test_the_unit_of_the_registry_stands_over_its_numbers(tmp_path, monkeypatch):
  """In the table of a run, that of a report, its axes and lists, and the list of metrics."""
  entry = Metric(
    name="far",
    label="how far",
    meaning="off",
    unit="km",
    function=lambda p: p.pixels[0].mean((1, 2, 3)),
  )
  monkeypatch.setitem(evaluation.REGISTRY, "far", entry)
  base = config_for("mlp", "mnist", hidden_sizes=(16,))
  base.data.count, base.attack.max_iterations = 1, 3
  experiment.run(base, tmp_path, say=lambda text: None)
  summary = Summary.from_json(json.loads((tmp_path / "summary.json").read_text()))
  headings = table(summary.attacks).splitlines()[0]
  assert "PSNR, dB" in headings and "how far, km" in headings
  page = report.write_report(tmp_path).read_text()
  for text in ("time, s", "PSNR, dB", "how far, km", "all images: run, s; compile, s; scoring, s"):
    assert f">{text}</th>" in page, text
  assert "| `far` | how far, km | image |  | off |" in metrics_markdown()
  for metric in evaluation.REGISTRY.values():  # said once
    texts = [metric.label, *(column.heading for column in metric.columns)]
    assert not metric.unit or not any(
      metric.unit in text.replace(",", "").split() for text in texts
    )


def test_all_columns_have_names_of_their_own():
  keys = [column.key for _, column in evaluation.columns()]
  assert len(keys) == len(set(keys))
  for name in evaluation.TABLES:
    headings = [column.heading for _, column in evaluation.columns(name)]
    assert all(headings) and len(headings) == len(set(headings))
  for metric, (_, column) in itertools.product(evaluation.REGISTRY.values(), evaluation.columns()):
    assert metric.format.format(0.5) and set(column.tables) <= set(evaluation.TABLES)
