"""Training of a client between two looks of the server: several local steps, several clients."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Integer

from jaxdia.core.errors import InputError, check_count, check_number, unknown
from jaxdia.core.precision import usual_promotion
from jaxdia.core.trees import is_traced, static, value_tree
from jaxdia.core.types import Array, Gradient, Images, Key, Labels, Masks, Number, Params
from jaxdia.models import DropoutModel, sample_masks

Optimizer = Literal["sgd", "adam"]
OPTIMIZERS = typing.get_args(Optimizer)
# Under the root of Adam's second moment. Of an entry that is exactly 0, as dropout leaves it, the
# root has no derivative; those that are much larger than 1e-8 are not changed.
_UNDER_ROOT = 1e-16


@value_tree
class LocalUpdate:
  """What a client does between two looks of the server (FedAvg, McMahan et al. 2017).

  Each epoch goes once through the images, cut into `steps` batches of one size; each step has
  masks of its own. The optimiser starts anew. What is sent is the way that the weights went, as if
  it were a gradient: (before - after) / (learning rate · epochs · steps). With several clients
  their updates are averaged before the server sees them (secure aggregation), and a batch of the
  server's are the images of all of them.

  Attributes:
    epochs: passes through the images.
    steps: of an epoch.
    optimizer: "sgd" or "adam", with optax's defaults.
    learning_rate: of the optimiser.
    momentum: of SGD.
    clients: whose updates are averaged; each has an equal share of the images.
    order: i[draws, images a step], which images each step takes; None if all epochs take
      them as they stand. Indices are those of the whole batch.

  Raises:
    InputError: a value that a field cannot take.
  """

  epochs: int = static(default=1)
  steps: int = static(default=1)
  optimizer: Optimizer = static(default="sgd")
  learning_rate: Number = 0.01
  momentum: Number = 0.0
  clients: int = static(default=1)
  order: Integer[Array, "draws images"] | None = None

  def __post_init__(self):
    for name in ("epochs", "steps", "clients"):
      count = check_count(f"{name} of a local update", getattr(self, name), 1)
      object.__setattr__(self, name, count)
    if self.optimizer not in OPTIMIZERS:
      raise unknown("optimizer of a local update:", self.optimizer, OPTIMIZERS)
    above_0 = (lambda v: v > 0), "a number above 0"
    below_1 = (lambda v: 0 <= v < 1), "a number in [0, 1)"
    for name, expected in (("learning_rate", above_0), ("momentum", below_1)):
      value = getattr(self, name)
      if not is_traced(value):
        number = check_number(f"{name} of a local update", value, *expected)
        value = value if isinstance(value, jax.Array) else number  # of a type of its own
      object.__setattr__(self, name, value)
    if self.optimizer == "adam" and isinstance(self.momentum, float) and self.momentum:
      raise InputError(
        f"momentum of a local update is {self.momentum} with optimizer=adam, which has its own."
        " Leave it out."
      )

  @property
  def draws(self) -> int:
    """How often masks are drawn: steps of all epochs of all clients."""
    return self.clients * self.epochs * self.steps

  @property
  def is_gradient(self) -> bool:
    """Whether what is sent is the gradient of one batch, whatever the numbers are."""
    return self.draws == 1 and self.optimizer == "sgd"

  def images_a_step(self, batch_size: int) -> int:
    """Returns how many images a step takes.

    Args:
      batch_size: images of all clients.

    Raises:
      InputError: they cannot be shared out evenly.
    """
    parts = self.clients * self.steps
    if batch_size % parts:
      raise InputError(
        f"{batch_size} images cannot be shared out evenly among clients={self.clients} with"
        f" steps={self.steps} an epoch; make the batch size a multiple of {parts}."
      )
    return batch_size // parts

  def indices(self, batch_size: int) -> Integer[jax.Array | np.ndarray, "draws images"]:
    """Returns which images each step takes, client after client, epoch after epoch.

    Args:
      batch_size: images of all clients.
    """
    if self.order is not None:
      return self.order
    each = self.images_a_step(batch_size)
    all_images = np.arange(batch_size, dtype=np.int32).reshape(self.clients, 1, self.steps, each)
    return np.tile(all_images, (1, self.epochs, 1, 1)).reshape(self.draws, each)


def shuffled(key: Key, local: LocalUpdate, batch_size: int) -> LocalUpdate:
  """Returns a local update in which each epoch of each client has an order of its own.

  Args:
    key: random key.
    local: without an order.
    batch_size: images of all clients.
  """
  each = local.images_a_step(batch_size)
  mine = local.steps * each
  keys = jax.random.split(key, local.clients * local.epochs)
  orders = jax.vmap(lambda k: jax.random.permutation(k, mine))(keys)
  first = jnp.repeat(jnp.arange(local.clients) * mine, local.epochs)
  order = (first[:, None] + orders).reshape(local.draws, each).astype(jnp.int32)
  return dataclasses.replace(local, order=order)


def as_local(local: LocalUpdate | None) -> LocalUpdate | None:
  """Returns local steps, or None if they are but the gradient of one batch.

  Args:
    local: what a client does before it sends anything; None for one gradient.
  """
  return None if local is None or local.is_gradient else local


def steps_of(local: LocalUpdate | None, batch_size: int) -> tuple[int, int]:
  """Returns how many steps there are in all, and how many images each takes.

  Args:
    local: what a client does; None for one gradient.
    batch_size: images of all clients.
  """
  return (1, batch_size) if local is None else (local.draws, local.images_a_step(batch_size))


def mask_shapes(
  model: DropoutModel, local: LocalUpdate | None, batch_size: int
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each site's mask; with local steps, their number is the first axis.

  Args:
    model: the network.
    local: what the client did; None for one gradient.
    batch_size: images of all clients.
  """
  draws, each = steps_of(local, batch_size)
  shapes = model.mask_shapes(each)
  return shapes if local is None else {site: (draws, *shape) for site, shape in shapes.items()}


def draw_masks(
  key: Key, model: DropoutModel, local: LocalUpdate | None, batch_size: int, dtype=jnp.float32
) -> Masks:
  """Draws the masks of a client's step, or those of all its local steps, as training does.

  Args:
    key: random key.
    model: whose sites to draw for.
    local: what the client does; None for one gradient.
    batch_size: images of all clients.
    dtype: floating-point type of the masks.

  Returns:
    {site: f[shape]} of zeros and ones, shaped as `mask_shapes` says.
  """
  if local is None:
    return sample_masks(key, model, batch_size, dtype)
  draws, each = steps_of(local, batch_size)
  keys = jax.random.split(key, draws)
  return jax.vmap(lambda k: sample_masks(k, model, each, dtype))(keys)


def local_gradient(
  gradient: Callable[[Params, Masks | None, Images, Labels], Gradient],
  params: Params,
  masks: Masks | None,
  images: Images,
  labels: Labels,
  local: LocalUpdate,
) -> Gradient:
  """Returns what clients send after local steps, as if it were a gradient.

  Differentiable by masks, images and labels; the steps are computed anew on the way back, so that
  memory holds the weights of each step and the work of one.

  Args:
    gradient: `gradient(params, masks, images, labels)`, of one step.
    params: to begin with.
    masks: {site: f[draws, shape]}; None for the network without dropout.
    images: f[B, H, W, C], of all clients.
    labels: i[B], or f[B, num_classes].
    local: what the clients do.

  Returns:
    A tree like `params`.
  """
  rate, momentum = local.learning_rate, local.momentum
  with usual_promotion():
    if local.optimizer == "sgd":
      optimizer = optax.chain(optax.trace(momentum), optax.scale(-1.0))
    else:
      optimizer = optax.chain(optax.scale_by_adam(eps_root=_UNDER_ROOT), optax.scale(-1.0))

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(carry: Any, given: Any) -> tuple[Any, None]:
    moved, state = carry  # in units of the learning rate
    masks, chosen = given
    now = jax.tree.map(lambda leaf, way: leaf - (rate * way).astype(leaf.dtype), params, moved)
    found = gradient(now, masks, images[chosen], labels[chosen])
    with usual_promotion():
      updates, state = optimizer.update(found, state)
    return (jax.tree.map(lambda way, update: way - update, moved, updates), state), None

  def train(masks, indices):
    moved = jax.tree.map(jnp.zeros_like, params)
    with usual_promotion():
      start = (moved, optimizer.init(params))
    (moved, _), _ = jax.lax.scan(step, start, (masks, indices))
    return moved

  def by_client(leaf):
    return jnp.reshape(leaf, (local.clients, -1, *leaf.shape[1:]))

  given = jax.tree.map(by_client, (masks, local.indices(images.shape[0])))
  ways = jax.vmap(train)(*given)
  return jax.tree.map(lambda way: jnp.mean(way, axis=0) / (local.epochs * local.steps), ways)
