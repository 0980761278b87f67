"""What an experiment is about: images, network, clients, and the pool to identify images in."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np

from jaxdia import data, models
from jaxdia.client import Observation, Secret, observe
from jaxdia.config import DataSettings, ExperimentSettings
from jaxdia.core.errors import InputError
from jaxdia.models import DropoutModel

# Images among which a reconstruction is to be identified, if the source has so many, and the most
# pixels that they may have in all.
_POOL = 1_000
_POOL_PIXELS = 2**24


def load_victims(settings: DataSettings) -> data.Victims:
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


def load_pool(settings: DataSettings, victims: data.Victims) -> np.ndarray:
  """Returns f32[P, H, W, C], pixels of the first images of the source, and of the victims.

  Args:
    settings: where the images come from.
    victims: that are attacked; they alone if other images of the source cannot be used.
  """
  most = _POOL_PIXELS // victims.images[0].size
  count = max(1, min(data.available(settings.source), _POOL, most))
  try:
    others = load_victims(dataclasses.replace(settings, offset=0, count=count)).images
  except InputError:
    return victims.images
  beyond = np.arange(settings.offset, settings.offset + settings.count) >= count
  if others.shape[1:] != victims.images.shape[1:]:
    return victims.images
  return np.concatenate([others, victims.images[beyond]]) if beyond.any() else others


def create_model(options: dict[str, Any], victims: data.Victims) -> DropoutModel:
  """Creates the network of an experiment.

  Those that differ in rates alone are one network, so that attacks on them share a program.

  Args:
    options: of `ExperimentSettings.model`: name, dropout_rate and what the network takes.
    victims: tell the shape of images and the number of classes.

  Raises:
    InputError: see `jaxdia.models.create`.
  """
  rate = models.check_rate(options["dropout_rate"])
  others = json.dumps({k: v for k, v in options.items() if k != "dropout_rate"}, sort_keys=True)
  network = _network(others, victims.images.shape[1:], victims.num_classes, rate > 0)
  return network.at_rates(dict.fromkeys(network.rates, rate))


@functools.cache  # those that share a program must be one
def _network(options_json, image_shape, num_classes, with_dropout) -> DropoutModel:
  """Returns a network at any rate above 0, or at 0."""
  options = json.loads(options_json)
  rate = 0.5 if with_dropout else 0.0
  return models.create(options.pop("name"), image_shape, num_classes, rate, **options)


def observe_clients(
  settings: ExperimentSettings, model: DropoutModel, victims: data.Victims
) -> tuple[list[Observation], list[Secret]]:
  """Draws the weights, and lets each client compute its gradients.

  Args:
    settings: of the experiment.
    model: its network.
    victims: images and labels of the clients.

  Returns:
    What the server sees of each gradient, and what it does not: all batches with the first
    masks, then with the second, and so on.
  """
  key = jax.random.key(settings.seed)
  params = jax.jit(model.init)(jax.random.fold_in(key, 0))
  params = jax.tree.map(lambda x: x.astype(settings.precision), params)
  client_key = jax.random.fold_in(key, 1)
  seeds = [client_key] + [
    jax.random.fold_in(client_key, 2**31 + seed) for seed in range(1, settings.data.mask_seeds)
  ]
  images = data.normalize(victims.images, victims.statistics)
  size = settings.data.batch_size
  pairs = [
    observe(
      jax.random.fold_in(seed, i),
      model,
      params,
      images[i * size : (i + 1) * size],
      victims.labels[i * size : (i + 1) * size],
      statistics=victims.statistics,
    )
    for seed in seeds
    for i in range(len(images) // size)
  ]
  observations, secrets = zip(*pairs, strict=True)
  return list(observations), list(secrets)
