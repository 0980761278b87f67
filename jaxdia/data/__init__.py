"""Victims: real images as float32 NHWC in [0, 1], with the statistics that normalise them."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxdia.core.errors import InputError, unknown
from jaxdia.core.types import Statistics
from jaxdia.data.sources import SOURCES
from jaxdia.data.statistics import NEUTRAL, STATISTICS, statistics_of

__all__ = [
  "NEUTRAL",
  "SOURCES",
  "STATISTICS",
  "Victims",
  "available",
  "denormalize",
  "load",
  "normalize",
]


# More are a wrong label rather than a data set.
_MAX_CLASSES = 1_000_000


class Victims(NamedTuple):
  """Images to attack.

  Attributes:
    images: f32[N, H, W, C], pixels in [0, 1].
    labels: i32[N].
    num_classes: number of classes of the data set.
    statistics: what normalises the images.
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  statistics: Statistics


def available(source: str) -> int:
  """Returns how many images a source has.

  Args:
    source: as `load` takes it.

  Raises:
    InputError: there is no such source.
  """
  return _read(source, slice(0, 1)).available


def _read(source, wanted):
  kind, _, name = str(source).partition(":")
  if kind not in SOURCES:
    raise unknown("data source", source, [f"{known}:..." for known in SOURCES])
  return SOURCES[kind](name, wanted)


def load(
  source: str,
  count: int,
  offset: int = 0,
  *,
  image_size: int | None = None,
  num_classes: int | None = None,
  statistics: str | None = None,
) -> Victims:
  """Loads consecutive images of a source.

  Args:
    source: "samples:NAME" (20 real images each of mnist, fashion_mnist, cifar10,
      cifar100, imagenet; no network), "tfds:NAME/SPLIT", "npz:PATH" (arrays
      `images`, uint8 or float in [0, 1], NHWC, and `labels`) or "folder:PATH" (a
      sub-folder for each class, in alphabetical order).
    count: how many images.
    offset: index of the first.
    image_size: side in pixels; larger or smaller images are scaled to it by the
      shorter side and cropped in the middle. None leaves them as they are.
    num_classes: None takes it from the source, for an npz the largest of all its
      labels plus one.
    statistics: name of the data set whose statistics to use, or "neutral". None
      takes those of the source.

  Returns:
    The victims.

  Raises:
    InputError: a source, count or offset that does not exist, or images or
      labels that cannot be used.
  """
  for what, value, least in (("count", count, 1), ("offset", offset, 0)):
    if type(value) is not int or value < least:
      raise InputError(f"data.{what} is {value!r}; expected an integer of at least {least}.")
  if image_size is not None and (type(image_size) is not int or image_size < 1):
    raise InputError(f"data.image_size is {image_size!r}; expected a positive integer.")
  raw = _read(source, slice(offset, offset + count))
  if len(raw.images) < count:
    raise InputError(
      f"{source} has {raw.available} images; data.count={count} from data.offset={offset} needs"
      f" {offset + count}. Lower count or offset."
    )
  images = [_to_pixels(image, i + offset, source) for i, image in enumerate(raw.images)]
  if image_size is not None:
    images = [_resize(image, image_size) for image in images]
  shapes = sorted({image.shape for image in images})
  channels = sorted({shape[-1] for shape in shapes})
  if len(channels) > 1:
    raise InputError(
      f"{source} has images of {channels[0]} and of {channels[1]} channels; a batch needs one"
      " kind. Convert them to grey or to colour."
    )
  if len(shapes) > 1:
    raise InputError(
      f"{source} has images of different shapes, {shapes[0]} and {shapes[1]}; a batch needs one."
      " Set data.image_size."
    )
  classes = raw.num_classes if num_classes is None else num_classes
  if type(classes) is not int or not 2 <= classes <= _MAX_CLASSES:
    raise InputError(
      f"data.num_classes is {classes!r}; expected an integer from 2 to {_MAX_CLASSES}. If it comes"
      " from the labels, correct them."
    )
  wrong = [label for label in raw.labels if not 0 <= label < classes]
  if wrong:
    raise InputError(
      f"{source} has the label {wrong[0]}; expected classes from 0 to {classes - 1}. Set"
      " data.num_classes, or correct the labels."
    )
  name = raw.statistics if statistics is None else statistics
  fitting = statistics_of(name)
  if len(fitting.mean) not in (1, channels[0]):
    raise InputError(
      f"data.statistics={name} are for {len(fitting.mean)} channels, but"
      f" the images of {source} have {channels[0]}. Choose others, or 'neutral'."
    )
  return Victims(np.stack(images), np.asarray(raw.labels, np.int32), classes, fitting)


def normalize(pixels: np.ndarray, statistics: Statistics) -> np.ndarray:
  """Returns `(pixels - mean) / std`.

  Args:
    pixels: f[..., C] in [0, 1].
    statistics: for C channels or for one.

  Returns:
    f[..., C] of the same type.
  """
  mean, std = (np.asarray(value, pixels.dtype) for value in statistics)
  return (pixels - mean) / std


def denormalize(images: np.ndarray, statistics: Statistics) -> np.ndarray:
  """Returns `images * std + mean`, clipped to [0, 1]: the inverse of `normalize`.

  Args:
    images: f[..., C], normalised.
    statistics: for C channels or for one.

  Returns:
    f[..., C] in [0, 1], of the same type.
  """
  mean, std = (np.asarray(value, images.dtype) for value in statistics)
  return np.clip(images * std + mean, 0, 1)


def _to_pixels(image: np.ndarray, index: int, source: str) -> np.ndarray:
  """Returns one image as f32[H, W, C] in [0, 1]."""
  where = f"image {index} of {source}"
  image = np.asarray(image)
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or 0 in image.shape:
    raise InputError(f"{where} has shape {image.shape}; expected (height, width, channels).")
  if image.dtype == np.uint8:
    return image.astype(np.float32) / 255
  if not np.issubdtype(image.dtype, np.floating):
    raise InputError(f"{where} is {image.dtype}; expected uint8, or floats in [0, 1].")
  if not np.isfinite(image).all():
    raise InputError(f"{where} has NaN or infinite pixels; expected floats in [0, 1].")
  if image.min() < 0 or image.max() > 1:
    raise InputError(
      f"{where} has pixels from {image.min():g} to {image.max():g}; expected floats in [0, 1]"
      " (or uint8). Divide by 255, or undo the normalisation."
    )
  return image.astype(np.float32)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the shorter side to `size` and crops the middle."""
  height, width, _ = image.shape
  if height == width == size:
    return image
  scale = size / min(height, width)
  new = (max(size, round(width * scale)), max(size, round(height * scale)))
  channels = [
    np.asarray(Image.fromarray(image[..., c]).resize(new, Image.Resampling.BICUBIC))
    for c in range(image.shape[-1])
  ]
  resized = np.clip(np.stack(channels, axis=-1), 0, 1)
  top, left = (new[1] - size) // 2, (new[0] - size) // 2
  return resized[top : top + size, left : left + size]
