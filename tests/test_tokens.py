"""Language models: their masks, their embeddings as inputs, and what their gradients tell."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdia import attacks
from jaxdia.client import client_gradient, defences
from jaxdia.client.tokens import observe_tokens
from jaxdia.closed_form.tokens import NO_TOKEN, read
from jaxdia.closed_form.tokens.reading import tokens_sent
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_path
from jaxdia.evaluation.text import assign_tokens, score_tokens
from jaxdia.models.tokens import create_language_model, from_flax_tokens

VOCABULARY, LENGTH, BATCH = 300, 10, 3
SMALL = {"width": 96, "num_heads": 4, "mlp_size": 64, "depth": 2}


def _model(name="bert", **options):
  options = {"num_classes": 2 if name == "bert" else None} | SMALL | options
  return create_language_model(name, VOCABULARY, LENGTH, **options)


def _client(model, tokens=None, key=1, **options):
  if tokens is None:
    tokens = np.random.default_rng(key).integers(0, VOCABULARY, (BATCH, LENGTH))
  labels = None if model.network.predicts_tokens else np.arange(len(tokens)) % 2
  params = model.init(jax.random.key(0))
  return observe_tokens(jax.random.key(key), model, params, tokens, labels, **options)


def _ordered(reading, secret):
  """Returns tokens and masks of a reading in the order of the client's sequences."""
  order = assign_tokens(reading.tokens, np.asarray(secret.tokens))
  masks = {site: np.asarray(mask)[order] for site, mask in reading.masks.items()}
  return reading.tokens[order], masks


@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_embeddings_are_an_input_like_tokens(name):
  model = _model(name)
  observation, secret = _client(model)
  images = model.embed(observation.params, secret.tokens)
  assert images.shape == (BATCH, *model.model.image_shape) == (BATCH, LENGTH, 1, 96)
  np.testing.assert_array_equal(model.nearest(observation.params, images), secret.tokens)
  of_tokens = model.apply(observation.params, secret.masks, secret.tokens)
  of_images = model.model.apply(observation.params, secret.masks, images)
  np.testing.assert_allclose(of_images, of_tokens, atol=2e-5)


def test_without_masks_a_gradient_is_that_of_the_module_in_evaluation_mode():
  model = _model()
  observation, secret = _client(model)

  def loss(params):
    logits = model.network.module.apply({"params": params}, secret.tokens, train=False)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), secret.labels])

  def ours(params):
    logits = model.apply(params, None, secret.tokens)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), secret.labels])

  for one, other in zip(
    *(jax.tree.leaves(jax.grad(f)(observation.params)) for f in (loss, ours)), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_at_the_truth_the_dummy_gradient_is_the_clients():
  model = _model()
  observation, secret = _client(model)
  images = model.embed(observation.params, secret.tokens)
  dummy = leaves_by_path(
    client_gradient(model.model, observation.params, secret.masks, images, secret.labels)
  )
  sent = leaves_by_path(observation.gradient)
  assert model.network.table not in sent
  for path, leaf in sent.items():
    np.testing.assert_allclose(dummy[path], leaf, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_tokens_masks_and_sequences_of_an_encoder_are_exact(rate):
  model = _model(dropout_rate=rate)
  observation, secret = _client(model)
  reading = read(model, observation)
  assert reading.verdict == "exact", reading.reason
  assert reading.read.all()
  tokens, masks = _ordered(reading, secret)
  np.testing.assert_array_equal(tokens, secret.tokens)
  assert list(masks) == ["embedding_dropout"]
  # Entries of next to no size cannot be told.
  assert np.mean(masks["embedding_dropout"] == secret.masks["embedding_dropout"]) > 0.999


def test_of_a_causal_network_all_but_the_last_tokens_are_certain():
  model = _model("gpt")
  observation, secret = _client(model)
  reading = read(model, observation)
  assert reading.verdict == "tokens", reading.reason
  assert "guess" in reading.reason
  assert reading.read[:, :-1].all() and not reading.read[:, -1].any()
  tokens, _ = _ordered(reading, secret)
  np.testing.assert_array_equal(tokens[:, :-1], secret.tokens[:, :-1])
  assert (tokens[:, -1] != NO_TOKEN).all()


def test_sequences_may_share_tokens():
  model = _model()
  tokens = np.random.default_rng(3).integers(0, VOCABULARY, (BATCH, LENGTH))
  tokens[:, 0], tokens[:2, 4] = 7, 11
  observation, secret = _client(model, tokens)
  reading = read(model, observation)
  assert reading.verdict == "exact", reading.reason
  np.testing.assert_array_equal(_ordered(reading, secret)[0], tokens)


@pytest.mark.parametrize(
  "defence",
  [
    defences.create("gaussian_noise", std=1e-5),
    defences.create("rounding"),
  ],
)
def test_noised_gradients_are_read_but_not_called_exact(defence):
  model = _model()
  observation, secret = _client(model, defence=defence)
  reading = read(model, observation)
  assert reading.verdict != "exact"
  right = _ordered(reading, secret)[0] == np.asarray(secret.tokens)
  assert right.mean() > 0.9


def test_much_noise_gives_nothing_or_says_that_it_is_partial():
  model = _model()
  observation, _ = _client(model, defence=defences.create("gaussian_noise", std=1.0))
  reading = read(model, observation)
  assert reading.verdict in ("nothing", "partial")


def test_a_batch_that_fills_the_width_is_refused_with_the_reason():
  model = _model(width=24, num_heads=2)
  observation, _ = _client(model)
  reading = read(model, observation)
  assert reading.verdict == "nothing"
  assert "30" in reading.reason or "width of 24" in reading.reason
  assert (reading.tokens == NO_TOKEN).all()


def test_a_wrong_batch_size_is_never_exact():
  model = _model()
  observation, _ = _client(model)
  for size in (BATCH - 1, BATCH + 1):
    wrong = dataclasses.replace(observation, batch_size=size, labels=np.zeros(size, np.int32))
    assert read(model, wrong).verdict in ("nothing", "partial", "tokens")


def test_a_trained_embedding_says_which_tokens_there_are():
  model = _model()
  observation, secret = _client(model, frozen_embedding=False)
  np.testing.assert_array_equal(tokens_sent(model, observation), np.unique(secret.tokens))
  assert tokens_sent(model, _client(model)[0]) is None
  assert read(model, observation).verdict == "exact"


def test_a_check_that_knows_no_dropout_finds_less():
  model = _model(dropout_rate=0.3)
  observation, secret = _client(model)
  blind = read(model, observation, dropout=False)
  assert not blind.read.any()
  right = _ordered(blind, secret)[0] == np.asarray(secret.tokens)
  assert right.mean() < 0.9 < 1.0


class _Own(nn.Module):
  """A network of the user's own: positions looked up too, RMSNorm, attention written by hand."""

  @nn.compact
  def __call__(self, tokens, deterministic=False):
    positions = jnp.arange(tokens.shape[1])[None]
    x = nn.Embed(VOCABULARY, 64, name="wte")(tokens) + nn.Embed(32, 64, name="wpe")(positions)
    x = nn.Dropout(0.2)(x, deterministic=deterministic)
    y = nn.RMSNorm()(x)
    q, k, v = jnp.split(nn.Dense(192, name="qkv")(y), 3, axis=-1)
    weights = nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / 8)
    x = x + nn.Dropout(0.2)(nn.Dense(64)(weights @ v), deterministic=deterministic)
    return nn.Dense(2, name="head")(x.mean(axis=1))


def test_tokens_of_a_network_of_ones_own_are_read_but_not_their_order():
  model = from_flax_tokens(_Own(), LENGTH)
  assert model.network.table == ("wte", "embedding")
  assert model.network.attention is None
  observation, secret = _client(model)
  reading = read(model, observation)
  assert reading.verdict == "tokens", reading.reason
  for position in range(LENGTH):
    assert sorted(reading.tokens[:, position]) == sorted(secret.tokens[:, position].tolist())


def test_a_search_over_embeddings_runs():
  model = _model()
  observation, _ = _client(model)
  attack = attacks.create("dia", model.model, tv_weight=0.0, max_iterations=5)
  state = attacks.solve(jax.random.key(0), attack, observation)
  tokens = model.nearest(observation.params, state.best.candidate.images)
  assert tokens.shape == (BATCH, LENGTH)
  low, high = np.asarray([tokens.min(), tokens.max()])
  assert low >= 0 and high < VOCABULARY


def test_networks_and_clients_that_cannot_be_are_refused():
  class NoEmbedding(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      return nn.Dense(2)(jax.nn.one_hot(tokens, 10).reshape(len(tokens), -1))

  with pytest.raises(InputError, match="nn.Embed"):
    from_flax_tokens(NoEmbedding(), LENGTH)
  with pytest.raises(InputError, match="bert"):
    create_language_model("bart", VOCABULARY, LENGTH)
  with pytest.raises(InputError, match="divisor"):
    _model(num_heads=5)
  with pytest.raises(InputError, match="from 0 to 300"):
    _client(_model(), np.full((2, LENGTH), VOCABULARY) * np.array([[0], [1]]))
  with pytest.raises(InputError, match=r"\(B, 10\)"):
    _client(_model(), np.zeros((2, LENGTH + 1), int))
  model = _model()
  with pytest.raises(InputError, match="labels are missing"):
    observe_tokens(jax.random.key(0), model, model.init(jax.random.key(0)), np.zeros((1, 10), int))


def test_scores_of_sequences():
  truth = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
  found = np.array([[5, 6, 8, 7], [1, 2, NO_TOKEN, 4]])
  order = assign_tokens(found, truth)
  np.testing.assert_array_equal(order, [1, 0])
  first, second = score_tokens(found[order], truth, lambda t: " ".join(f"w{n}" for n in t))
  assert first["token_accuracy"] == 0.75 and first["exact"] == 0 and first["bag_accuracy"] == 0.75
  assert second["token_accuracy"] == 0.5 and second["bag_accuracy"] == 1.0
  assert second["rouge1"] == 1.0 and second["rouge2"] == pytest.approx(1 / 3)
  assert second["rougeL"] == 0.75


@pytest.mark.slow
def test_what_is_called_exact_is_right():
  rng = np.random.default_rng(0)
  verdicts = []
  for case in range(40):
    name = str(rng.choice(["bert", "gpt"]))
    model = _model(name, dropout_rate=float(rng.uniform(0.02, 0.6)), num_classes=2)
    tokens = rng.integers(0, VOCABULARY, (int(rng.integers(1, 7)), LENGTH))
    if case % 4 == 0:  # words that sequences share
      tokens[:, : LENGTH // 2] = rng.integers(0, 5, (len(tokens), LENGTH // 2))
    noise = (
      {}
      if case % 3
      else {"defence": defences.create("gaussian_noise", std=10 ** rng.uniform(-8, -3))}
    )
    observation, secret = _client(model, tokens, key=case, **noise)
    reading = read(model, observation)
    verdicts.append(reading.verdict)
    right = _ordered(reading, secret)[0] == np.asarray(secret.tokens)
    if reading.verdict == "exact":
      assert right.all(), case
  assert verdicts.count("exact") >= 10
