"""Arrays from an npz: layouts, types and labels are right, or refused with what mends them."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxdia import data
from jaxdia.core.errors import InputError

RNG = np.random.default_rng(0)
GOOD = {"images": np.zeros((3, 4, 4, 1), np.uint8), "labels": np.arange(3)}


@pytest.fixture
def npz(tmp_path):
  def write(**arrays):
    path = tmp_path / "victims.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"

  return write


def test_npz(npz):
  assert data.load(npz(images=GOOD["images"], labels=np.array([0, 1, 9])), 2).num_classes == 10
  images = np.arange(4 * 6 * 6 * 3, dtype=np.uint8).reshape(4, 6, 6, 3)
  source = npz(images=images, labels=np.array([0, 2, 1, 2]))
  victims = data.load(source, 2, 1)
  np.testing.assert_allclose(victims.images, images[1:3] / 255, rtol=1e-6)
  assert victims.labels.tolist() == [2, 1] and victims.statistics == data.NEUTRAL
  assert victims.class_names is None
  assert data.load(source, 2, statistics="cifar10").statistics == data.STATISTICS["cifar10"]
  assert data.load(source, 2, num_classes=10).num_classes == 10


@pytest.mark.parametrize(
  "shape",
  [(3, 1, 28, 28), (4, 3, 32, 32), (2, 3, 20, 30), (2, 1, 4, 4), (2, 2, 9, 9), (2, 4, 9, 7)]
  + [(2, 8, 64, 64)],
)
def test_channels_first_is_refused_and_the_mend_mends(npz, shape):
  images, labels = RNG.uniform(size=shape), np.arange(shape[0])
  with pytest.raises(InputError, match=r"Use images.transpose\(0, 2, 3, 1\)"):
    data.load(npz(images=images, labels=labels), 1)
  mended = images.transpose(0, 2, 3, 1)
  np.testing.assert_allclose(
    data.load(npz(images=mended, labels=labels), 2).images, mended[:2], rtol=1e-6
  )


@pytest.mark.parametrize(
  "shape",
  # grey and colour of any size; with infrared or alpha; two bands; hyperspectral patches, spectra
  [(2, 28, 28, 1), (2, 3, 32, 3), (2, 1, 1, 3), (2, 32, 32, 4), (2, 20, 30, 2)]
  + [(2, 9, 9, 103), (2, 7, 9, 200), (2, 3, 3, 200), (2, 1, 1, 200), (2, 8, 8, 8)],
)
def test_channels_last_is_taken_at_its_word(npz, shape):
  images = RNG.uniform(size=shape)
  found = data.load(npz(images=images, labels=[0, 1]), 2).images
  np.testing.assert_allclose(found, images, rtol=1e-6)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"images": np.zeros((3, 8, 8))}, r"Add an axis for the channels: images\[..., None\]"),
    ({"images": np.zeros((8, 8, 3)), "labels": [1]}, r"Add an axis: images\[None\] for one image"),
    ({"images": np.zeros((3, 784))}, r"images.reshape\(N, height, width, channels\)"),
    ({"images": np.zeros(())}, r"have shape \(\); expected \(N, height"),
    ({"images": np.zeros((8, 8, 3, 5)), "labels": np.arange(5)}, r"transpose\(3, 0, 1, 2\)"),
    ({"images": np.zeros((0, 8, 8, 3)), "labels": np.zeros(0, int)}, "has no images"),
    ({"labels": np.arange(3)[:, None]}, r"of shape \(3, 1\); .* Use labels.ravel\(\)"),
    ({"labels": np.arange(3.0)[:, None]}, r"labels.ravel\(\)"),
    ({"labels": np.eye(10)[:3]}, r"Use labels.argmax\(1\) if they are one-hot"),
    ({"labels": np.arange(3.0)}, r"labels in .* are float64 .* labels.astype\(int\)"),
    ({"labels": np.array(["cat", "dog", "cat"])}, "numpy.unique.labels, return_inverse=True"),
    ({"labels": np.arange(2)}, r"labels in .* are int64 of shape \(2,\); .* one class an image.$"),
    ({"labels": np.arange(3) + 0j}, r"labels in .* are complex128 .* one class an image.$"),
    ({"labels": np.array(3)}, r"of shape \(\)"),
    ({"images": np.zeros((3, 8, 8, 5)), "labels": np.arange(5)}, r"transpose\(3, 1, 2, 0\)"),
    ({"images": None, "x_train": np.zeros(3)}, "lacks .'images'.; .* It has .*x_train: write it"),
    ({"labels": None}, r"lacks \['labels'\]"),
    ({"images": np.zeros((3, 4, 4, 1), np.int32)}, "image 0 of .* is int32; .*astype.numpy.uint8"),
    ({"images": np.zeros((3, 4, 4, 1), bool)}, "is bool; expected uint8 or uint16"),
    ({"images": np.zeros((3, 4, 4, 1), complex)}, "is complex128; expected"),
    ({"images": np.zeros((3, 4, 4, 1), ml_dtypes.bfloat16)}, "save bfloat16 as float32"),
    ({"images": np.full((3, 4, 4, 1), 2.0)}, "pixels from 2 to 2; expected floats in"),
    ({"images": np.full((3, 4, 4, 1), 255.0)}, "Divide by 255"),
    ({"images": np.full((3, 4, 4, 1), 16.0)}, "or by what else stands for white"),
    ({"images": np.full((3, 4, 4, 1), 0.99 / 255)}, "no value above 0.00388; .* nearly black"),
    ({"images": np.full((3, 4, 4, 1), 4095 / 65535)}, "no value above 0.0625; expected images"),
    ({"images": np.full((3, 4, 4, 1), -0.1)}, "pixels from -0.1 to -0.1"),
    ({"images": np.full((3, 4, 4, 1), np.nan)}, "NaN or infinite pixels"),
    ({"images": np.full((3, 4, 4, 1), np.inf, np.float16)}, "NaN or infinite pixels"),
    ({"images": np.full((3, 4, 4, 1), 4095, np.uint16)}, "no value above 4095 of 65535"),
    ({"images": np.full((3, 4, 4, 1), 4095, ">u2")}, "no value above 4095 of 65535"),
    ({"images": np.ones((3, 4, 4, 1), np.uint8)}, "no value above 1 of 255"),
    ({"images": np.zeros((3, 0, 4, 1), np.uint8)}, r"shape \(0, 4, 1\)"),
    ({"labels": np.array([0, 1, -1])}, "has the label -1; expected classes from 0 to 1"),
    ({"labels": np.array([0, 1, 2**40])}, "num_classes is 1099511627777"),
    ({"labels": np.array([0, 1, 2**63], np.uint64)}, "num_classes is"),
    ({"images": np.array([{}] * 3)}, "pickled objects, which are refused"),
    ({"class_names": np.array(["a", "b"])}, "class_names in .* one string for each of the 3"),
    ({"class_names": np.array([b"a", b"b", b"c"])}, r"are \|S1 of shape \(3,\)"),
    ({"class_names": np.array("abc")}, r"of shape \(\); expected one string"),
    ({"class_names": np.arange(3)}, "class_names in .* are int64"),
  ],
)
def test_npz_refuses(npz, change, message):
  arrays = {k: v for k, v in (GOOD | change).items() if v is not None}
  with pytest.raises(InputError, match=message):
    data.load(npz(**arrays), 3)


def test_few_levels_in_8_bits_are_warned_of(npz):
  source = npz(images=np.full((3, 4, 4, 1), 16, np.uint8), labels=np.arange(3))
  with pytest.warns(UserWarning, match="no value above 16 of 255, .* If that is what stands for"):
    data.load(source, 3)


def test_one_hot_labels_of_few_images_are_not_taken_for_another_layout(npz):
  with pytest.raises(InputError, match=r"labels.argmax\(1\)"):
    data.load(npz(images=np.zeros((1, 8, 8, 3)), labels=np.eye(3)[:1]), 1)


@pytest.mark.parametrize("dtype", ["bool", "u1", "i1", "<i4", ">i4", ">i8", "u8"])
def test_labels_of_any_integers(npz, dtype):
  victims = data.load(npz(images=GOOD["images"], labels=np.array([1, 0, 1], dtype)), 3)
  assert victims.labels.tolist() == [1, 0, 1] and victims.labels.dtype == np.int32
  assert victims.num_classes == 2


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f2", ">f4", ">f8", "longdouble"])
@pytest.mark.parametrize("order", "CF")
def test_pixels_of_any_floats(npz, dtype, order):
  images = np.asarray(RNG.uniform(size=(2, 5, 6, 3)).astype(dtype), order=order)
  found = data.load(npz(images=images, labels=[0, 1]), 2).images
  assert found.dtype == np.float32 and found.dtype.isnative and found.flags.c_contiguous
  np.testing.assert_allclose(found, images.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_pixels_of_integers_have_the_range_of_their_type(npz, dtype):
  full = np.iinfo(dtype).max
  images = RNG.integers(0, full + 1, (2, 5, 6, 3)).astype(dtype)
  found = data.load(npz(images=images, labels=[0, 1]), 2).images
  np.testing.assert_allclose(found, images / full, rtol=1e-6)


def test_class_names_are_kept_and_tell_the_number_of_classes(npz):
  victims = data.load(npz(**GOOD, class_names=["ant", "bee", "cat", "élan"]), 3)
  assert victims.class_names == ("ant", "bee", "cat", "élan") and victims.num_classes == 4
  assert all(type(name) is str for name in victims.class_names)


@pytest.mark.parametrize("content", [b"", b"no npz", "truncated", "one array"])
def test_files_that_are_no_npz_are_refused(tmp_path, content):
  path = tmp_path / "victims.npz"
  if content == "truncated":
    np.savez(path, images=np.zeros((9, 32, 32, 3)), labels=np.arange(9))
    content = path.read_bytes()[:1000]
  if content == "one array":
    file = io.BytesIO()
    np.save(file, np.zeros((3, 4, 4, 1)))
    content = file.getvalue()
  path.write_bytes(content)
  with pytest.raises(InputError, match=f"{path} (cannot be read|is no npz)"):
    data.load(f"npz:{path}", 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_refused_or_valid(tmp_path, save):
  path = tmp_path / "victims.npz"
  save(path, images=RNG.uniform(size=(2, 4, 4, 1)), labels=[0, 1], class_names=["a", "b"])
  whole = path.read_bytes()
  rng = np.random.default_rng(1)
  refused = 0
  for _ in range(300):
    content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.1 else whole)
    for place in rng.integers(0, len(content), rng.integers(1, 4)):
      content[place] = rng.integers(0, 256)
    path.write_bytes(content)
    try:
      victims = data.load(f"npz:{path}", 2)
    except InputError as error:
      refused += 1
      assert "\n" not in str(error)
    else:
      assert victims.images.dtype == np.float32 and victims.images.ndim == 4
      assert victims.images.min() >= 0 and victims.images.max() <= 1
      assert ((0 <= victims.labels) & (victims.labels < victims.num_classes)).all()
  assert 50 < refused < 300


def test_an_npz_with_damaged_headers_is_refused_or_valid(tmp_path):
  """A zip file whose sums are right: only numpy can notice."""
  path = tmp_path / "victims.npz"
  np.savez(path, images=RNG.uniform(size=(2, 4, 4, 1)), labels=[0, 1], class_names=["a", "b"])
  with zipfile.ZipFile(path) as file:
    members = {name: file.read(name) for name in file.namelist()}
  rng = np.random.default_rng(2)
  refused = 0
  for _ in range(400):
    with zipfile.ZipFile(path, "w") as file:
      for name, whole in members.items():
        content = bytearray(whole)
        if rng.random() < 0.5:
          content[rng.integers(0, 120)] = rng.integers(0, 256)
        file.writestr(name, bytes(content))
    try:
      images = data.load(f"npz:{path}", 2).images
    except InputError as error:
      refused += 1
      assert "\n" not in str(error)
    else:
      assert images.dtype == np.float32 and images.ndim == 4
  assert 50 < refused < 400


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path):
  """Two GiB of zeros are two MiB in a zip file."""
  path = tmp_path / "victims.npz"
  header = io.BytesIO()
  described = {"descr": "<f4", "fortran_order": False, "shape": (2**29, 1, 1, 1)}
  np.lib.format.write_array_header_1_0(header, described)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    with archive.open("images.npy", "w", force_zip64=True) as file:
      file.write(header.getvalue())
      for _ in range(2**5):
        file.write(bytes(2**26))
  assert path.stat().st_size < 2**24
  with pytest.raises(InputError, match="would take 2 GiB"):
    data.load(f"npz:{path}", 1)
