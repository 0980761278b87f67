import importlib.util
import io
import subprocess
import sys
import types

import jax.numpy as jnp
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
  assert victims.statistics == data.DATASETS[name].statistics
  assert victims.class_names is None or len(victims.class_names) == classes
  whole = data.load(f"samples:{name}", 20, image_size=size)
  np.testing.assert_array_equal(whole.images[2:5], victims.images)
  np.testing.assert_array_equal(whole.labels[2:5], victims.labels)


def test_samples_of_mnist_are_the_digits_that_they_say():
  digits = data.load("samples:mnist", 5)
  assert digits.labels.tolist() == [7, 2, 1, 0, 4]
  assert [digits.class_names[label] for label in digits.labels] == list("72104")


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


def test_folder(tmp_path):
  _png(tmp_path / "b" / "1.png", 200)
  _png(tmp_path / "a" / "2.png", 100)
  _png(tmp_path / "a" / "1.png", 50)
  (tmp_path / "a" / "notes.txt").write_text("not an image")
  victims = data.load(f"folder:{tmp_path}", 3)
  assert victims.labels.tolist() == [0, 0, 1] and victims.num_classes == 2
  assert victims.class_names == ("a", "b")
  np.testing.assert_allclose(victims.images[:, 0, 0, 0] * 255, [50, 100, 200], rtol=1e-5)


def test_tfds(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  class SmallSquares(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      image = tfds.features.Image(shape=(8, 8, 3))
      label = tfds.features.ClassLabel(names=["ant", "bee", "cat", "dog"])
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
  assert victims.class_names == ("ant", "bee", "cat", "dog")
  assert data.load("tfds:small_squares/train", 5).labels.shape == (5,)  # prepared already
  with pytest.raises(InputError, match="split of small_squares: 'tset'. Did you mean 'test'"):
    data.load("tfds:small_squares/tset", 3)
  with pytest.raises(InputError, match="test has 3 images"):
    data.load("tfds:small_squares/test", 4)


def test_a_tfds_data_set_whose_labels_are_no_classes_is_refused(monkeypatch):
  import tensorflow_datasets as tfds

  features = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.float32)}
  builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
  monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: builder)
  with pytest.raises(InputError, match="labels of kind Scalar; expected a ClassLabel"):
    data.load("tfds:regression/train", 1)


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
  _png(tmp_path / "a" / "inside" / "1.png", 0)
  (tmp_path / "a" / "1.avif").write_bytes(b"of a kind that is not read")
  with pytest.raises(InputError, match=r"has no images; .* that end in \.apng, \.bmp, .*\.webp\."):
    data.load(f"folder:{tmp_path}", 1)
  _png(tmp_path / "a" / "1.png", 0)
  _png(tmp_path / "a" / "2.png", 0, size=(9, 8))
  with pytest.raises(InputError, match="different shapes.*Set data.image_size"):
    data.load(f"folder:{tmp_path}", 2)
  assert data.load(f"folder:{tmp_path}", 2, image_size=8).images.shape == (2, 8, 8, 3)
  (tmp_path / "a" / "3.png").write_bytes(b"broken")
  with pytest.raises(InputError, match="3.png is no image in PNG, JPEG.*damaged, or"):
    data.load(f"folder:{tmp_path}", 3, image_size=8)


def test_grey_and_colour_do_not_mix_and_hidden_folders_are_no_classes(tmp_path):
  _png(tmp_path / ".hidden" / "1.png", 0)
  _png(tmp_path / "a" / "1.png", 0)
  assert data.load(f"folder:{tmp_path}", 1).labels.tolist() == [0]
  _png(tmp_path / "a" / "2.png", 0, mode="L")
  with pytest.raises(InputError, match="1 and of 3 channels"):
    data.load(f"folder:{tmp_path}", 2, image_size=8)


@pytest.mark.parametrize(
  "folders, in_order",
  [
    ([str(i) for i in range(12)], [str(i) for i in range(12)]),
    ([f"{i:02d}" for i in range(11)], [f"{i:02d}" for i in range(11)]),
    (["10", "9", "100"], ["9", "10", "100"]),
    ([*map(str, range(12)), "lost+found"], [*map(str, range(12)), "lost+found"]),
    (["10", "9", "x", "__MACOSX"], ["9", "10", "__MACOSX", "x"]),
    (["class_10", "class_2"], ["class_10", "class_2"]),
    (["²", "1"], ["1", "²"]),  # a digit to Unicode, but no number
  ],
)
def test_folders_that_are_numbers_are_labelled_in_their_order(tmp_path, folders, in_order):
  for i, name in enumerate(folders):
    _png(tmp_path / name / "1.png", 20 * i, mode="L")
  victims = data.load(f"folder:{tmp_path}", len(folders))
  assert victims.class_names == tuple(in_order)
  # The pixels tell which folder an image is from.
  found = np.rint(victims.images[:, 0, 0, 0] * 255 / 20).astype(int)
  assert [folders[i] for i in found] == [victims.class_names[label] for label in victims.labels]


def test_folders_of_the_same_number_are_refused(tmp_path):
  _png(tmp_path / "1" / "1.png", 0)
  _png(tmp_path / "01" / "1.png", 0)
  with pytest.raises(InputError, match="are the same number; rename one"):
    data.load(f"folder:{tmp_path}", 1)


def test_what_systems_hide_in_a_class_folder_is_no_image(tmp_path):
  _png(tmp_path / "a" / "1.png", 50)
  (tmp_path / "a" / "._1.png").write_bytes(b"resource fork")
  assert data.load(f"folder:{tmp_path}", 1).images.shape == (1, 8, 8, 3)
  assert data.available(f"folder:{tmp_path}") == 1


@pytest.mark.parametrize("module, extra", [("tensorflow_datasets", "tfds"), ("foolbox", "samples")])
def test_a_package_that_is_missing_is_named(monkeypatch, module, extra):
  find = importlib.util.find_spec
  monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *more: None if name == module else find(name, *more)
  )
  source = {"tfds": "tfds:mnist/test", "samples": "samples:mnist"}[extra]
  with pytest.raises(InputError, match=rf'needs the .*Run pip install "jaxdia\[{extra}\]"'):
    data.load(source, 1)


def test_the_room_is_entered_without_the_packages_of_its_sources():
  script = "import sys, jaxdia.data; print([m for m in ('PIL', 'tensorflow_datasets', 'foolbox')"
  script += " if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
  "mean, std",
  [
    (0.25, 0.5),
    ([0.25], [0.5]),
    (np.float32(0.25), np.array(0.5, np.float16)),
    (jnp.array([0.25]), jnp.array([0.5], jnp.bfloat16)),
  ],
)
def test_statistics_have_one_form(mean, std):
  statistics = data.Statistics(mean, std)
  assert statistics == data.Statistics((0.25,), (0.5,)) and len({statistics}) == 1
  assert all(type(x) is float for x in statistics.mean + statistics.std)
  taken_mean, taken_std = statistics
  assert (taken_mean, taken_std) == ((0.25,), (0.5,))


@pytest.mark.parametrize(
  "mean, std, message",
  [
    (0.5, 0.0, r"std is \(0.0,\); expected values above 0"),
    (0.5, -1, "expected values above 0"),
    (0.5, np.nan, "std is nan; expected one finite number a channel"),
    (np.inf, 0.5, "mean is inf; expected one finite"),
    ((0.5, 0.5, 0.5), 0.5, "have 3 means and 1 standard deviations"),
    ((), (), r"mean is \(\); expected one finite"),
    ("half", 0.5, "mean is 'half'"),
    (None, 0.5, "mean is None"),
    (np.full((32, 32), 0.5), 0.5, r"mean is array\(\[\[0.5, .*; expected one finite"),
    ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "Divide mean and std by 255"),
  ],
)
def test_statistics_are_checked(mean, std, message):
  with pytest.raises(InputError, match=message) as caught:
    data.Statistics(mean, std)
  assert "\n" not in str(caught.value)


def test_statistics_may_be_given_as_a_pair():
  pixels, own = np.full((1, 4, 4, 1), 0.5, np.float32), data.Statistics(0.25, 0.5)
  for pair in ((0.25, 0.5), [[0.25], [0.5]], (np.array([0.25]), jnp.array([0.5]))):
    np.testing.assert_array_equal(data.normalize(pixels, pair), data.normalize(pixels, own))
    np.testing.assert_array_equal(data.denormalize(pixels, pair), data.denormalize(pixels, own))
  for wrong in ("mnist", {"mean": 0.25, "std": 0.5}, 0.5, (0.5,), None):
    with pytest.raises(InputError, match=r"expected a Statistics\(mean, std\), or the two as"):
      data.normalize(pixels, wrong)
  assert data.load("sklearn:digits/test", 1, statistics=own).statistics == own


def test_counts_of_numpy_are_counts():
  victims = data.load("sklearn:digits/test", np.int64(2), np.int32(1), num_classes=np.int64(12))
  assert len(victims.images) == 2 and victims.num_classes == 12


def test_each_data_set_is_known_in_one_place():
  for name, known in data.DATASETS.items():
    assert known.samples is None or data.available(f"samples:{name}") == 20
    assert data.statistics_of(name) is data.STATISTICS[name] is known.statistics
  assert data.statistics_of("neutral") is data.NEUTRAL
