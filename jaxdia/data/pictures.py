"""Reads picture files: what a file says about how to read it is obeyed, or the file is refused.

Numbers are taken as stored: profiles and gammas, which tell a screen what colour they stand for,
are not applied, as is usual where networks are trained.
"""

import io
import pathlib
import types
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import read_regular

ENDINGS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp"}
ENDINGS |= {".tif", ".tiff"}
# A file is read as what it holds, whatever its name, but as nothing that runs programs.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE = 258, 262, 281  # TIFF's tags
_WHITE_IS_ZERO = 0
_TO_GREY, _TO_COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "CMYK")


def import_pillow(purpose: str) -> types.ModuleType:
  """Imports PIL with its modules `Image` and `ImageOps`.

  Args:
    purpose: what it is needed for, in a message.

  Raises:
    InputError: it is not installed.
  """
  try:
    import PIL.Image
    import PIL.ImageOps
  except ImportError as error:
    raise InputError(
      f'{purpose} needs the package pillow. Run pip install "jaxdia[images]".'
    ) from error
  return PIL


class _Told(NamedTuple):
  """What a file says about its values, and Pillow's image no longer does."""

  format: str
  depth: int  # bits of each value
  full: int  # the value of white, or of black if negative
  negative: bool


def read_picture(
  path: pathlib.Path,
) -> Shaped[np.ndarray, "height width"] | Shaped[np.ndarray, "height width 3"]:
  """Returns the pixels of a file, upright: grey [H, W] or colours [H, W, 3].

  Args:
    path: of the file.

  Returns:
    uint8, uint16 or float32 of full range.

  Raises:
    InputError: it cannot be read, has more than one frame, or would lose something.
  """
  pil = import_pillow("reading pictures")
  try:
    content = read_regular(path)
    with pil.Image.open(io.BytesIO(content), formats=_FORMATS) as image:
      # A camera's JPEG may hold previews behind the picture itself (format MPO).
      frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
      upright = pil.ImageOps.exif_transpose(image)
      told = _told(image, content)
  except pil.UnidentifiedImageError as error:
    raise InputError(
      f"{path} is no image in {', '.join(_FORMATS)}, damaged, or of a kind that Pillow does not"
      " read, as TIFFs of several channels of floats are. Save it as 8-bit grey or RGB."
    ) from error
  except Exception as error:  # what a decoder raises depends on the byte that is wrong
    raise InputError(f"{path} cannot be read as an image ({first_line(error)}).") from error
  if frames > 1:
    raise InputError(
      f"{path} has {frames} frames (or pages); expected one. Save the one that is meant as a file"
      " of its own."
    )
  return _to_array(upright, told, path)


def _told(image: Any, content: bytes) -> _Told:
  tags = getattr(image, "tag_v2", {})  # a TIFF's
  # Pillow does not tell the depth of a PNG, but it stands at a fixed place.
  depth = content[24] if image.format == "PNG" else int(max(tags.get(_BITS_PER_SAMPLE, [8])))
  full = int(np.max(tags.get(_MAX_SAMPLE_VALUE, 2**depth - 1)))
  if full < 1 or full & (full + 1):  # no range, but the largest value that happens to occur
    full = 2**depth - 1
  return _Told(image.format, depth, full, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _to_array(image: Any, told: _Told, path: pathlib.Path) -> np.ndarray:
  """Returns the pixels of an image that Pillow has read, if none of them has been cut."""
  mode = image.mode
  if told.negative and told.depth > 8:  # else Pillow has turned it
    raise InputError(f"{path} has {told.depth}-bit values whose 0 is white; save it with 0 black.")
  if mode.startswith("I;16") or (mode == "I" and told.format == "PNG"):  # older Pillows say I
    return _grey_of_16_bits(image, told, path)
  if mode == "F":
    return np.asarray(image)
  if mode not in _TO_GREY + _TO_COLOUR:
    raise InputError(f"{path} has pixels of mode {mode!r}; save it as 8-bit grey or RGB.")
  if told.depth > 8:
    raise InputError(
      f"{path} has colours (or alpha) of {told.depth} bits, of which Pillow keeps 8. Save it as"
      " 8-bit, or as floats in [0, 1] in an npz."
    )
  if mode == "CMYK" and told.format == "JPEG" and "adobe" not in image.info:
    raise InputError(f"{path} does not say whether 0 or 255 is full ink; save it as RGB.")
  if image.has_transparency_data and image.convert("RGBA").getextrema()[3] != (255, 255):
    raise _transparent(path)
  return np.asarray(image.convert("L" if mode in _TO_GREY else "RGB"))


def _grey_of_16_bits(image: Any, told: _Told, path: pathlib.Path) -> np.ndarray:
  """Returns uint16, or float32 if the file says that its full range is another."""
  pixels = np.asarray(image).astype(np.uint16)
  if np.any(pixels == image.info.get("transparency", -1)):
    raise _transparent(path)
  full = told.full if pixels.max() <= told.full else 2**told.depth - 1
  return pixels if full == 2**16 - 1 else pixels.astype(np.float32) / np.float32(full)


def _transparent(path: pathlib.Path) -> InputError:
  return InputError(f"{path} has transparent pixels; flatten it onto a background first.")
