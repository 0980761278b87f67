"""What an experiment is about: images, network, clients, and the pool to identify images in."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Integer

from jaxdia import data
from jaxdia.client import LocalUpdate, Observation, Secret, observe
from jaxdia.client.defences import Defence
from jaxdia.client.training import accuracy, train
from jaxdia.core.errors import InputError
from jaxdia.core.machine import memory_of
from jaxdia.core.types import HostImages, Key, Masks, Params
from jaxdia.experiment.config import ClientsSettings, DataSettings
from jaxdia.experiment.network import count_weights, create_model, source_digest
from jaxdia.experiment.training import DELTA
from jaxdia.models import DropoutModel

# Images among which a reconstruction is to be identified, if the source has so many, and the most
# pixels that they may have in all.
_POOL = 1_000
_POOL_PIXELS = 2**24
# Of the gradients that were asked for last, so many are kept: what is computed for one trial is
# asked for several times.
KEPT = 2
_BYTES_OF_A_WEIGHT = 4

T = TypeVar("T")


def _check_size(model: DropoutModel) -> None:
  """Refuses a network whose weights and one gradient do not fit into the memory."""
  weights, memory = count_weights(model), memory_of(jax.local_devices()[0])
  if 2 * _BYTES_OF_A_WEIGHT * weights > memory:
    raise InputError(
      f"the network has {weights:,} weights, which with a gradient take"
      f" {2 * _BYTES_OF_A_WEIGHT * weights / 2**30:,.0f} GiB; expected no more than the"
      f" {memory / 2**30:,.0f} GiB of this device. Make it smaller by the options of config.model."
    )


class Lazy(Sequence[T]):
  """A sequence whose items are computed when they are asked for; the last ones are kept."""

  def __init__(self, count: int, compute: Callable[[int], T], kept: int = 0):
    """Keeps the function; nothing is computed.

    Args:
      count: number of items.
      compute: gives an item by its place, always the same.
      kept: of so many items, those that were asked for last, the results are kept.
    """
    self._count = count
    self._compute = functools.lru_cache(maxsize=kept)(compute) if kept else compute

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: Any) -> Any:  # an item, never a slice
    return self._compute(range(self._count)[i])


class Clients:
  """The clients of an experiment, and what the server sees of them.

  A client has one batch of images. Gradient number i is that of client i modulo the number of
  clients: all clients with the first masks, then all with the second, and so on. Gradients and
  masks are drawn from keys, and computed when they are asked for; few are kept.

  Attributes:
    settings: all that they depend on.
    data: their images and labels.
    model: their network.
    local: what they do before they send anything; None for one gradient.
    observations: what the server sees, by gradient number.
    unlabelled: the same without the labels.
    secrets: what it does not see.
    masks: the part of the secrets that a well-informed attack is told.
  """

  def __init__(self, settings: ClientsSettings):
    """Loads the images; nothing is computed.

    Args:
      settings: all that the clients depend on.

    Raises:
      InputError: about the images or the network.
    """
    self.settings = settings
    self.data: data.Victims = load_images(settings.data)
    shape = self.data.images.shape[1:]
    self.model: DropoutModel = create_model(settings.model, shape, self.data.num_classes)
    _check_size(self.model)
    key = self._key = jax.random.key(settings.seed)
    self._client_key = jax.random.fold_in(key, 1)
    size = settings.data.batch_size
    self.local: LocalUpdate | None = settings.local.of(jax.random.fold_in(key, 2), size)
    count = settings.data.gradients
    pairs = Lazy(count, self._observe, KEPT)
    self.observations: Sequence[Observation] = Lazy(count, lambda i: pairs[i][0])
    self.unlabelled: Sequence[Observation] = Lazy(
      count, lambda i: dataclasses.replace(pairs[i][0], labels=None)
    )
    self.secrets: Sequence[Secret] = Lazy(count, lambda i: pairs[i][1])
    self.masks: Sequence[Masks | None] = Lazy(count, lambda i: pairs[i][1].masks)

  @functools.cached_property
  def params(self) -> Params:
    """The weights that the server sent; drawn, and trained, when they are first asked for."""
    params = _draw_params(self.model, jax.random.fold_in(self._key, 0))
    params = jax.tree.map(lambda x: x.astype(self.settings.precision), params)
    if self.settings.training.before:
      params = self._train(jax.random.fold_in(self._key, 3), params)
    return params

  def batch(self, number: int) -> tuple[HostImages, Integer[np.ndarray, " batch"]]:
    """Returns images, f32[B, H, W, C], normalised, and labels of a client.

    Args:
      number: of one of its gradients.
    """
    client, size = number % self.settings.data.batches, self.settings.data.batch_size
    mine = slice(client * size, (client + 1) * size)
    images = data.normalize(self.data.images[mine], self.data.statistics)
    return images, self.data.labels[mine]

  def _observe(self, number: int) -> tuple[Observation, Secret]:
    """Lets a client compute a gradient."""
    mask_seed, client = divmod(number, self.settings.data.batches)
    key = self._client_key
    if mask_seed:
      key = jax.random.fold_in(key, 2**31 + mask_seed)
    return observe(
      jax.random.fold_in(key, client),
      self.model,
      self.params,
      *self.batch(number),
      statistics=self.data.statistics,
      defence=self.settings.defence,
      local=self.local,
    )

  def _train(self, key: Key, params: Params) -> Params:
    """Returns the weights before the gradients that are attacked."""
    settings, training = self.settings, self.settings.training
    return train(
      key,
      self.model,
      params,
      *self._load(str(training.source)),
      training.before,
      batch_size=settings.data.batch_size,
      clients=training.clients,
      learning_rate=training.learning_rate,
      defence=settings.defence,
    )

  def _load(self, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images of a source, as those that are attacked are, and their labels."""
    count, settings = data.available(source), self.settings
    of_all = dataclasses.replace(
      settings.data, source=source, offset=0, count=count, batch_size=1, num_classes=None
    )
    loaded = load_images(of_all)
    if loaded.images.shape[1:] != self.data.images.shape[1:]:
      raise InputError(
        f"{source} has images of shape {loaded.images.shape[1:]}, but those that are attacked have"
        f" {self.data.images.shape[1:]}. Set config.data.image_size, or train on others."
      )
    if loaded.num_classes > self.data.num_classes:
      raise InputError(
        f"{source} has {loaded.num_classes} classes, but the images that are attacked have"
        f" {self.data.num_classes}. Set config.data.num_classes, or train on others."
      )
    images = data.normalize(loaded.images, self.data.statistics)
    return images.astype(settings.precision), loaded.labels

  def test(self) -> float | None:
    """Returns the share of the test images that the network gets right, or None.

    Raises:
      InputError: about these images.
    """
    source = self.settings.training.test_source
    if source is None:
      return None
    return float(accuracy(self.model, self.params, *self._load(source)))

  @functools.cached_property
  def pool(self) -> Float[np.ndarray, "pool height width channels"]:
    """f32[P, H, W, C], pixels of the first images of the source, and of the clients.

    They alone if other images of the source cannot be used.
    """
    settings, images = self.settings.data, self.data.images
    count = max(1, min(data.available(settings.source), _POOL, _POOL_PIXELS // images[0].size))
    try:
      others = load_images(
        dataclasses.replace(settings, offset=0, count=count, batch_size=1)
      ).images
    except InputError:
      return images
    beyond = np.arange(settings.offset, settings.offset + settings.count) >= count
    if others.shape[1:] != images.shape[1:]:
      return images
    return np.concatenate([others, images[beyond]]) if beyond.any() else others

  @functools.cached_property
  def digests(self) -> dict[str, dict[str, Any]]:
    """What tells these clients from others of the same settings, as after a file changed."""
    source = source_digest(self.settings.model)
    return {
      "data": {"sha256": digest(self.data)},
      "model": {} if source is None else {"sha256": source},
    }


@functools.lru_cache(maxsize=8)  # cells of a study differ in when they are attacked
def _test(settings: ClientsSettings) -> float | None:
  return Clients(settings).test()


def trained_accuracy(settings: ClientsSettings) -> float | None:
  """Returns the share of the test images that the network gets right after its training, or None.

  Args:
    settings: of the clients.

  Raises:
    InputError: about the images to train or to test on.
  """
  whole = dataclasses.replace(settings.training, attacked_after=None)
  return _test(settings._replace(training=whole))


def epsilon(settings: ClientsSettings) -> float | None:
  """Returns ε of the whole training at `DELTA`, by `Defence.epsilon`; None if there is none.

  Each step is taken to draw its images by chance, independently of each other.

  Args:
    settings: of the clients.
  """
  training = settings.training
  if not training.steps:
    return None
  count = data.available(str(training.source))
  share = min(1.0, training.clients * settings.data.batch_size / count)
  return _epsilon(settings.defence, training.steps, share)


@functools.lru_cache  # it takes seconds, and cells of a study differ in other things
def _epsilon(defence: Defence, steps: int, share: float) -> float | None:
  try:
    found = defence.epsilon(DELTA, steps, share)
  except InputError:  # nothing is installed that computes it
    return None
  return found if math.isfinite(found) else None


@jax.jit  # once for a network at all its rates
def _draw_params(model: DropoutModel, key: Key) -> Params:
  return model.init(key)


def load_images(settings: DataSettings) -> data.Victims:
  """Loads the images that are attacked.

  Args:
    settings: which.

  Raises:
    InputError: see `jaxdia.data.load`.
  """
  return data.load(
    settings.source,
    settings.count,
    settings.offset,
    image_size=settings.image_size,
    num_classes=settings.num_classes,
    statistics=settings.statistics,
  )


def digest(loaded: data.Victims) -> str:
  """Returns the SHA-256 of images, labels and the number of classes.

  Args:
    loaded: of `load_images`.
  """
  sha = hashlib.sha256()
  for array in (loaded.images, loaded.labels, np.asarray(loaded.num_classes)):
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()
