"""What a gradient gives away behind convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import compute_scores, make_lenet, observe_victims
from flax import linen as nn

from jaxdia import attacks, models
from jaxdia.audit.attempts import choose_attack
from jaxdia.closed_form import Verdict, recover


def _true_inputs(model, observation, secret, layer):
  taps = {layer.path: (jnp.zeros((observation.batch_size, layer.outputs)),)}
  apply = model.apply_tapped
  return np.asarray(apply(observation.params, secret.masks, secret.images, taps)[1][layer.path][0])


def _check_features(model, observation, secret, parts, layers, sites):
  """Checks features and masks that were recovered; returns the order of the images."""
  order = None
  for layer in layers:
    assert parts.known_features[layer.path].all()
    true, found = _true_inputs(model, observation, secret, layer), parts.features[layer.path]
    order = order or [int(np.argmin(np.linalg.norm(found - row, axis=1))) for row in true]
    np.testing.assert_allclose(found[order], true, atol=1e-4)
  assert order is not None and sorted(order) == list(range(len(order)))
  for site in sites:
    assert parts.known_masks[site].all()
    assert np.array_equal(parts.masks[site][order], secret.masks[site])
  assert np.array_equal(parts.labels[order], secret.labels) and parts.known_labels.all()
  return order


def test_a_convolutional_network_gives_a_batch_away():
  model = make_lenet()
  observation, secret = observe_victims(model, 3)
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all() and recovery.reason == "", recovery
  layers = (*model.dense(3), *model.convolutions)
  order = _check_features(model, observation, secret, recovery.parts, layers, secret.masks)
  np.testing.assert_allclose(recovery.parts.images[order], secret.images, atol=1e-4)


def test_of_a_batch_behind_convolutions_as_much_is_told_as_equations_suffice_for():
  model = make_lenet(channels=4)
  observation, secret = observe_victims(model, 3)
  recovery = recover(jax.random.key(0), model, observation)
  assert not recovery.parts.verdict.any()
  assert "are too few for the 768 inputs of conv_1" in recovery.reason
  layers = [x for x in (*model.dense(3), *model.convolutions) if x.path[0] in ("hidden", "conv_2")]
  sites = ("dropout_1", "dropout_2", "dropout_3")
  _check_features(model, observation, secret, recovery.parts, layers, sites)
  assert not recovery.parts.known_masks["dropout_0"].any()
  assert not recovery.parts.known_features[("conv_1",)].any()
  # An audit searches the masks of the first site with more total variation.
  name, attack = choose_attack(model, observation, recovery)
  assert name == "hybrid_tv"
  assert attack == attacks.hybrid(model, tv_weight=attacks.dia_tv(model).settings.tv_weight)


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_a_convolutional_network_gives_one_image_away(rate):
  model = make_lenet(rate=rate)
  observation, secret = observe_victims(model, 1)
  recovery = recover(jax.random.key(0), model, observation)
  parts = recovery.parts
  assert parts.verdict[0] == Verdict.EXACT and recovery.reason == "", recovery
  score = compute_scores(model, secret, recovery)[0]
  assert score["mse_normalized"] < 1e-8 and score["label_accuracy"] == 1
  for site in secret.masks:
    assert parts.known_masks[site].all()
    assert np.array_equal(parts.masks[site], secret.masks[site])
  for layer in (*model.convolutions, *model.dense(1)):
    true = _true_inputs(model, observation, secret, layer)
    np.testing.assert_allclose(parts.features[layer.path], true, atol=1e-4)
  assert len(parts.features) == 5


@pytest.mark.slow
def test_what_the_equations_leave_open_is_filled_in_and_not_called_exact():
  model = make_lenet(channels=4)
  observation, secret = observe_victims(model, 1)
  recovery = recover(jax.random.key(0), model, observation)
  assert recovery.parts.verdict[0] == Verdict.APPROXIMATE
  assert "equations determine the 256 inputs of conv_0 in part" in recovery.reason
  score = compute_scores(model, secret, recovery)[0]
  assert score["mse_normalized"] < 0.3 and score["mask_accuracy"] == 1
  assert not recovery.parts.known_features.get(("conv_0",), np.zeros(1)).any()


class Convolutions(nn.Module):
  """A network whose convolutions end in what stands before the classifier.

  Attributes:
    kind: what is unusual about it.
  """

  kind: str

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Conv(12, (5, 5), 2, padding=2, use_bias=False, name="one")(x)
    x = nn.relu(x) if self.kind == "relu" else nn.silu(x)
    x = nn.Dropout(0.3, name="drop")(x, deterministic=not train)
    x = nn.Conv(12, (3, 3), feature_group_count=2, name="two")(x)
    if self.kind == "norm":
      x = nn.GroupNorm(4)(x)
    x = nn.tanh(x)
    if self.kind == "pooled":
      x = nn.avg_pool(x, (2, 2), (2, 2))
    return nn.Dense(10, name="last")(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
  "kind", [pytest.param("plain", marks=pytest.mark.slow), "relu", "norm", "pooled"]
)
def test_convolutions_of_other_networks(kind):
  model = models.from_flax(Convolutions(kind), (16, 16, 1))
  assert [layer.path for layer in model.convolutions] == [("one",), ("two",)]
  observation, secret = observe_victims(model, 1)
  recovery = recover(jax.random.key(0), model, observation)
  if kind == "plain":
    assert recovery.parts.verdict[0] == Verdict.EXACT, recovery.summary()
    assert compute_scores(model, secret, recovery)[0]["mse_normalized"] < 1e-6
    assert np.array_equal(recovery.parts.masks["drop"], secret.masks["drop"])
  else:
    assert recovery.parts.verdict[0] != Verdict.EXACT and recovery.reason
  for site, known in recovery.parts.known_masks.items():
    right = recovery.parts.masks[site] == secret.masks[site]
    assert np.all(right | ~known), (site, recovery.summary())


class Wide(nn.Module):
  """A convolution and two dense layers, each with dropout."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.sigmoid(nn.Conv(32, (5, 5), 2)(x))
    x = nn.Dropout(0.25, name="first")(x, deterministic=not train)
    x = nn.sigmoid(nn.Dense(128)(x.reshape(x.shape[0], -1)))
    x = nn.Dropout(0.25, name="second")(x, deterministic=not train)
    return nn.Dense(1000)(x)


@pytest.mark.slow
def test_an_image_of_twelve_thousand_inputs_is_exact():
  model = models.from_flax(Wide(), (64, 64, 3))
  observation, secret = observe_victims(model, 1, dataset="imagenet")
  recovery = recover(jax.random.key(0), model, observation)
  assert recovery.parts.verdict[0] == Verdict.EXACT, recovery.summary()
  assert compute_scores(model, secret, recovery)[0]["mse_normalized"] < 1e-8
  assert all(
    np.array_equal(recovery.parts.masks[site], secret.masks[site]) for site in secret.masks
  )
