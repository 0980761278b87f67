"""Where images come from: each source reads images and labels, and checks their form only.

A source takes what follows the colon in its name and a slice of indices, so that
only what is asked for is read. A new one is a function here and its line in `SOURCES`.
"""

import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxdia.core.errors import InputError, first_line, unknown
from jaxdia.core.files import UnreadableFile, read_npz
from jaxdia.core.types import mend_of_labels
from jaxdia.data.datasets import DATASETS
from jaxdia.data.pictures import ENDINGS, read_picture

# The splits of scikit-learn's 1,797 digits, in a random order that is always the same.
DIGITS = {"train": slice(None, 1400), "test": slice(1400, None)}


class Raw(NamedTuple):
  """What a source gives.

  Attributes:
    images: one array an image, of unsigned integers of full range or of floats.
    labels: one integer an image.
    num_classes: of the whole data set.
    statistics: name of fitting statistics, or "neutral".
    available: how many images the source has in all.
    class_names: one a label, or None if the source has none.
  """

  images: list[Shaped[np.ndarray, "..."]]
  labels: list[int]
  num_classes: int
  statistics: str
  available: int
  class_names: tuple[str, ...] | None = None


def _samples(name: str, wanted: slice) -> Raw:
  with_samples = {known: dataset for known, dataset in DATASETS.items() if dataset.samples}
  if name not in with_samples:
    raise unknown("data set of samples:", name, with_samples)
  spec = importlib.util.find_spec("foolbox")  # only its files: it need not be imported
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"samples:{name} needs the images that the package foolbox ships. Run"
      ' pip install "jaxdia[samples]", or choose another source.'
    )
  known = with_samples[name]
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  found = {}
  for path in folder.iterdir():
    if match := re.fullmatch(rf"{known.samples}_(\d+)_(\d+)\.(png|jpg)", path.name):
      found[int(match[1])] = (path, int(match[2]))
  files = [found[i] for i in sorted(found)]
  images = [read_picture(path) for path, _ in files[wanted]]
  labels = [label for _, label in files[wanted]]
  return Raw(images, labels, known.num_classes, name, len(files), known.class_names)


def _sklearn(name: str, wanted: slice) -> Raw:
  splits = {f"digits/{split}": part for split, part in DIGITS.items()}
  if name not in splits:
    raise unknown("data set of sklearn:", name, splits)
  try:
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it
  except ImportError as error:
    raise InputError(
      f"sklearn:{name} needs the package scikit-learn ({first_line(error)}). Run"
      ' pip install "jaxdia[digits]", or choose another source.'
    ) from error
  digits: Any = load_digits()
  # Shuffled, so that the splits are alike.
  chosen = np.random.default_rng(0).permutation(len(digits.images))[splits[name]]
  images = digits.images[chosen[wanted], :, :, None].astype(np.float32) / 16
  labels = [int(label) for label in digits.target[chosen[wanted]]]
  known = DATASETS["digits"]
  return Raw(list(images), labels, known.num_classes, "digits", len(chosen), known.class_names)


def _tfds(name: str, wanted: slice) -> Raw:
  name, _, split = name.partition("/")
  if not name or not split:
    raise InputError(f"source is 'tfds:{name}'; expected tfds:NAME/SPLIT, such as tfds:mnist/test.")
  try:
    import tensorflow_datasets as tfds  # slow to import, and only this source needs it
  except ImportError as error:
    raise InputError(
      f"tfds:{name} needs the package tensorflow-datasets ({first_line(error)}). Run"
      ' pip install "jaxdia[tfds]", or choose another source.'
    ) from error
  try:
    builder = tfds.builder(name, file_format="array_record")
    features: Any = builder.info.features  # a mapping, of any data set with these two
    if not {"image", "label"} <= set(features):
      raise InputError(
        f"the data set {name!r} has the features {sorted(features)}; expected 'image' and 'label'."
      )
    label = features["label"]
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
      raise InputError(
        f"the data set {name!r} has labels of kind {type(label).__name__}; expected a ClassLabel."
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
  # The decorator of this method hides its arguments.
  data = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
  examples = [data[i] for i in range(*wanted.indices(len(data)))]
  return Raw(
    [example["image"] for example in examples],
    [int(example["label"]) for example in examples],
    label.num_classes,
    name if name in DATASETS else "neutral",
    len(data),
    tuple(label.names),
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
    raise InputError(
      f"{path} lacks {missing}; expected an npz with images and labels. It has"
      f" {', '.join(arrays) or 'no array'}: write it again with numpy.savez(path, images=...,"
      " labels=...)."
    )
  images, labels = arrays["images"], arrays["labels"]
  _check_images(images, labels, path)
  _check_labels(labels, len(images), path)
  # From all labels, so that the network does not depend on which images are attacked.
  num_classes = max(2, int(labels.max()) + 1)
  names = _names(arrays["class_names"], num_classes, path) if "class_names" in arrays else None
  num_classes = num_classes if names is None else max(num_classes, len(names))
  selected = [int(label) for label in labels[wanted]]
  return Raw(list(images[wanted]), selected, num_classes, "neutral", len(images), names)


def _check_images(images: np.ndarray, labels: np.ndarray, path: pathlib.Path) -> None:
  """Refuses images that are not (N, height, width, channels), with what makes them so."""
  if images.ndim != 4:
    if images.ndim == 3 and labels.size == len(images):
      mend = "Add an axis for the channels: images[..., None]."
    elif images.ndim == 3:
      mend = "Add an axis: images[None] for one image, or images[..., None] for the channels."
    else:
      mend = "Reshape them with images.reshape(N, height, width, channels)."
    raise InputError(
      f"images in {path} have shape {images.shape}; expected (N, height, width, channels). {mend}"
    )
  if not len(images):
    raise InputError(f"{path} has no images; expected at least one in its array images.")
  if labels.shape[:1] == images.shape[3:] != images.shape[:1]:
    axes = {images.shape[0]: (3, 1, 2, 0), images.shape[2]: (3, 0, 1, 2)}
    if wanted := axes.get(3) or axes.get(1):
      raise InputError(
        f"images in {path} have shape {images.shape}, but there are {len(labels)} labels; expected"
        f" (N, height, width, channels). Use images.transpose{wanted}."
      )
  if _has_channels_first(images.shape):
    raise InputError(
      f"images in {path} have shape {images.shape}, which looks like (N, channels, height, width);"
      " expected (N, height, width, channels). Use images.transpose(0, 2, 3, 1)."
    )


def _has_channels_first(shape: tuple[int, ...]) -> bool:
  """Returns whether images can hardly be (N, height, width, channels).

  A last axis of 1 or 3 is taken at its word, and so are all numbers of channels behind images that
  are square or higher than a few pixels (RGB with infrared, hyperspectral). What is left are
  strips of at most 4 pixels in height and many channels, and shapes of which the last two axes are
  those of a square image.
  """
  _, first, second, last = shape
  if last in (1, 3) or first == second:
    return False
  return first in (1, 3) or first <= 4 < last or first < second == last


def _check_labels(labels: np.ndarray, count: int, path: pathlib.Path) -> None:
  """Refuses labels that are not i[N] (or b[N]), with what makes them so."""
  if labels.shape == (count,) and labels.dtype.kind in "biu":
    return
  mend = mend_of_labels(labels, count)
  if labels.shape == (count,) and labels.dtype.kind in "US":
    mend = " Use class_names, labels = numpy.unique(labels, return_inverse=True), and save both."
  raise InputError(
    f"labels in {path} are {labels.dtype} of shape {labels.shape}; expected integers of shape"
    f" ({count},), one class an image.{mend}"
  )


def _names(names: np.ndarray, num_classes: int, path: pathlib.Path) -> tuple[str, ...]:
  """Returns the class names of an npz."""
  if names.ndim != 1 or names.dtype.kind != "U" or len(names) < num_classes:
    raise InputError(
      f"class_names in {path} are {names.dtype} of shape {names.shape}; expected one string for"
      f" each of the {num_classes} classes. Use numpy.array([...], str), or leave them out."
    )
  try:
    return tuple(names.tolist())
  except (SystemError, ValueError) as error:  # numpy's, for numbers that are no characters
    raise InputError(f"class_names in {path} are no text; write the file again.") from error


def _folder(name: str, wanted: slice) -> Raw:
  root = _path(name)
  if not root.is_dir():
    raise InputError(f"{root} is no folder; expected one with a sub-folder for each class.")
  classes = _in_order([p for p in _visible(root) if p.is_dir()])
  files = [
    (path, label)
    for label, folder in enumerate(classes)
    for path in sorted(_visible(folder))
    if path.suffix.lower() in ENDINGS
  ]
  if not files:
    raise InputError(
      f"{root} has no images; expected one sub-folder a class, with files in it that end in"
      f" {', '.join(sorted(ENDINGS))}."
    )
  images = [read_picture(path) for path, _ in files[wanted]]
  labels = [label for _, label in files[wanted]]
  names = tuple(folder.name for folder in classes)
  return Raw(images, labels, max(2, len(classes)), "neutral", len(files), names)


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns what a folder holds, but for what systems and editors hide in it."""
  try:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]
  except OSError as error:
    raise InputError(f"{folder} cannot be read ({first_line(error)}).") from error


def _in_order(folders: list[pathlib.Path]) -> list[pathlib.Path]:
  """Returns class folders, numbers first and by number, so that 0 ... n-1 are their own labels."""
  numbers = [folder for folder in folders if re.fullmatch("[0-9]+", folder.name)]
  by_number: dict[int, pathlib.Path] = {}
  for folder in numbers:
    if (same := by_number.setdefault(int(folder.name), folder)) != folder:
      raise InputError(
        f"the class folders {str(same)!r} and {folder.name!r} are the same number; rename one."
      )
  others = sorted(folder for folder in folders if folder not in numbers)
  return [*(by_number[number] for number in sorted(by_number)), *others]


SOURCES: dict[str, Callable[[str, slice], Raw]] = {
  "samples": _samples,
  "sklearn": _sklearn,
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
