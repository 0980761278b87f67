"""What a gradient gives away behind convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import compute_scores, make_lenet, observe_victims
from flax import linen as nn

from jaxdia import models
from jaxdia.closed_form import Verdict, recover


def _true_inputs(model, observation, secret, layer):
  taps = {layer.path: (jnp.zeros((observation.batch_size, layer.outputs)),)}
  apply = model.apply_tapped
  return np.asarray(apply(observation.params, secret.masks, secret.images, taps)[1][layer.path][0])


def test_features_of_a_convolutional_network():
  model = make_lenet()
  observation, secret = observe_victims(model, 3)
  recovery = recover(jax.random.key(0), model, observation)
  parts = recovery.parts
  assert not parts.verdict.any() and "features, not with pixels" in recovery.reason
  assert all(known.all() for known in parts.known_features.values())
  layer = next(x for x in model.dense(3) if x.path == ("hidden",))
  true, found = _true_inputs(model, observation, secret, layer), parts.features[layer.path]
  order = [int(np.argmin(np.linalg.norm(found - row, axis=1))) for row in true]
  assert sorted(order) == list(range(3))
  np.testing.assert_allclose(found[order], true, atol=1e-4)
  assert np.array_equal(parts.labels[order], secret.labels) and parts.known_labels.all()
  for site in ("dropout_2", "dropout_3"):
    assert parts.known_masks[site].all()
    assert np.array_equal(parts.masks[site][order], secret.masks[site])
  assert not parts.known_masks["dropout_0"].any()


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
