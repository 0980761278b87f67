"""Training as clients do it, with dropout: weights that have learnt something."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdia.client.losses import CROSS_ENTROPY, Loss
from jaxdia.client.step import client_loss
from jaxdia.core.errors import InputError, check_count
from jaxdia.core.types import Key, Params
from jaxdia.models import DropoutModel, sample_masks


def train(
  key: Key,
  model: DropoutModel,
  params: Params,
  images: Any,
  labels: Any,
  steps: int,
  *,
  batch_size: int = 64,
  learning_rate: float = 1e-3,
  loss: Loss = CROSS_ENTROPY,
) -> tuple[Params, jax.Array]:
  """Trains a network with its dropout by Adam.

  Args:
    key: random key, of the batches and the masks.
    model: the network.
    params: to begin with.
    images: f[N, H, W, C], normalised, of the params' type.
    labels: i[N] classes.
    steps: how many.
    batch_size: of each step, drawn from all images.
    learning_rate: of Adam.
    loss: of the logits.

  Returns:
    The trained params; and f[steps], the loss of each batch.

  Raises:
    InputError: there are fewer images than a batch takes, or a number is no count.
  """
  images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
  steps, batch_size = check_count("steps", steps, 1), check_count("batch_size", batch_size, 1)
  if batch_size > len(images):
    raise InputError(
      f"batch_size is {batch_size}; expected no more than the {len(images)} images to train on."
    )
  keys = jax.random.split(key, steps)
  return _train(keys, model, params, images, labels, batch_size, learning_rate, loss)


@functools.partial(jax.jit, static_argnums=(5, 7))
def _train(keys, model, params, images, labels, batch_size, learning_rate, loss):
  optimizer = optax.adam(learning_rate)

  def step(carry, key):
    params, state = carry
    of_batch, of_masks = jax.random.split(key)
    chosen = jax.random.choice(of_batch, len(images), (batch_size,), replace=False)
    masks = sample_masks(of_masks, model, batch_size, images.dtype)
    value, gradient = jax.value_and_grad(client_loss, argnums=1)(
      model, params, masks, images[chosen], labels[chosen], loss
    )
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return params, losses


@jax.jit
def accuracy(model: DropoutModel, params: Params, images: Any, labels: Any) -> jax.Array:
  """Returns the share of images that a network classifies rightly in evaluation mode, f[].

  Args:
    model: the network.
    params: its parameters.
    images: f[N, H, W, C], normalised.
    labels: i[N] classes.
  """
  return jnp.mean(jnp.argmax(model.apply(params, None, images), axis=1) == labels)
