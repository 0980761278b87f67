"""Networks of the user's own, named by an import path."""

import importlib.util
import json

import numpy as np
import pytest
from experiment_cases import ROOT, launch, rows_of, silent, small

from jaxdia import experiment, study
from jaxdia.core.errors import InputError
from jaxdia.experiment.config import ModelSettings, config_for, validate
from jaxdia.experiment.network import common_rate, create_model

NETS = """
import flax.linen as nn
from flax import nnx
from jaxdia import models


class SmallCNN(nn.Module):
  num_classes: int
  dropout_rate: float = 0.5
  num_filters: int = 4

  @nn.compact
  def __call__(self, images, train=True):
    x = nn.gelu(nn.Conv(self.num_filters, (3, 3), strides=3)(images))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


class Narrow(nn.Module):
  @nn.compact
  def __call__(self, images, train=True):
    x = nn.Dropout(0.1, deterministic=not train)(images.reshape(len(images), -1))
    x = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
    return nn.Dense(10)(x)


class Normed(nn.Module):
  num_classes: int
  dropout_rate: float = 0.5

  @nn.compact
  def __call__(self, images, train=True):
    x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), strides=3)(images))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.max_pool(x, (2, 2)))
    return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def factory(num_classes, sizes):
  return models.create("mlp", (28, 28, 1), num_classes, 0.2, hidden_sizes=sizes)


def of_no_kind():
  return 3


def failing():
  raise ValueError("no such weights")


class Tiny(nnx.Module):
  def __init__(self, num_classes, dropout_rate, rngs):
    self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
    self.out = nnx.Linear(784, num_classes, rngs=rngs)

  def __call__(self, images):
    return self.out(self.dropout(images.reshape(len(images), -1)))


ready = SmallCNN(10)
number = 7
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
  """A module of its own name, as Python keeps those that were imported."""
  name = "nets_of_" + tmp_path.name.replace("-", "_")
  (tmp_path / f"{name}.py").write_text(NETS)
  monkeypatch.syspath_prepend(tmp_path)
  return name


def _create(path, rate=0.5, **options):
  return create_model(ModelSettings(path, rate, tuple(options.items())), (28, 28, 1), 10)


def test_the_launcher_attacks_a_module_of_the_current_folder(tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "nets.py").write_text(NETS)
  arguments = ["--workdir=run", "--config.data.count=1", "--config.attack.max_iterations=3"]
  arguments += ["--config.model.name=mine.nets:SmallCNN", "--config.model.num_filters=3"]
  result = launch(*arguments, config=f"{ROOT}/configs/own_model.py:mnist", cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert "mine.nets:SmallCNN, dropout rate 0.25 at 1 sites" in result.stdout
  assert f"{3 * 9 + 3 + 3 * 10 * 10 * 10 + 10:,} gradient entries" in result.stdout
  (row,) = rows_of(tmp_path / "run")
  assert row["model"] == "mine.nets:SmallCNN" and row["dropout_rate"] == 0.25
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["model"]["num_filters"] == 3
  # Changed, it is another network.
  (tmp_path / "mine" / "nets.py").write_text(NETS.replace("gelu", "relu"))
  result = launch(*arguments, config=f"{ROOT}/configs/own_model.py:mnist", cwd=tmp_path)
  assert result.returncode == 2 and "another experiment: its model.sha256 is" in result.stderr


def test_rates_of_the_modules_own_are_told_as_they_are(nets):
  narrow = _create(f"{nets}:Narrow", 0.9)
  assert [site.rate for site in narrow.sites] == [0.1, 0.3]
  np.testing.assert_allclose(common_rate(narrow), 0.2)
  assert common_rate(_create(f"{nets}:SmallCNN", 0.0)) == 0
  normed = _create(f"{nets}:Normed", 0.3)
  assert common_rate(normed) == 0.3 and normed == _create(f"{nets}:Normed", 0.3)
  assert set(normed.network.collections.tree) == {"batch_stats"}
  assert common_rate(_create(f"{nets}:ready")) == 0.5


EQUINOX = """
import equinox as eqx
import jax


class Tiny(eqx.Module):
  layers: list

  def __init__(self, num_classes, dropout_rate, key):
    self.layers = [eqx.nn.Dropout(dropout_rate), eqx.nn.Linear(784, num_classes, key=key)]

  def __call__(self, image, key):
    return self.layers[1](self.layers[0](image.ravel(), key=key))
"""
TORCH = """
from torch import nn


class Tiny(nn.Sequential):
  def __init__(self, num_classes, dropout_rate):
    super().__init__(nn.Flatten(), nn.Dropout(dropout_rate), nn.Linear(784, num_classes))
"""


@pytest.mark.parametrize(
  ("library", "source"), [("flax", NETS), ("equinox", EQUINOX), ("torchax", TORCH)]
)
def test_a_class_of_any_library_is_made_with_what_it_takes(library, source, tmp_path, monkeypatch):
  if importlib.util.find_spec(library) is None:
    pytest.skip(f"{library} is not installed")
  (tmp_path / f"tiny_{library}.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  model = _create(f"tiny_{library}:Tiny", 0.3)
  assert [site.rate for site in model.sites] == [0.3] and model.num_classes == 10
  # In another process it is the same network, with the same weights.
  create_model.cache_clear()
  assert _create(f"tiny_{library}:Tiny", 0.3) == model


def test_a_factory_may_return_a_dropout_model(nets):
  assert _create(f"{nets}:factory", sizes=(8, 8)) == _create("mlp", 0.2, hidden_sizes=(8, 8))


def test_a_study_varies_an_argument_of_the_users_module(nets, tmp_path):
  base = config_for(f"{nets}:SmallCNN", "mnist")
  base.data.count, base.attack.max_iterations = 1, 2
  grid = [("model.num_filters", (2, 3)), ("seed", (0, 1))]
  config = study.study_config("T", "Q?", base, grid=grid)
  assert [len(one.cells) for one in study.group(study.plan(config))] == [2, 2]
  assert study.run(config, tmp_path / "run", say=silent) == {}


@pytest.mark.parametrize(
  ("path", "options", "message"),
  [
    ("{}:SmalCNN", {}, "attribute of .*'SmalCNN'. Did you mean 'SmallCNN'"),
    ("{}_:SmallCNN", {}, "there is no module 'nets_.*_'. It is looked for in the current folder"),
    ("no_such.{}:SmallCNN", {}, "there is no module 'no_such'"),
    ("{}:", {}, "expected a module, a colon and what is in it"),
    ("{}:SmallCNN", {"num_filter": 3}, "'num_filter'. Did you mean 'num_filters'"),
    ("{}:SmallCNN", {"num_filters": "many"}, "many"),
    ("{}:factory", {}, "cannot be made: TypeError: .*'sizes'"),
    ("{}:failing", {}, "cannot be made: ValueError: no such weights"),
    ("{}:of_no_kind", {}, "gives a int; expected a module of Flax Linen"),
    ("{}:number", {}, "gives a int; expected a class or a function"),
    ("{}:ready", {"num_filters": 3}, "is made already and takes no arguments"),
    ("{}:models", {}, "gives a module; expected a class or a function"),
  ],
)
def test_what_cannot_be_made_is_refused_in_one_line(nets, path, options, message):
  with pytest.raises(InputError, match=message) as error:
    _create(path.format(nets), **options)
  assert len(str(error.value).splitlines()) == 1


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "broken_nets.py").write_text("import no_such_package")
  with pytest.raises(InputError, match="cannot import .*ModuleNotFoundError: .*no_such_package"):
    _create("broken_nets:Net")
  (tmp_path / "odd_nets.py").write_text("1 +")
  with pytest.raises(InputError, match="cannot import .*SyntaxError"):
    _create("odd_nets:Net")


def test_wrong_options_write_nothing(nets, tmp_path):
  config = small()
  config.model = {"name": f"{nets}:SmallCNN", "dropout_rate": 0.5, "num_filter": 2}
  with pytest.raises(InputError, match="num_filter"):
    experiment.run(config, tmp_path / "run", say=silent)
  assert not (tmp_path / "run").exists()
  config.model = {"name": "mlp", "hidden_sizes": {"a": {1}}}
  with pytest.raises(InputError, match="expected a number, a string or a sequence"):
    validate(config)
