"""Networks that were trained first: what they cost in accuracy stands beside what leaks."""

import json

import jax
import numpy as np
import pandas as pd
import pytest
from experiment_cases import rows_of, silent, timeless

from jaxdia import data, experiment, report, study
from jaxdia.core.errors import InputError
from jaxdia.experiment.clients import Clients, epsilon, trained_accuracy
from jaxdia.experiment.config import config_for, validate
from jaxdia.report.results import read_study
from jaxdia.report.tradeoff import find_tradeoff
from jaxdia.study import study_config


def _config(**training):
  config = config_for("mlp", "mnist", hidden_sizes=(32, 32))
  config.data.source, config.data.count = "sklearn:digits/test", 2
  config.attack.name, config.attack.max_iterations = "ig", 30
  config.training.source = "sklearn:digits/train"
  config.training.test_source = "sklearn:digits/test"
  config.training.steps = 150
  config.training.update(training)
  return config


def _clients(**training):
  return Clients(validate(_config(**training)).clients)


def test_digits_to_train_on_are_not_those_to_test_on():
  train, test = (data.load(f"sklearn:digits/{s}", n) for s, n in (("train", 1400), ("test", 397)))
  images = [{image.tobytes() for image in split.images} for split in (train, test)]
  assert len(images[0] | images[1]) == 1797 and not images[0] & images[1]
  np.testing.assert_allclose(train.statistics.mean, train.images.mean(), rtol=1e-5)
  np.testing.assert_allclose(train.statistics.std, train.images.std(), rtol=1e-5)
  assert np.bincount(test.labels).min() > 25
  part = data.load("sklearn:digits/test", 3, 5)
  np.testing.assert_array_equal(part.images, test.images[5:8])
  with pytest.raises(InputError, match="sklearn: 'digits'"):
    data.load("sklearn:digits", 1)


def test_weights_are_those_of_the_step_that_is_attacked():
  """An attack in the middle meets other weights, of one and the same training."""
  first, middle, last = (_clients(attacked_after=n) for n in (0, 20, None))
  drawn = jax.tree.leaves(_clients(source=None, test_source=None, steps=0).params)
  weights = [jax.tree.leaves(clients.params) for clients in (first, middle, last)]
  assert all(map(np.array_equal, drawn, weights[0]))
  assert not np.array_equal(weights[0][0], weights[1][0])
  assert not np.array_equal(weights[1][0], weights[2][0])
  shorter = jax.tree.leaves(_clients(steps=20).params)
  assert all(map(np.array_equal, shorter, weights[1]))
  assert first.test() < 0.3 and middle.test() < last.test()
  assert trained_accuracy(first.settings) == trained_accuracy(last.settings) == last.test() > 0.8


def test_epsilon_is_that_of_all_steps(monkeypatch):
  config = _config(steps=100, clients=14)
  config.defence.update({"name": "dp_sgd", "max_norm": 1.0, "noise_multiplier": 2.0})
  config.data.batch_size = 2
  settings = validate(config)
  expected = settings.defence.epsilon(1e-5, 100, 28 / 1400)
  assert epsilon(settings.clients) == expected < settings.defence.epsilon(1e-5, 100, 1.0)
  assert epsilon(validate(_config()).clients) is None


@pytest.mark.parametrize(
  "training, message",
  [
    ({"source": None, "test_source": None}, "source is None and config.training.steps is 150"),
    ({"steps": 0, "test_source": None}, "steps is 0; expected both or neither"),
    ({"source": None, "steps": 0}, "nothing is trained"),
    ({"attacked_after": 151}, "config.training.attacked_after is 151"),
    ({"clients": 0}, "config.training.clients is 0"),
    ({"learning_rate": 0.0}, "config.training.learning_rate is 0.0"),
    ({"epochs": 3}, "Unknown field of config.training: 'epochs'"),
  ],
)
def test_wrong_trainings_are_refused(training, message):
  with pytest.raises(InputError, match=message):
    validate(_config(**training))


@pytest.mark.parametrize(
  "training, message",
  [
    ({"source": "samples:mnist"}, r"images of shape \(28, 28, 1\), but those that are attacked"),
    ({"clients": 2000}, "2000 clients with batch_size 1 take 2000 images a step"),
    ({"source": "sklearn:digits/none"}, "digits/none"),
  ],
)
def test_images_that_cannot_be_trained_on_are_refused(training, message):
  with pytest.raises(InputError, match=message):
    _ = _clients(**training).params


@pytest.mark.slow
def test_a_study_sets_accuracy_against_what_leaks(tmp_path):
  """From end to end; more noise costs accuracy, and what any attack saw at any time counts."""
  noise = [
    (("defence.name", "dp_sgd"), ("defence.noise_multiplier", multiplier))
    for multiplier in (0.0, 100.0)
  ]
  grid = [("training.attacked_after", (0, 150))]
  config = study_config("Cost", "What does it cost?", _config(), variants=noise, grid=grid)
  assert not study.run(config, tmp_path / "a", say=silent)
  points = find_tradeoff(read_study(tmp_path / "a"))
  assert [p.settings for p in points] == [
    "noise_multiplier 100.0",
    "noise_multiplier 0.0",
  ]
  assert points[0].accuracy + 0.3 < points[1].accuracy and points[0].best
  table = pd.read_csv(tmp_path / "a" / "table.csv", float_precision="round_trip")
  for point, rows in zip(points, (table[2:], table[:2]), strict=True):
    assert point.leakage == rows["ssim_median"].max()
    assert set(rows["test_accuracy"]) == {point.accuracy}
  assert table["epsilon"][:2].isna().all() and (table["epsilon"][2:] < 1).all()
  report.write_report(tmp_path / "a")
  page = (tmp_path / "a" / "report.html").read_text()
  assert "What protection costs" in page
  assert "weights after 150 steps of training on sklearn:digits/train" in page
  report.publish(tmp_path / "a", tmp_path / "docs", "cost")
  assert "cost_tradeoff.png" in (tmp_path / "docs" / "cost.md").read_text()
  assert (tmp_path / "docs" / "cost_tradeoff.png").stat().st_size > 1000


def test_a_trained_experiment_goes_on_where_it_was(tmp_path):
  config = _config(steps=20)
  summary = experiment.run(config, tmp_path, say=silent)
  assert 0.1 < summary["ig"]["accuracy"] < 1
  before = timeless(rows_of(tmp_path))
  (tmp_path / "summary.json").unlink()
  assert experiment.run(config, tmp_path, say=silent)["ig"]["accuracy"] == summary["ig"]["accuracy"]
  assert timeless(rows_of(tmp_path)) == before
  kept = json.loads((tmp_path / "config.json").read_text())["training"]
  assert kept["steps"] == 20 and kept["source"] == "sklearn:digits/train"
  with pytest.raises(InputError, match="training"):
    experiment.run(_config(steps=21), tmp_path, say=silent)
