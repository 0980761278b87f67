"""Closed forms behind ReLU, for several losses, and of batches in which an image is there twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import STATISTICS, compute_scores, make_model, observe_victims

from jaxdia import attacks, models
from jaxdia.client import Loss, observe
from jaxdia.closed_form import Verdict, recover
from jaxdia.closed_form.structure import find_chain
from jaxdia.core.errors import InputError

_SIZES = (128, 96, 112)


def _errors(recovery, secret):
  """Returns the largest error of each true image, and which one was found for it."""
  images = np.asarray(secret.images)[:, None]
  distances = np.abs(recovery.parts.images[None] - images).max(axis=(2, 3, 4))
  return distances.min(axis=1), distances.argmin(axis=1)


@pytest.mark.parametrize(
  ("rate", "size", "use_bias"), [(0.5, 1, False), (0.0, 4, False), (0.5, 4, False), (0.25, 4, True)]
)
def test_relu_gives_all_away_but_the_masks_of_units_that_are_off(rate, size, use_bias):
  model = make_model(rate=rate, hidden_sizes=_SIZES, activation="relu", use_bias=use_bias)
  observation, secret = observe_victims(model, size)
  recovery = recover(jax.random.key(0), model, observation)
  parts = recovery.parts
  assert (parts.verdict == Verdict.EXACT).all(), recovery.summary()
  assert recovery.scale == pytest.approx(1, abs=1e-4)
  errors, order = _errors(recovery, secret)
  assert errors.max() < 1e-3
  assert np.array_equal(parts.labels[order], secret.labels)
  inputs = np.asarray(secret.images).reshape(size, -1)
  for k, (site, mask) in enumerate(secret.masks.items()):
    known = parts.known_masks[site][order]
    assert np.array_equal(parts.masks[site][order][known], np.asarray(mask)[known])
    # It is known just where the unit is on, which the true images and masks tell.
    layer = {"bias": 0.0, **observation.params[f"hidden_{k}"]}
    outputs = inputs @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    clear = np.abs(outputs) > 1e-4
    assert np.array_equal(known[clear], outputs[clear] > 0)
    inputs = np.maximum(outputs, 0) * np.asarray(mask) / (1 - rate)


def test_a_leaky_relu_tells_as_much_as_a_smooth_function():
  model = make_model(rate=0.5, hidden_sizes=(128, 96), activation="leaky_relu")
  links = find_chain(model.network).links
  assert all(link.homogeneous and not link.silent for link in links)
  observation, secret = observe_victims(model, 3)
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), recovery.summary()
  for score in compute_scores(model, secret, recovery):
    assert score["mse_normalized"] < 1e-7 and score["mask_accuracy"] == 1
  assert not find_chain(make_model(hidden_sizes=(128, 96)).network).links[0].homogeneous


def test_an_activation_that_there_is_not_is_refused():
  with pytest.raises(InputError, match="leaky_relu"):
    models.create("mlp", (6, 6, 1), 5, 0.5, activation="leaky")


def _focal(logits, targets):
  chances = jnp.sum(jax.nn.softmax(logits) * targets, axis=1)
  return jnp.mean(-((1 - chances) ** 2) * jnp.log(chances))


@pytest.mark.parametrize(
  "loss",
  [
    Loss(reduction="sum"),
    Loss(label_smoothing=0.1),
    Loss("binary_cross_entropy"),
    Loss("mean_squared_error"),
    Loss(_focal),
  ],
  ids=lambda loss: f"{loss.name} {loss.reduction} {loss.label_smoothing}",
)
def test_images_labels_and_the_factor_for_other_losses(loss):
  model = make_model(hidden_sizes=(128, 96))
  observation, secret = observe_victims(model, 3, loss=loss)
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all() and recovery.reason == ""
  assert recovery.scale == pytest.approx(1, abs=1e-4)
  errors, order = _errors(recovery, secret)
  assert errors.max() < 1e-4
  assert np.array_equal(recovery.parts.labels[order], secret.labels)


def test_a_loss_that_is_not_the_one_stated_is_said_and_hides_no_image():
  model = make_model(hidden_sizes=(128, 96))
  observation, secret = observe_victims(model, 3, loss=Loss("mean_squared_error"))
  wrong = dataclasses.replace(observation, loss=Loss())
  recovery = recover(jax.random.key(0), model, wrong)
  assert _errors(recovery, secret)[0].max() < 1e-4
  assert np.isnan(recovery.scale) and not recovery.parts.known_labels.any()
  assert "not that of the loss cross_entropy" in recovery.reason
  # A search needs labels, and of a function of one's own none can be read for a batch.
  unread = dataclasses.replace(observation, loss=Loss(_focal))
  with pytest.raises(InputError, match="_focal"):
    attacks.hybrid(model).recover(jax.random.key(0), unread)


@pytest.mark.parametrize("use_bias", [False, True])
def test_an_image_that_is_there_twice_hides_no_other(use_bias):
  model = make_model(rate=0.5, hidden_sizes=(128, 96), use_bias=use_bias)
  _, single = observe_victims(model, 2)
  images, labels = (np.asarray(x)[[0, 1, 0]] for x in (single.images, single.labels))
  observation, secret = observe(
    jax.random.key(4),
    model,
    model.init(jax.random.key(0)),
    images,
    labels,
    statistics=STATISTICS,
    reveal_labels=False,
  )
  recovery = recover(jax.random.key(0), model, observation)
  assert "coincide" in recovery.reason
  exact = recovery.parts.images[recovery.parts.verdict == Verdict.EXACT]
  distances = np.abs(exact[None] - images[:, None]).max(axis=(2, 3, 4))
  assert distances.min(axis=1).max() < 1e-3  # all three
  assert distances.min(axis=0).max() < 1e-3  # and nothing else
  assert len(exact) == 3
