"""Loads images from a source and checks that they can be attacked."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxdia.core.errors import InputError, check_count, unknown
from jaxdia.core.types import HostImages, Statistics, as_statistics
from jaxdia.data.datasets import statistics_of
from jaxdia.data.pixels import check_range, resize, to_pixels
from jaxdia.data.sources import SOURCES, Raw

# More are a wrong label rather than a data set.
MOST_CLASSES = 1_000_000
MOST_PIXELS_A_SIDE = 10_000


class Victims(NamedTuple):
  """Images to attack.

  Attributes:
    images: f32[N, H, W, C], pixels in [0, 1].
    labels: i32[N].
    num_classes: number of classes of the data set.
    statistics: what normalises the images.
    class_names: `class_names[label]` is the name of a class that the source has; None if it
      keeps no names.
  """

  images: HostImages
  labels: Integer[np.ndarray, " batch"]
  num_classes: int
  statistics: Statistics
  class_names: tuple[str, ...] | None = None


def available(source: str) -> int:
  """Returns how many images a source has.

  Args:
    source: as `load` takes it.

  Raises:
    InputError: there is no such source.
  """
  return _read(source, slice(0, 0)).available


def _read(source: str, wanted: slice) -> Raw:
  check_source(source)
  kind, _, name = source.partition(":")
  return SOURCES[kind](name, wanted)


def check_source(source: str) -> None:
  """Refuses a source of no kind that there is; nothing is read.

  Args:
    source: as `load` takes it.

  Raises:
    InputError: there is no such kind.
  """
  if not isinstance(source, str) or source.partition(":")[0] not in SOURCES:
    raise unknown("data source", source, [f"{known}:..." for known in SOURCES])


def load(
  source: str,
  count: int,
  offset: int = 0,
  *,
  image_size: int | None = None,
  num_classes: int | None = None,
  statistics: str | Statistics | None = None,
) -> Victims:
  """Loads consecutive images of a source.

  Args:
    source: "samples:NAME" (20 real images each of mnist, fashion_mnist, cifar10,
      cifar100, imagenet; no network), "sklearn:digits/train" and "sklearn:digits/test"
      (1,400 and 397 digits of 8 x 8 pixels; no network), "tfds:NAME/SPLIT", "npz:PATH" (arrays
      `images`, uint8, uint16 or float in [0, 1], NHWC, `labels`, and perhaps
      `class_names`) or "folder:PATH" (a sub-folder for each class, labelled in
      alphabetical order; before them those that are numbers, in their order, so that
      folders 0 ... n-1 are labelled as they are named). Files of other endings are left out.
      Pictures are turned upright as they say; colour profiles are not applied. Of 16-bit
      images the brightest must reach a quarter of the range, of floats a sixteenth.
    count: how many images.
    offset: index of the first.
    image_size: side in pixels; larger or smaller images are scaled to it by the
      shorter side and cropped in the middle. None leaves them as they are.
    num_classes: None takes it from the source, for an npz the largest of all its
      labels plus one, or as many as it has `class_names`.
    statistics: name of the data set whose statistics to use, or "neutral", or statistics
      of one's own. None takes those of the source.

  Returns:
    The images, with what belongs to them.

  Raises:
    InputError: a source, count or offset that does not exist, or images or
      labels that cannot be used.
  """
  for what, value, least in (("count", count, 1), ("offset", offset, 0)):
    check_count(f"data.{what}", value, least)
  if image_size is not None:
    check_count("data.image_size", image_size, 1, MOST_PIXELS_A_SIDE)
  raw = _read(source, slice(offset, offset + count))
  if len(raw.images) < count:
    raise InputError(
      f"{source} has {raw.available} images; data.count={count} from data.offset={offset} needs"
      f" {offset + count}. Lower count or offset."
    )
  check_range(raw.images, source)
  images = [
    to_pixels(image, f"image {i} of {source}") for i, image in enumerate(raw.images, start=offset)
  ]
  if image_size is not None:
    images = [resize(image, image_size) for image in images]
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
  try:
    classes = check_count("data.num_classes", classes, 2, MOST_CLASSES)
  except InputError as error:
    raise InputError(f"{error} If it comes from the labels, correct them.") from error
  wrong = [label for label in raw.labels if not 0 <= label < classes]
  if wrong:
    raise InputError(
      f"{source} has the label {wrong[0]}; expected classes from 0 to {classes - 1}. Set"
      " data.num_classes, or correct the labels."
    )
  name = raw.statistics if statistics is None else statistics
  fitting = statistics_of(name) if isinstance(name, str) else as_statistics(name)
  if len(fitting.mean) not in (1, channels[0]):
    raise InputError(
      f"data.statistics={name} are for {len(fitting.mean)} channels, but"
      f" the images of {source} have {channels[0]}. Choose others, or 'neutral'."
    )
  pixels = np.ascontiguousarray(np.stack(images))  # stack keeps the order of Fortran
  return Victims(pixels, np.asarray(raw.labels, np.int32), classes, fitting, raw.class_names)
