"""Arithmetic on the pixels of images: their range, normalisation and size."""

import warnings

import numpy as np
from jaxtyping import Float, Shaped

from jaxdia.core.errors import InputError
from jaxdia.core.types import Statistics, as_statistics
from jaxdia.data.pictures import import_pillow

# Images whose values are all below are taken for ones of fewer bits in too wide a type: masks of 0
# and 1 in 8 bits, and what cameras and scanners give, up to 14 bits, in 16.
_DIM = {np.dtype(np.uint8): 2, np.dtype(np.uint16): 2**14}
# Of floats likewise: those that were divided by 255 twice, or 12 bits by the largest value of 16.
_DIM_FLOAT = 1 / 16
# In 8 bits these may be dark pictures, or few levels, as of digits from 0 to 16.
_FEW_LEVELS = 2**5


def normalize(
  pixels: Float[np.ndarray, "*batch channels"], statistics: Statistics
) -> Float[np.ndarray, "*batch channels"]:
  """Returns `(pixels - mean) / std`.

  Args:
    pixels: f[..., C] in [0, 1].
    statistics: for C channels or for one.

  Returns:
    f[..., C] of the same type.
  """
  mean, std = (np.asarray(value, pixels.dtype) for value in as_statistics(statistics))
  return (pixels - mean) / std


def denormalize(
  images: Float[np.ndarray, "*batch channels"], statistics: Statistics
) -> Float[np.ndarray, "*batch channels"]:
  """Returns `images * std + mean`, clipped to [0, 1]: the inverse of `normalize`.

  Args:
    images: f[..., C], normalised.
    statistics: for C channels or for one.

  Returns:
    f[..., C] in [0, 1], of the same type.
  """
  mean, std = (np.asarray(value, images.dtype) for value in as_statistics(statistics))
  return np.clip(images * std + mean, 0, 1)


def to_pixels(
  image: Shaped[np.ndarray, "..."], where: str
) -> Float[np.ndarray, "height width channels"]:
  """Returns an image as f32[H, W, C] in [0, 1].

  Args:
    image: [H, W] or [H, W, C], unsigned integers of 8 or 16 bits, or floats in [0, 1].
    where: names the image in a message.

  Raises:
    InputError: it is of another shape or type, or its values are no pixels.
  """
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or 0 in image.shape:
    raise InputError(f"{where} has shape {image.shape}; expected (height, width, channels).")
  if image.dtype.newbyteorder("=") in _DIM:
    return image.astype(np.float32) / np.iinfo(image.dtype).max
  if not np.issubdtype(image.dtype, np.floating):
    raise InputError(
      f"{where} is {image.dtype}; expected uint8 or uint16 of full range, or floats in [0, 1]."
      " Use images.astype(numpy.uint8) on whole numbers from 0 to 255, and save bfloat16 as"
      " float32."
    )
  if not np.isfinite(image).all():
    raise InputError(f"{where} has NaN or infinite pixels; expected floats in [0, 1].")
  if image.min() < 0 or image.max() > 1:
    raise InputError(
      f"{where} has pixels from {image.min():.9g} to {image.max():.9g}; expected floats in [0, 1]"
      " (or uint8). Divide by 255, or by what else stands for white, or undo the normalisation."
    )
  return image.astype(np.float32)


def check_range(images: list[Shaped[np.ndarray, "..."]], source: str) -> None:
  """Refuses images that all use only the lowest values of their type, or warns of 8-bit ones.

  How bright the fullest of 12 bits should be cannot be known from 16-bit values. A single dark
  image among others is one; images that are dark without exception were stored unscaled.

  Args:
    images: of any shapes and types; those of one type are judged together.
    source: names them in a message.

  Raises:
    InputError: they would be nearly black.
  """
  floats = [x for x in images if x.size and np.issubdtype(x.dtype, np.floating)]
  brightest = max((float(image.max()) for image in floats), default=0.0)
  if 0 < brightest < _DIM_FLOAT and all(image.min() >= 0 for image in floats):
    raise InputError(
      f"{source}: the floats asked for have no value above {brightest:.3g}; expected images that"
      f" reach {_DIM_FLOAT:g} of [0, 1], as these come out nearly black. They may be divided by too"
      " much, or twice: divide them by what stands for white."
    )
  for dtype, dim in _DIM.items():
    same = [image for image in images if image.dtype.newbyteorder("=") == dtype and image.size]
    largest = max((int(image.max()) for image in same), default=0)
    if 0 < largest < dim:
      bits = next(bits for bits in (1, 8, 10, 12, 14) if largest < 2**bits)
      full = np.iinfo(dtype).max
      raise InputError(
        f"{source}: the {dtype} images asked for have no value above {largest} of {full}, as"
        f" {bits}-bit ones would, and come out nearly black. Multiply them by"
        f" {full // (2**bits - 1)} if they are {bits}-bit ones, or save them as 8-bit images of"
        " full range, or as floats in [0, 1] in an npz."
      )
    if dtype == np.uint8 and 0 < largest < _FEW_LEVELS:
      warnings.warn(
        f"{source}: the uint8 images asked for have no value above {largest} of 255, and come out"
        " nearly black. If that is what stands for white, divide them by it and save floats.",
        stacklevel=3,
      )


def resize(
  image: Float[np.ndarray, "height width channels"], size: int
) -> Float[np.ndarray, "{size} {size} channels"]:
  """Scales the shorter side to `size` and crops the middle.

  Args:
    image: f32[H, W, C] in [0, 1].
    size: in pixels.

  Returns:
    f32[size, size, C] in [0, 1].

  Raises:
    InputError: the package that scales is not installed.
  """
  height, width, _ = image.shape
  if height == width == size:
    return image
  Image = import_pillow("resizing images").Image
  scale = size / min(height, width)
  new = (max(size, round(width * scale)), max(size, round(height * scale)))
  channels = [
    np.asarray(Image.fromarray(image[..., c]).resize(new, Image.Resampling.BICUBIC))
    for c in range(image.shape[-1])
  ]
  resized = np.clip(np.stack(channels, axis=-1), 0, 1)
  top, left = (new[1] - size) // 2, (new[0] - size) // 2
  return resized[top : top + size, left : left + size]
