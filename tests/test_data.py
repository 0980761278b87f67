import io

import numpy as np
import pytest
from PIL import Image

from jaxdia import data
from jaxdia.core.errors import InputError


def _png(path, value, size=(8, 8), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value)).save(path)


@pytest.mark.parametrize(
  "name, shape, classes",
  [
    ("mnist", (28, 28, 1), 10),
    ("fashion_mnist", (28, 28, 1), 10),
    ("cifar10", (32, 32, 3), 10),
    ("cifar100", (32, 32, 3), 100),
    ("imagenet", (224, 224, 3), 1000),
  ],
)
def test_samples(name, shape, classes):
  size = 224 if name == "imagenet" else None  # those are of many sizes
  victims = data.load(f"samples:{name}", 3, 2, image_size=size)
  assert victims.images.shape == (3, *shape) and victims.images.dtype == np.float32
  assert 0 <= victims.images.min() < 0.2 and 0.8 < victims.images.max() <= 1
  assert victims.labels.dtype == np.int32 and victims.num_classes == classes
  assert victims.statistics == data.STATISTICS[name]
  whole = data.load(f"samples:{name}", 20, image_size=size)
  np.testing.assert_array_equal(whole.images[2:5], victims.images)
  np.testing.assert_array_equal(whole.labels[2:5], victims.labels)


def test_samples_of_mnist_are_the_digits_that_they_say():
  assert data.load("samples:mnist", 5).labels.tolist() == [7, 2, 1, 0, 4]


def test_normalize_and_back():
  victims = data.load("samples:cifar10", 2)
  images = data.normalize(victims.images, victims.statistics)
  assert abs(images.mean()) < 1 and 0.5 < images.std() < 2
  np.testing.assert_allclose(
    data.denormalize(images, victims.statistics), victims.images, atol=1e-6
  )


def test_images_are_scaled_and_cropped():
  victims = data.load("samples:imagenet", 1, image_size=32)
  full = data.load("samples:imagenet", 1)
  assert victims.images.shape == (1, 32, 32, 3)
  coarse = full.images.reshape(1, 32, 16, 32, 16, 3).mean((2, 4))
  assert np.corrcoef(coarse.ravel(), victims.images.ravel())[0, 1] > 0.97


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
  assert data.load(source, 2, statistics="cifar10").statistics == data.STATISTICS["cifar10"]
  assert data.load(source, 2, num_classes=10).num_classes == 10


def test_npz_of_floats(npz):
  images = np.random.default_rng(0).uniform(size=(2, 5, 5, 1))
  victims = data.load(npz(images=images, labels=np.array([0, 1])), 2)
  np.testing.assert_allclose(victims.images, images, rtol=1e-6)


def test_folder(tmp_path):
  _png(tmp_path / "b" / "1.png", 200)
  _png(tmp_path / "a" / "2.png", 100)
  _png(tmp_path / "a" / "1.png", 50)
  (tmp_path / "a" / "notes.txt").write_text("not an image")
  victims = data.load(f"folder:{tmp_path}", 3)
  assert victims.labels.tolist() == [0, 0, 1] and victims.num_classes == 2
  np.testing.assert_allclose(victims.images[:, 0, 0, 0] * 255, [50, 100, 200], rtol=1e-5)


def test_tfds(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  class SmallSquares(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      image = tfds.features.Image(shape=(8, 8, 3))
      label = tfds.features.ClassLabel(num_classes=4)
      features = tfds.features.FeaturesDict({"image": image, "label": label})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(5), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
      for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (10 * i, 0, count)).save(file, "png")
        file.seek(0)
        yield i, {"image": file, "label": i % 4}

  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  builder = tfds.builder
  monkeypatch.setattr(
    tfds, "builder", lambda *args, **kwargs: builder(*args, data_dir=tmp_path, **kwargs)
  )
  victims = data.load("tfds:small_squares/test", 3)  # prepared on first use
  assert victims.images.shape == (3, 8, 8, 3) and victims.num_classes == 4
  red = np.rint(victims.images[:, 0, 0, 0] * 255).astype(int)
  assert sorted(zip(red, victims.labels, strict=True)) == [(0, 0), (10, 1), (20, 2)]
  assert data.load("tfds:small_squares/train", 5).labels.shape == (5,)  # prepared already
  with pytest.raises(InputError, match="split of small_squares: 'tset'. Did you mean 'test'"):
    data.load("tfds:small_squares/tset", 3)
  with pytest.raises(InputError, match="test has 3 images"):
    data.load("tfds:small_squares/test", 4)


GOOD = {"images": np.zeros((3, 4, 4, 1), np.uint8), "labels": np.arange(3)}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"labels": None}, r"lacks \['labels'\]"),
    ({"images": np.zeros((3, 4, 4), np.uint8)}, r"shape \(3, 4, 4\); expected \(N, height"),
    ({"images": np.zeros((3, 4, 4, 1), np.int32)}, "image 0 of .* is int32; expected uint8"),
    ({"images": np.full((3, 4, 4, 1), 2.0)}, "pixels from 2 to 2; expected floats in"),
    ({"images": np.full((3, 4, 4, 1), -0.1)}, "pixels from -0.1 to -0.1"),
    ({"images": np.full((3, 4, 4, 1), np.nan)}, "NaN or infinite pixels"),
    ({"images": np.zeros((3, 0, 4, 1), np.uint8)}, r"shape \(0, 4, 1\)"),
    ({"labels": np.arange(2)}, r"labels in .* are int64 of shape \(2,\)"),
    ({"labels": np.zeros(3)}, "labels in .* are float64"),
    ({"labels": np.array([0, 1, -1])}, "has the label -1; expected classes from 0 to 1"),
    ({"labels": np.array([0, 1, 2**40])}, "num_classes is 1099511627777"),
    ({"labels": np.array([0, 1, 2**63], np.uint64)}, "num_classes is"),
    ({"images": np.array([{}] * 3)}, "pickled objects, which are refused"),
  ],
)
def test_npz_refuses(npz, change, message):
  arrays = {k: v for k, v in (GOOD | change).items() if v is not None}
  with pytest.raises(InputError, match=message):
    data.load(npz(**arrays), 3)


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


@pytest.mark.parametrize(
  "source, options, message",
  [
    ("sample:mnist", {}, "Unknown data source 'sample:mnist'. Did you mean 'samples:...'"),
    ("samples:mnits", {}, "'mnits'. Did you mean 'mnist'"),
    ("samples:mnist", {"count": 21}, "has 20 images; data.count=21 from data.offset=0 needs 21"),
    ("samples:mnist", {"offset": 20}, "has 20 images"),
    ("samples:mnist", {"count": 0}, "data.count is 0"),
    ("samples:mnist", {"offset": -1}, "data.offset is -1"),
    ("samples:mnist", {"image_size": 0}, "data.image_size is 0"),
    ("samples:mnist", {"statistics": "cifar10"}, "are for 3 channels, but"),
    ("samples:mnist", {"statistics": "minst"}, "Did you mean 'mnist'"),
    ("samples:mnist", {"num_classes": 0}, "num_classes is 0"),
    ("samples:mnist", {"num_classes": 2.5}, "num_classes is 2.5"),
    ("samples:mnist", {"statistics": ""}, "Unknown statistics ''"),
    ("samples:mnist", {"num_classes": 5}, "has the label 7; expected classes from 0 to 4"),
    ("npz:/no/such.npz", {}, "/no/such.npz is no file"),
    ("npz:" + 300 * "a", {}, "is no path"),
    ("folder:~nosuchuser/x", {}, "is no path"),
    ("folder:", {}, "names no path"),
    ("tfds:1abc/test", {}, "'1abc'"),
    ("tfds:../x/test", {}, "could not be prepared"),
    ("tfds:mnist:9.9.9/test", {}, "'mnist:9.9.9' could not be prepared"),
    ("folder:/no/such", {}, "/no/such is no folder"),
    ("tfds:mnist", {}, "expected tfds:NAME/SPLIT"),
    ("tfds:no_such_data_set/test", {}, "tensorflow-datasets has no data set 'no_such_data_set'"),
  ],
)
def test_load_refuses(source, options, message):
  with pytest.raises(InputError, match=message):
    data.load(**({"source": source, "count": 3} | options))


def test_folders_that_cannot_be_used_are_refused(tmp_path):
  with pytest.raises(InputError, match="has no images"):
    data.load(f"folder:{tmp_path}", 1)
  _png(tmp_path / "a" / "1.png", 0)
  _png(tmp_path / "a" / "2.png", 0, size=(9, 8))
  with pytest.raises(InputError, match="different shapes.*Set data.image_size"):
    data.load(f"folder:{tmp_path}", 2)
  assert data.load(f"folder:{tmp_path}", 2, image_size=8).images.shape == (2, 8, 8, 3)
  (tmp_path / "a" / "3.png").write_bytes(b"broken")
  with pytest.raises(InputError, match="3.png cannot be read as an image"):
    data.load(f"folder:{tmp_path}", 3, image_size=8)


def _folder_with(tmp_path, image, name="1.png"):
  path = tmp_path / "a" / name
  path.parent.mkdir(parents=True)
  image.save(path)
  return f"folder:{tmp_path}"


def test_pixels_of_16_bits_and_of_floats_are_kept(tmp_path):
  ramp = np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32)
  for name, image in {
    "1.png": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
    "1.tif": Image.fromarray(ramp),
  }.items():
    victims = data.load(_folder_with(tmp_path / name, image, name), 1)
    np.testing.assert_allclose(victims.images[0, ..., 0], ramp, atol=1e-5)


def test_transparency_is_refused_unless_there_is_none(tmp_path):
  opaque = Image.new("RGBA", (4, 4), (200, 10, 10, 255))
  victims = data.load(_folder_with(tmp_path / "opaque", opaque), 1)
  np.testing.assert_allclose(victims.images[0, 0, 0] * 255, [200, 10, 10])
  clear = Image.new("RGBA", (4, 4), (200, 10, 10, 128))
  with pytest.raises(InputError, match="transparent pixels"):
    data.load(_folder_with(tmp_path / "clear", clear), 1)


def test_grey_and_colour_do_not_mix_and_hidden_folders_are_no_classes(tmp_path):
  _png(tmp_path / ".hidden" / "1.png", 0)
  _png(tmp_path / "a" / "1.png", 0)
  assert data.load(f"folder:{tmp_path}", 1).labels.tolist() == [0]
  _png(tmp_path / "a" / "2.png", 0, mode="L")
  with pytest.raises(InputError, match="1 and of 3 channels"):
    data.load(f"folder:{tmp_path}", 2, image_size=8)
