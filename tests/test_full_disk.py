"""What happens when nothing more can be written."""

import errno
import os
import sys

import pytest
from experiment_cases import rows_of, silent, small, timeless

from jaxdia import command_line, experiment
from jaxdia.core.errors import InputError
from jaxdia.core.files import UnwritableFile, append_json_lines
from jaxdia.experiment.lock import Lock


@pytest.mark.parametrize("first", [1, 4, 8, 12])
def test_a_full_disk_ends_a_run_with_one_line_and_with_space_it_goes_on(
  first, tmp_path, monkeypatch, capsys
):
  config = small(max_iterations=5)
  config.engine.checkpoint_seconds = 0.0
  alone = experiment.run(config, tmp_path / "alone", say=silent)
  synced, fsync = [], os.fsync

  def full(number):
    synced.append(number)
    if len(synced) > first:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(number)

  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # as the tests have
  with monkeypatch.context() as patched:
    patched.setattr(os, "fsync", full)
    code = command_line._guarded(lambda: experiment.run(config, tmp_path / "run", say=silent))
  errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
  assert code == 2 and len(errors) == 1 and len(synced) > first
  assert str(tmp_path / "run") in errors[0] and "No space left on device" in errors[0]
  assert not list((tmp_path / "run").rglob(".*.tmp"))
  again = experiment.run(config, tmp_path / "run", say=silent)
  assert again["dia"]["metrics"]["ssim"] == alone["dia"]["metrics"]["ssim"]
  assert timeless(rows_of(tmp_path / "run")) == timeless(rows_of(tmp_path / "alone"))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
  with pytest.raises(UnwritableFile, match=f"{tmp_path}: Is a directory"):
    append_json_lines(tmp_path, [{"a": 1}])


def test_a_lock_that_cannot_say_who_holds_it_is_given_back(tmp_path, monkeypatch):
  def refuse(path, value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  lock = Lock(tmp_path)
  with monkeypatch.context() as patched, pytest.raises(InputError, match="No space left"):
    patched.setattr(sys.modules["jaxdia.experiment.lock"], "write_json", refuse)
    lock.acquire()
  other = Lock(tmp_path)
  other.acquire()
  other.release()
