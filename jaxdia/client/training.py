"""Training by what clients send, with dropout and defences: weights that have learnt something."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Integer

from jaxdia.client.defences import Defence, Step, identity
from jaxdia.client.losses import CROSS_ENTROPY, Loss
from jaxdia.client.step import client_gradient
from jaxdia.core.errors import InputError, check_count
from jaxdia.core.types import Array, Images, ImagesLike, Key, LabelsLike, Params, Scalar
from jaxdia.models import DropoutModel, sample_masks


def train(
  key: Key,
  model: DropoutModel,
  params: Params,
  images: ImagesLike,
  labels: LabelsLike,
  steps: int,
  *,
  batch_size: int = 64,
  clients: int = 1,
  learning_rate: float = 1e-3,
  loss: Loss = CROSS_ENTROPY,
  defence: Defence = identity,
) -> Params:
  """Trains a network with its dropout: the server descends the mean of what clients send by Adam.

  Args:
    key: random key, of the batches, the masks and what defences draw. The first steps of a longer
      training with the same key are those of a shorter one.
    model: the network.
    params: to begin with.
    images: f[N, H, W, C], normalised, of the params' type.
    labels: i[N] classes.
    steps: how many.
    batch_size: of each client in a step.
    clients: in a step; their images are drawn from all, and differ.
    learning_rate: of Adam.
    loss: of the logits.
    defence: what each client does to its gradient before it sends it.

  Returns:
    The trained params.

  Raises:
    InputError: there are fewer images than the clients of a step take, a number is no count, or the
      defence does not suit the network.
  """
  images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
  steps, batch_size = check_count("steps", steps, 1), check_count("batch_size", batch_size, 1)
  clients = check_count("clients", clients, 1)
  if clients * batch_size > len(images):
    raise InputError(
      f"{clients} clients with batch_size {batch_size} take {clients * batch_size} images a step;"
      f" expected no more than the {len(images)} images to train on."
    )
  shape = (clients, batch_size)
  return _train(key, model, params, images, labels, steps, learning_rate, defence, shape, loss)


@functools.partial(jax.jit, static_argnums=(8, 9))
def _train(key, model, params, images, labels, steps, learning_rate, defence, shape, loss):
  optimizer = optax.adam(learning_rate)

  def send(key, params, images, labels):
    of_masks, of_defence = jax.random.split(key)
    masks = sample_masks(of_masks, model, len(images), images.dtype)
    gradient = client_gradient(model, params, masks, images, labels, loss)
    return defence(of_defence, gradient, Step(model, params, masks, images, labels, loss))

  def step(number, carry):
    params, state = carry
    of_batches, *of_clients = jax.random.split(jax.random.fold_in(key, number), 1 + shape[0])
    chosen = jax.random.choice(of_batches, len(images), shape, replace=False)
    sent = jax.vmap(send, (0, None, 0, 0))(
      jnp.stack(of_clients), params, images[chosen], labels[chosen]
    )
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), sent)
    updates, state = optimizer.update(mean, state)
    return optax.apply_updates(params, updates), state

  return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]


@jax.jit
def accuracy(
  model: DropoutModel, params: Params, images: Images, labels: Integer[Array, " batch"]
) -> Scalar:
  """Returns the share of images that a network classifies rightly in evaluation mode, f[].

  Args:
    model: the network.
    params: its parameters.
    images: f[N, H, W, C], normalised.
    labels: i[N] classes.
  """
  return jnp.mean(jnp.argmax(model.apply(params, None, images), axis=1) == labels)
