"""What a picture file says about how to read it is obeyed, or the file is refused."""

import io
import pathlib
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from jaxdia import data
from jaxdia.core.errors import InputError

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
  """Writes files into one class folder and returns the source."""

  def write(*contents):
    (tmp_path / "a").mkdir(exist_ok=True)
    for i, content in enumerate(contents):
      (tmp_path / "a" / f"{i}.png").write_bytes(content)  # read as what it is, not by its name
    return f"folder:{tmp_path}"

  return write


def _saved(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def _png(array, depth, colour, *chunks):
  """A PNG of whole bytes, as Pillow does not write them."""

  def chunk(name, content):
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

  rows = np.asarray(array).astype(">u2" if depth == 16 else "u1")
  header = struct.pack(">IIBBBBB", rows.shape[1], len(rows), depth, colour, 0, 0, 0)
  content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
  parts = [(b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _tiff(array, width, bits, photometric, *more):
  """A TIFF of one strip, as Pillow does not write them; more: (tag, value)."""
  content = array.tobytes()
  samples = array.shape[2] if array.ndim == 3 else 1
  tags = {256: width, 257: len(array), 259: 1, 262: photometric, 273: 8, 277: samples}
  tags |= {278: len(array), 279: len(content)} | dict(more)
  start = 8 + len(content)
  after = start + 2 + 12 * (len(tags) + 1) + 4
  entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()}
  depths = struct.pack(f"<{samples}H", *[bits] * samples)
  place = struct.pack("<I", after) if samples > 2 else depths.ljust(4, b"\0")
  entries[258] = struct.pack("<HHI", 258, 3, samples) + place
  table = b"".join(entries[tag] for tag in sorted(entries))
  return b"II*\0%b%b%b%b%b%b" % (
    struct.pack("<I", start), content, struct.pack("<H", len(entries)), table, b"\0" * 4, depths
  )  # fmt: skip


def _pixels(source, count=1):
  return data.load(source, count).images


# From what is stored to what is meant: where the EXIF standard puts the first row and column.
UPRIGHT = {
  1: lambda stored: stored,
  2: lambda stored: stored[:, ::-1],
  3: lambda stored: stored[::-1, ::-1],
  4: lambda stored: stored[::-1],
  5: lambda stored: stored.swapaxes(0, 1),
  6: lambda stored: np.rot90(stored, -1),
  7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
  8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "16 bits", "XMP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_obeyed(folder, kind, orientation):
  blocks = RNG.integers(0, 256, (3, 4, 1 if kind == "16 bits" else 3))
  stored = np.kron(blocks, np.ones((16, 16, 1))).astype(np.uint8)
  exif = Image.Exif()
  exif[274] = orientation
  if kind == "16 bits":
    image = Image.fromarray(stored[..., 0].astype(np.uint16) * 257)
    content = _saved(image, "PNG", exif=exif)
  elif kind == "XMP":
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    content = _saved(Image.fromarray(stored), "PNG", pnginfo=note)
  else:
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = _saved(Image.fromarray(stored), kind, exif=exif, **options)
  found = _pixels(folder(content))[0] * 255
  # JPEG loses something, but no block of it looks like its neighbour.
  wanted = UPRIGHT[orientation](stored)
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).mean() < (5 if kind == "JPEG" else 1e-3)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_only_one_frame_is_taken(folder, kind):
  frames = [Image.new("RGB", (8, 6), (80 * i, 20, 20)) for i in range(3)]
  one = folder(
    _saved(frames[1], kind, save_all=True, **({"lossless": True} if kind == "WEBP" else {}))
  )
  np.testing.assert_allclose(_pixels(one)[0, 0, 0] * 255, [80, 20, 20], atol=1e-3)
  many = folder(_saved(frames[0], kind, save_all=True, append_images=frames[1:]))
  with pytest.raises(InputError, match="has 3 frames.*Save the one that is meant"):
    _pixels(many)


def test_other_names_of_the_same_formats_are_read(folder):
  image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8))
  for kind, name in (("JPEG", "jfif"), ("JPEG", "JPE"), ("PNG", "apng")):
    source = folder(_saved(image, kind))
    path = next(pathlib.Path(source.removeprefix("folder:")).rglob("*.*"))
    path.rename(path.with_suffix(f".{name}"))
    assert _pixels(source).shape == (1, 8, 8, 3)


def test_previews_behind_a_photograph_are_not_taken_for_pages(folder):
  photograph, preview = (Image.new("RGB", (16, 16), (v, v, v)) for v in (200, 50))
  source = folder(_saved(photograph, "MPO", save_all=True, append_images=[preview]))
  np.testing.assert_allclose(_pixels(source) * 255, 200, atol=1)


def _deep(largest, depth=16, colour=0, channels=1):
  values = RNG.integers(0, largest, (6, 8, channels))
  values[0, 0] = largest
  return values, _png(values, depth, colour)


@pytest.mark.parametrize("bits, factor", [(8, 257), (10, 64), (12, 16), (14, 4)])
def test_few_bits_in_16_are_refused_and_the_mend_mends(folder, bits, factor):
  values, content = _deep(2**bits - 1)
  with pytest.raises(InputError, match=f"no value above {2**bits - 1} of.* by {factor} if"):
    _pixels(folder(content))
  mended = _pixels(folder(_png(values * factor, 16, 0)))
  np.testing.assert_allclose(mended[0], values / (2**bits - 1), atol=2e-3)


def test_a_dark_image_among_bright_ones_and_a_black_one_are_kept(folder):
  (dark, first), (bright, second) = _deep(900), _deep(65000)
  source = folder(first, second)
  np.testing.assert_allclose(_pixels(source, 2), np.stack([dark, bright]) / 65535, atol=1e-6)
  with pytest.raises(InputError, match="no value above 900 of 65535"):
    _pixels(source)
  assert data.available(source) == 2  # nothing is read for it, so nothing refused
  assert not _pixels(folder(_png(np.zeros((6, 8)), 16, 0))).any()


def test_masks_of_0_and_1_are_refused(folder):
  with pytest.raises(InputError, match="uint8 .* no value above 1 of 255.* Multiply them by 255"):
    _pixels(folder(_saved(Image.fromarray(np.eye(8, dtype=np.uint8)), "PNG")))


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_are_not_cut(folder, colour, channels):
  with pytest.raises(InputError, match="of 16 bits, of which Pillow keeps 8. Save it as 8-bit"):
    _pixels(folder(_deep(65535, 16, colour, channels)[1]))
  tiff = _tiff(RNG.integers(0, 2**16, (6, 8, 3)).astype("<u2"), 8, 16, 2)
  with pytest.raises(InputError, match="of 16 bits, of which Pillow keeps 8"):
    _pixels(folder(tiff))


def test_the_depth_that_a_tiff_tells_is_obeyed(folder):
  values = RNG.integers(0, 2**12, (6, 8))
  values[0, 0] = 2**12 - 1
  bits = (values.reshape(6, -1, 1) >> np.arange(11, -1, -1)) & 1
  packed = _tiff(np.packbits(bits.reshape(6, -1), axis=1), 8, 12, 1)
  tagged = _tiff(values.astype("<u2"), 8, 16, 1, (281, 4095))
  for content in (packed, tagged):
    np.testing.assert_allclose(_pixels(folder(content))[0, ..., 0], values / 4095, atol=1e-6)
  # A largest value that is no range is what the image happens to hold, and one that it exceeds
  # says nothing.
  bright = values * 16
  for tag in (int(bright.max()), 4095, 0):
    content = _tiff(bright.astype("<u2"), 8, 16, 1, (281, tag))
    np.testing.assert_allclose(_pixels(folder(content))[0, ..., 0], bright / 65535, atol=1e-6)
  assert not _pixels(folder(_tiff(np.zeros((6, 8), "<u2"), 8, 16, 1, (281, 0)))).any()


def test_white_as_zero_is_obeyed_or_refused(folder):
  values = np.arange(48, dtype=np.uint8).reshape(6, 8)
  found = _pixels(folder(_tiff(values, 8, 8, 0)))
  np.testing.assert_allclose(found[0, ..., 0] * 255, 255 - values, atol=1e-3)
  with pytest.raises(InputError, match="16-bit values whose 0 is white; save it with 0 black"):
    _pixels(folder(_tiff(values.astype("<u2") * 1000, 8, 16, 0)))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_has_its_full_range(folder, depth):
  values = np.arange(8).reshape(1, 8) % 2**depth
  bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
  content = bytearray(_png(np.packbits(bits.reshape(1, -1), axis=1), depth, 0))
  content[16:20] = struct.pack(">I", 8)
  content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
  np.testing.assert_allclose(_pixels(folder(content))[0, ..., 0], values / (2**depth - 1))


def test_palettes_and_inks_become_colours(folder):
  blocks = np.kron(RNG.integers(0, 256, (2, 3, 3)), np.ones((8, 8, 1))).astype(np.uint8)
  image = Image.fromarray(blocks)
  few = image.quantize(6)
  for content in (_saved(few, "PNG"), _saved(few, "GIF"), _saved(image, "BMP")):
    np.testing.assert_allclose(_pixels(folder(content))[0] * 255, blocks, atol=8)
  for kind in ("JPEG", "TIFF"):
    content = _saved(image.convert("CMYK"), kind)
    assert np.abs(_pixels(folder(content))[0] * 255 - blocks).mean() < 8
  jpeg = _saved(image.convert("CMYK"), "JPEG")
  marker = jpeg.index(b"Adobe") - 4
  with pytest.raises(InputError, match="whether 0 or 255 is full ink; save it as RGB"):
    _pixels(folder(jpeg[:marker] + jpeg[marker + 16 :]))


def test_numbers_are_taken_as_stored_whatever_colours_they_stand_for(folder):
  stored = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  for content in (
    _saved(Image.fromarray(stored), "PNG", icc_profile=profile),
    _png(stored, 8, 2, (b"gAMA", struct.pack(">I", 100_000))),
    _png(stored, 8, 2, (b"sBIT", bytes([5, 6, 5]))),
  ):
    np.testing.assert_allclose(_pixels(folder(content))[0] * 255, stored, atol=1e-3)
  lab = ImageCms.createProfile("LAB")
  transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
  content = _saved(ImageCms.applyTransform(Image.fromarray(stored), transform), "TIFF")
  with pytest.raises(InputError, match="mode 'LAB'; save it as 8-bit grey or RGB"):
    _pixels(folder(content))
  with pytest.raises(InputError, match="mode 'I'; save it as 8-bit grey or RGB"):
    _pixels(folder(_saved(Image.fromarray(stored[..., 0].astype(np.int32)), "TIFF")))


def test_floats_are_kept(folder):
  ramp = np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32)
  np.testing.assert_array_equal(
    _pixels(folder(_saved(Image.fromarray(ramp), "TIFF")))[0, ..., 0], ramp
  )


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("mode", ["grey", "colour"])
def test_transparency_is_refused_unless_there_is_none(folder, mode, depth):
  full = 2**depth - 1
  values = np.full((4, 4, 1 if mode == "grey" else 3), full // 2)
  keyed = _png(values, depth, 0 if mode == "grey" else 2, (b"tRNS", b"\0\1" * values.shape[2]))
  clear = struct.pack(">H", full // 2) * values.shape[2]
  for content, message in {
    _png(values, depth, 0 if mode == "grey" else 2, (b"tRNS", clear)): "transparent pixels",
    keyed: None,
  }.items():
    if (depth, mode) == (16, "colour"):
      message = "of 16 bits"
    if message:
      with pytest.raises(InputError, match=message):
        _pixels(folder(content))
    else:
      found = _pixels(folder(content))
      assert found.shape[-1] == values.shape[2]  # grey stays grey
      np.testing.assert_allclose(found[0], values / full, atol=1e-6)


def test_alpha_and_palettes_with_transparency(folder):
  for mode, size in (("LA", 1), ("RGBA", 3)):
    opaque = Image.new(mode, (4, 4), (200,) * size + (255,))
    np.testing.assert_allclose(_pixels(folder(_saved(opaque, "PNG"))) * 255, 200, atol=1e-3)
    clear = Image.new(mode, (4, 4), (200,) * size + (128,))
    with pytest.raises(InputError, match="transparent pixels; flatten it onto a background"):
      _pixels(folder(_saved(clear, "PNG")))
  image = Image.new("P", (4, 4), 1)
  image.putpalette([0, 0, 0, 250, 100, 50])
  opaque = folder(_saved(image, "GIF", transparency=0))
  np.testing.assert_allclose(_pixels(opaque)[0, 0, 0] * 255, [250, 100, 50], atol=1e-3)
  with pytest.raises(InputError, match="transparent pixels"):
    _pixels(folder(_saved(image, "GIF", transparency=1)))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
def test_a_picture_that_is_damaged_is_refused_or_a_picture(folder, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # sizes that came about take long
  exif = Image.Exif()
  exif[274] = 6
  pixels = RNG.integers(0, 256, (12, 10, 3)).astype(np.uint8)
  rng = np.random.default_rng(1)
  refused = 0
  for kind in ("PNG", "TIFF", "GIF", "JPEG"):
    whole = _saved(Image.fromarray(pixels), kind, **({} if kind == "GIF" else {"exif": exif}))
    for _ in range(200):
      content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.1 else whole)
      # Half of the damage is to the headers, which decoders believe.
      end = len(content) if rng.random() < 0.5 else min(120, len(content))
      for place in rng.integers(0, end, rng.integers(1, 4)):
        content[place] = rng.integers(0, 256)
      try:
        images = _pixels(folder(bytes(content)))
      except InputError as error:
        refused += 1
        assert "\n" not in str(error)
      else:
        assert images.dtype == np.float32 and images.ndim == 4
        assert images.min() >= 0 and images.max() <= 1
  assert 100 < refused < 800


def test_pillow_is_only_needed_where_it_is_used(folder, tmp_path, monkeypatch):
  source = folder(_saved(Image.new("L", (8, 8), 90), "PNG"))
  np.savez(tmp_path / "x.npz", images=np.ones((1, 8, 8, 1)), labels=[0])
  for name in [name for name in sys.modules if name.split(".")[0] == "PIL"]:
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(InputError, match=r'pictures needs .* pillow. Run pip install "jaxdia\[ima'):
    _pixels(source)
  assert _pixels(f"npz:{tmp_path / 'x.npz'}").all()
  with pytest.raises(InputError, match="resizing images needs the package pillow"):
    data.load(f"npz:{tmp_path / 'x.npz'}", 1, image_size=4)


def test_a_device_in_place_of_a_picture_is_refused(tmp_path):
  """It would be read for ever."""
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "0.png").symlink_to("/dev/zero")
  with pytest.raises(InputError, match="0.png cannot be read .*no regular file"):
    data.load(f"folder:{tmp_path}", 1)
