"""What an experiment is about: images, network, clients, and the pool to identify images in."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxdia import data
from jaxdia.client import LocalUpdate, Observation, Secret, as_local, observe, shuffled
from jaxdia.core.errors import InputError
from jaxdia.core.types import Key, Masks, Params
from jaxdia.experiment.config import ClientsSettings, DataSettings
from jaxdia.experiment.network import create_model, source_digest
from jaxdia.models import DropoutModel

# Images among which a reconstruction is to be identified, if the source has so many, and the most
# pixels that they may have in all.
_POOL = 1_000
_POOL_PIXELS = 2**24
# Of the gradients that were asked for last, so many are kept: what is computed for one trial is
# asked for several times.
KEPT = 2

T = TypeVar("T")


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
    params: the weights that the server sent to all.
    local: what they do before they send anything; None for one gradient.
    observations: what the server sees, by gradient number.
    unlabelled: the same without the labels.
    secrets: what it does not see.
    masks: the part of the secrets that a well-informed attack is told.
  """

  def __init__(self, settings: ClientsSettings):
    """Loads the images and draws the weights; no gradient is computed.

    Args:
      settings: all that the clients depend on.

    Raises:
      InputError: about the images or the network.
    """
    self.settings = settings
    self.data: data.Victims = load_images(settings.data)
    shape = self.data.images.shape[1:]
    self.model: DropoutModel = create_model(settings.model, shape, self.data.num_classes)
    key = jax.random.key(settings.seed)
    params = _draw_params(self.model, jax.random.fold_in(key, 0))
    self.params: Params = jax.tree.map(lambda x: x.astype(settings.precision), params)
    self._client_key = jax.random.fold_in(key, 1)
    local, size = settings.local.update, settings.data.batch_size
    if settings.local.shuffle:
      local = shuffled(jax.random.fold_in(key, 2), local, size)
    self.local: LocalUpdate | None = as_local(local)
    count = settings.data.gradients
    pairs = Lazy(count, self._observe, KEPT)
    self.observations: Sequence[Observation] = Lazy(count, lambda i: pairs[i][0])
    self.unlabelled: Sequence[Observation] = Lazy(
      count, lambda i: dataclasses.replace(pairs[i][0], labels=None)
    )
    self.secrets: Sequence[Secret] = Lazy(count, lambda i: pairs[i][1])
    self.masks: Sequence[Masks | None] = Lazy(count, lambda i: pairs[i][1].masks)

  def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
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

  @functools.cached_property
  def pool(self) -> np.ndarray:
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
