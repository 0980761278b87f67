"""What ordinary Flax modules do besides layers and dropout."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdia import closed_form, models
from jaxdia.client import client_gradient, observe

SHAPE = (4, 4, 1)


def _victim(module, batch_size=1):
  model = models.from_flax(module, SHAPE)
  params = model.init(jax.random.key(0))
  images = np.random.default_rng(0).uniform(size=(batch_size, *SHAPE)).astype(np.float32)
  labels = np.arange(batch_size) % model.num_classes
  return model, params, *observe(jax.random.key(1), model, params, images, labels)


class Recurrent(nn.Module):
  """Reads an image line by line; the carry of its loop is float32, whatever the inputs are."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.RNN(nn.GRUCell(8))(x[..., 0], initial_carry=jnp.zeros((len(x), 8), jnp.float32))
    return nn.Dense(3)(nn.Dropout(0.5)(x.reshape(len(x), -1), deterministic=not train))


def test_a_loop_that_carries_float32_is_the_reason_of_the_closed_form():
  model, _, observation, _ = _victim(Recurrent())
  recovery = closed_form.recover(jax.random.key(0), model, observation)
  assert not recovery.parts.verdict.any()
  assert "cannot be computed in float64" in recovery.reason and "carry" in recovery.reason


class Partitioned(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("inputs", "model"))
    x = nn.Dense(8, kernel_init=init)(x.reshape(len(x), -1))
    return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=not train))


def test_params_with_names_of_axes_are_plain_arrays():
  model, params, observation, secret = _victim(Partitioned(), 2)
  boxed = Partitioned().init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)["params"]
  plain = jax.tree.structure(nn.unbox(boxed))
  assert plain != jax.tree.structure(boxed)
  assert jax.tree.structure(params) == jax.tree.structure(observation.gradient) == plain
  inputs = (secret.masks, secret.images, secret.labels)
  gradient = client_gradient(model, nn.unbox(boxed), *inputs)
  assert jax.tree.structure(gradient) == plain


class Probabilities(nn.Module):
  last: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3)(x.reshape(len(x), -1))
    return {"softmax": nn.softmax, "log_softmax": nn.log_softmax, "none": lambda x: x}[self.last](x)


def test_a_softmax_that_is_taken_for_logits_is_warned_of():
  with pytest.warns(UserWarning, match="outputs of Probabilities are a softmax"):
    models.from_flax(Probabilities("softmax"), SHAPE)


@pytest.mark.parametrize("last", ["none", "log_softmax"])
def test_what_the_loss_takes_as_it_is_makes_no_warning(last):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    models.from_flax(Probabilities(last), SHAPE)


class OwnKey(nn.Module):
  """Draws dropout from a stream of its own name."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
    x = nn.Dropout(0.5)(x, deterministic=not train, rng=self.make_rng("abc"))
    return nn.Dense(3)(x)


class OwnStream(nn.Module):
  """The same by the field that Flax has for it."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
    x = nn.Dropout(0.5, rng_collection="abc")(x, deterministic=not train)
    return nn.Dense(3)(x)


@pytest.mark.parametrize("module", [OwnKey(), OwnStream()])
def test_dropout_from_a_stream_of_another_name_has_explicit_masks(module):
  model, params, observation, secret = _victim(module, 2)
  assert list(model.mask_shapes(2).values()) == [(2, 16)]

  def loss(params):
    rngs = {"abc": jax.random.key(5)}
    logits = module.apply({"params": params}, secret.images, rngs=rngs)
    return -jnp.mean(nn.log_softmax(logits)[jnp.arange(2), secret.labels])

  masks = models.read_masks(model, params, secret.images, {"abc": jax.random.key(5)})
  assert 0 < np.mean(masks["Dropout_0"]) < 1
  ours = client_gradient(model, params, masks, secret.images, secret.labels)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, jax.grad(loss)(params)
  )
