"""Settings: what is refused, in one line, before anything is written."""

import io
import os
import re
import subprocess
import sys

import pytest
from experiment_cases import ROOT, launch, silent, small

from jaxdia import command_line, experiment
from jaxdia.core.errors import InputError
from jaxdia.experiment.config import DataSettings, default_config, validate


@pytest.mark.parametrize("variable, devices", [(None, os.cpu_count()), ("1", 1), ("3", 3)])
def test_cpu_cores_are_devices_unless_the_environment_says_otherwise(variable, devices, tmp_path):
  environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  if variable is not None:
    environment["JAX_NUM_CPU_DEVICES"] = variable
  program = "import jax; from jaxdia.core.machine import share_cpu; share_cpu()"
  program += "; print(jax.local_device_count())"
  output = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True
  ).stdout
  assert int(output) == min(devices, 8)


@pytest.mark.parametrize(
  "file",
  sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.name not in ("audit.py", "text.py")),
)
def test_every_config_is_valid(file):
  namespace = {}
  exec((ROOT / "configs" / file).read_text(), namespace)
  config = namespace["get_config"]()
  settings = validate(config)
  for attack in settings.attacks.values():
    paper = (0.1, 1e-5, 1e-4, 800, 4000, 1e-5)
    assert paper == (
      attack.learning_rate, attack.tv_weight, attack.mask_weight, attack.plateau_patience,
      attack.patience, attack.tolerance,
    )  # fmt: skip
  shorter = {"quickstart.py": 2000, "fedavg.py": 1000}
  assert attack.max_iterations == shorter.get(file, 20_000)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"attack.name": "dai"}, "Unknown attack 'dai'. Did you mean 'dia'"),
    ({"attack.name": "ig,ig"}, "expected each attack once"),
    ({"attack.restarts": 0}, "config.attack.restarts is 0"),
    ({"attack.labels": "gven"}, "attack.labels: 'gven'. Did you mean 'given'"),
    ({"model.name": "mpl"}, "Unknown model 'mpl'"),
    ({"model.dropout_rate": 1.0}, r"dropout_rate is 1.0; expected a number in \[0, 1\)"),
    ({"model.dropout_rate": -0.1}, "dropout_rate is -0.1"),
    ({"data.source": "sample:mnist"}, "Unknown data source"),
    ({"data.count": 0}, "config.data.count is 0"),
    ({"data.count": 30}, "has 20 images"),
    ({"data.batch_size": 2}, "cannot be cut into batches"),
    ({"data.source": "npz:/no/such"}, "/no/such is no file"),
    ({"engine.lanes": 0}, "config.engine.lanes is 0"),
    ({"engine.chunk": 0}, "config.engine.chunk is 0"),
    ({"engine.matching": "fast"}, "config.engine.matching: 'fast'. Choose one of: auto"),
    ({"engine.convolve": "fft"}, "config.engine.convolve: 'fft'. Choose one of: auto"),
    ({"precision": "bfloat16"}, "config.precision: 'bfloat16'. Did you mean 'float"),
    ({"engine.checkpoint_seconds": -1.0}, "checkpoint_seconds is -1.0"),
    ({"engine.checkpoint_seconds": float("nan")}, "checkpoint_seconds is nan"),
    ({"attack.max_iterations": 10**10}, "max_iterations is 10000000000"),
    ({"seed": -1}, "config.seed is -1"),
    ({"attack.restarts": 10**15}, "restarts is 1000000000000000"),
    ({"data.image_size": 10**7}, "image_size is 10000000"),
    ({"model.hidden_sizes": (10**9, 10**9)}, "1,000,000,794,000,000,000 weights"),
  ],
)
def test_bad_settings_write_nothing(change, message, tmp_path):
  config = small()
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=message):
    experiment.run(config, tmp_path / "run", say=silent)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"source": "nope"}, "Unknown data source 'nope'. Choose one of: samples:..., "),
    ({"source": "sample:mnist"}, "Did you mean 'samples:...'"),
    ({"source": None}, "Unknown data source None"),
    ({"offset": -1}, "config.data.offset is -1; expected an integer of at least 0"),
    ({"offset": None}, "config.data.offset is None"),
    ({"offset": 1.5}, "config.data.offset is 1.5"),
    ({"image_size": -3}, "config.data.image_size is -3; expected an integer from 1 to 10000"),
    ({"image_size": 10**7}, "config.data.image_size is 10000000"),
    ({"num_classes": 0}, "config.data.num_classes is 0; expected an integer from 2 to 1000000"),
    ({"num_classes": "ten"}, "config.data.num_classes is 'ten'"),
  ],
)
def test_which_images_are_attacked_is_checked_before_they_are_read(change, message):
  with pytest.raises(InputError, match=re.escape(message)):
    DataSettings(**change)
  DataSettings(source="npz:/no/such.npz", offset=3, image_size=8, num_classes=2)


def test_unknown_fields_of_a_config_object_are_refused():
  for group in ("data", "attack", "engine"):
    config = default_config()
    config[group] = config[group].to_dict() | {"mispelt": 1}
    with pytest.raises(InputError, match="'mispelt'"):
      validate(config)
  with pytest.raises(InputError, match="'atack'. Did you mean 'attack'"):
    validate(default_config().to_dict() | {"atack": {}})


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config.atack.name=ig"], "no field 'atack'. Did you mean \"attack\""),
    (["--config.attack.max_iterations=many"], "--config.attack.max_iterations=many"),
    (["--config.attack.name=dai"], "Unknown attack 'dai'"),
    (["--config.model.hidden_sizes=(3,0)"], "hidden_sizes of the model mlp is 0"),
    (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
    (["extra"], "unknown arguments ['extra']"),
    (["--config.data.source=npz:new\nline\x1b[31m"], r"new\nline\x1b[31m is no file"),
    (["--config=configs/mlp.py:mnits"], "'mnits'. Did you mean 'mnist'"),
    (["--config=configs/none.py"], "configs/none.py"),
  ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(arguments, message, tmp_path):
  workdir = tmp_path / "run"
  result = launch(f"--workdir={workdir}", *arguments)
  assert result.returncode == 2
  assert message in result.stderr and result.stderr.startswith("error: ")
  assert len(result.stderr.strip().splitlines()) == 1
  assert not workdir.exists()


def test_a_config_that_is_none_is_said_in_one_line(tmp_path):
  (tmp_path / "empty.py").write_text("def get_config():\n  pass\n")
  result = launch(f"--workdir={tmp_path / 'run'}", config=tmp_path / "empty.py")
  assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1


def test_what_is_said_ends_no_run(monkeypatch):
  """Where a stream is closed, or of an encoding that lacks a letter."""
  narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", narrow)
  monkeypatch.setattr(sys, "stderr", None)
  command_line._mend_streams()
  print("±1 – é", file=sys.stdout, flush=True)
  print("unheard", file=sys.stderr)
  assert narrow.buffer.getvalue() == b"\\xb11 \\u2013 \\xe9\n"


@pytest.mark.parametrize("reader, code", [("gone", 141), ("full", 2)])
def test_a_reader_that_is_gone_ends_a_run_without_a_traceback(reader, code, monkeypatch, capsys):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # as the tests have
  if reader == "gone":
    ours, theirs = os.pipe()
    os.close(ours)
    stream = open(theirs, "w")
  else:
    stream = open("/dev/full", "w")
  monkeypatch.setattr(sys, "stdout", stream)
  assert command_line._guarded(lambda: print("said")) == code
  stream.close()  # which would raise if there was anything left to be said
  lines = capsys.readouterr().err.splitlines()
  assert [line[:7] for line in lines] == ["error: "] * (reader == "full")


def test_a_user_without_a_home_has_no_cache(monkeypatch):
  def no_home(name):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setattr("platformdirs.user_cache_dir", no_home)
  assert command_line._guarded(lambda: 0) == 0
