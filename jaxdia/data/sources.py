"""Where victims come from: each source reads images and labels, and checks nothing.

A source takes what follows the colon in its name and a slice of indices, so that
only what is asked for is read. It returns uint8 or float images, one array an
image, their labels, the number of classes, and the name of a
data set whose statistics fit.
"""

import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxdia.core.errors import InputError, first_line, unknown
from jaxdia.core.files import UnreadableFile, read_npz
from jaxdia.data.statistics import STATISTICS

_SAMPLES = {  # our name -> the name in foolbox's file names, and the number of classes
  "mnist": ("mnist", 10),
  "fashion_mnist": ("fashionMNIST", 10),
  "cifar10": ("cifar10", 10),
  "cifar100": ("cifar100", 100),
  "imagenet": ("imagenet", 1000),
}
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class Raw(NamedTuple):
  """What a source gives.

  Attributes:
    images: one array an image, uint8 or float.
    labels: one integer an image.
    num_classes: of the whole data set.
    statistics: name of fitting statistics, or "neutral".
    available: how many images the source has in all.
  """

  images: list[np.ndarray]
  labels: list[int]
  num_classes: int
  statistics: str
  available: int


def _samples(name: str, wanted: slice) -> Raw:
  if name not in _SAMPLES:
    raise unknown("data set of samples:", name, _SAMPLES)
  spec = importlib.util.find_spec("foolbox")  # only its files: it need not be imported
  if spec is None:
    raise InputError(
      f"samples:{name} needs the images that the package foolbox ships. Run"
      ' pip install "jaxdia[samples]", or choose another source.'
    )
  prefix, num_classes = _SAMPLES[name]
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  found = {}
  for path in folder.iterdir():
    if match := re.fullmatch(rf"{prefix}_(\d+)_(\d+)\.(png|jpg)", path.name):
      found[int(match[1])] = (path, int(match[2]))
  files = [found[i] for i in sorted(found)]
  images = [_read_image(path) for path, _ in files[wanted]]
  return Raw(images, [label for _, label in files[wanted]], num_classes, name, len(files))


def _tfds(name: str, wanted: slice) -> Raw:
  name, _, split = name.partition("/")
  if not name or not split:
    raise InputError(f"source is 'tfds:{name}'; expected tfds:NAME/SPLIT, such as tfds:mnist/test.")
  import tensorflow_datasets as tfds  # slow to import, and only this source needs it

  try:
    builder = tfds.builder(name, file_format="array_record")
    features = builder.info.features
    if not {"image", "label"} <= set(features):
      raise InputError(
        f"the data set {name!r} has the features {sorted(features)}; expected 'image' and 'label'."
      )
    builder.download_and_prepare()
  except InputError:
    raise
  except tfds.core.DatasetNotFoundError as error:
    raise InputError(f"tensorflow-datasets has no data set {name!r}.") from error
  except ImportError as error:
    raise InputError(
      f"preparing {name!r} needs a package that is not installed: {first_line(error)}. It is"
      " needed once, to prepare; reading needs only tensorflow-datasets."
    ) from error
  except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
    raise InputError(f"{name!r} could not be prepared: {first_line(error)}.") from error
  if split not in builder.info.splits:
    raise unknown(f"split of {name}:", split, builder.info.splits)
  data = builder.as_data_source(split=split)
  examples = [data[i] for i in range(*wanted.indices(len(data)))]
  return Raw(
    [example["image"] for example in examples],
    [int(example["label"]) for example in examples],
    features["label"].num_classes,
    name if name in STATISTICS else "neutral",
    len(data),
  )


def _npz(name: str, wanted: slice) -> Raw:
  path = _path(name)
  if not path.is_file():
    raise InputError(f"{path} is no file; expected an npz with the arrays images and labels.")
  try:
    arrays = read_npz(path)
  except UnreadableFile as error:
    raise InputError(
      f"{path} cannot be read ({error}). It may be truncated, or contain pickled objects, which"
      " are refused; write it again with numpy.savez(path, images=..., labels=...) from plain"
      " arrays."
    ) from error
  missing = [key for key in ("images", "labels") if key not in arrays]
  if missing:
    raise InputError(f"{path} lacks {missing}; expected an npz with images and labels.")
  images, labels = arrays["images"], arrays["labels"]
  if images.ndim != 4:
    raise InputError(
      f"images in {path} have shape {images.shape}; expected (N, height, width, channels)."
    )
  if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(
      f"labels in {path} are {labels.dtype} of shape {labels.shape}; expected integers of shape"
      f" {images.shape[:1]}, one class an image."
    )
  # From all labels, so that the network does not depend on which images are attacked.
  num_classes = max(2, int(labels.max()) + 1) if labels.size else 2
  selected = [int(label) for label in labels[wanted]]
  return Raw(list(images[wanted]), selected, num_classes, "neutral", len(images))


def _folder(name: str, wanted: slice) -> Raw:
  root = _path(name)
  if not root.is_dir():
    raise InputError(f"{root} is no folder; expected one with a sub-folder for each class.")
  classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  files = [
    (path, label)
    for label, folder in enumerate(classes)
    for path in sorted(folder.iterdir())
    if path.suffix.lower() in _IMAGE_ENDINGS
  ]
  if not files:
    raise InputError(f"{root} has no images; expected one sub-folder a class, with images in it.")
  images = [_read_image(path) for path, _ in files[wanted]]
  labels = [label for _, label in files[wanted]]
  return Raw(images, labels, max(2, len(classes)), "neutral", len(files))


SOURCES: dict[str, Callable[[str, slice], Raw]] = {
  "samples": _samples,
  "tfds": _tfds,
  "npz": _npz,
  "folder": _folder,
}


def _path(name: str) -> pathlib.Path:
  """Returns the path that a source names, if a file system could have it."""
  try:
    path = pathlib.Path(name).expanduser()
    path.exists()
  except (OSError, RuntimeError, ValueError) as error:
    raise InputError(f"{name!r} is no path ({first_line(error)}).") from error
  if not name:
    raise InputError("the data source names no path; expected npz:PATH or folder:PATH.")
  return path


def _read_image(path: pathlib.Path) -> np.ndarray:
  """Returns uint8 or float pixels; a file that would lose something is refused."""
  try:
    with Image.open(path) as image:
      image.load()
  except (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    UnidentifiedImageError,
    ValueError,
  ) as error:
    raise InputError(f"{path} cannot be read as an image ({first_line(error)}).") from error
  if image.has_transparency_data:
    if image.convert("RGBA").getextrema()[3] != (255, 255):
      raise InputError(f"{path} has transparent pixels; flatten it onto a background first.")
    image = image.convert("L" if image.mode == "LA" else "RGB")
  if image.mode.startswith("I;16"):
    return np.asarray(image, np.float32) / 65535
  if image.mode in ("L", "RGB", "F"):
    return np.asarray(image)
  if image.mode in ("1", "P", "CMYK", "YCbCr"):
    return np.asarray(image.convert("L" if image.mode == "1" else "RGB"))
  raise InputError(f"{path} has pixels of mode {image.mode!r}; save it as 8-bit grey or RGB.")
