"""Work on other processes: the numbers of one, whoever dies in the middle."""

import io
import os
import signal
import threading
import time

import numpy as np
import pytest
from experiment_cases import launch, rows_of, silent, small, timeless

from jaxdia import experiment, study
from jaxdia.core.errors import InputError
from jaxdia.experiment.clients import Clients
from jaxdia.experiment.config import validate
from jaxdia.experiment.parts import Part, run_part
from jaxdia.experiment.spread import Tally, Work

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def workers():
  """Two processes with a device each, as the launcher starts them."""
  with distributed.LocalCluster(
    n_workers=2, threads_per_worker=2, processes=True, memory_limit=None, dashboard_address=":0"
  ) as cluster:
    yield cluster


def _equal(rows, others):
  """Compares rows of float64: equal but for what lanes and devices round."""
  assert len(rows) == len(others)
  for one, other in zip(timeless(rows), timeless(others), strict=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
      if isinstance(value, float):
        np.testing.assert_allclose(value, other[name], rtol=1e-6, atol=1e-9, err_msg=name)
      elif not isinstance(value, dict):
        assert value == other[name], name


def _study():
  base = small(name="dia", max_iterations=150)
  base.model.hidden_sizes = (32, 32)
  base.precision = "float64"
  base.data.count = 6
  grid = [("model.dropout_rate", (0.25, 0.5))]
  return study.study_config("Tiny", "Does it run?", base, grid=grid)


def test_a_study_whose_worker_is_killed_ends_with_the_numbers_of_one_process(workers, tmp_path):
  said, there, here = [], tmp_path / "there", tmp_path / "here"

  def kill():
    deadline = time.monotonic() + 120
    while not list(there.glob("cells/*/trials/*/*.npz")) and time.monotonic() < deadline:
      time.sleep(0.01)
    while not any("is gone" in text for text in said) and time.monotonic() < deadline:
      os.kill(workers.workers[0].pid, signal.SIGKILL)  # it may have been between two parts
      time.sleep(3)

  killer = threading.Thread(target=kill)
  killer.start()
  assert study.run(_study(), there, cluster=workers, say=said.append) == {}
  killer.join()
  assert any("is gone; its part is given to another" in text for text in said)
  assert study.run(_study(), here, say=silent) == {}
  _equal(rows_of(there), rows_of(here))
  assert len(rows_of(there)) == 2 * 6
  for cell in there.glob("cells/*"):
    assert len(list(cell.glob("trials/*/*.npz"))) == 6
    assert not list(cell.glob("checkpoint/*"))


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_with_what_was_finished(tmp_path):
  arguments = [
    "--config.attack.name=ig",
    "--config.attack.max_iterations=150",
    "--config.engine.lanes=1",
    "--config.data.count=12",
    "--config.model.hidden_sizes=(32,32)",
    "--config.precision=float64",
  ]
  killed, alone = tmp_path / "killed", tmp_path / "alone"
  process = launch(*arguments, f"--workdir={killed}", "--cluster=local:1", popen=True)
  deadline = time.monotonic() + 120
  while not (found := list(killed.glob("trials/*/*.npz"))) and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert 0 < len(found) < 12
  written = {path: path.stat().st_mtime_ns for path in killed.glob("trials/*/*.npz")}
  again = launch(*arguments, f"--workdir={killed}", "--cluster=local:1")
  assert again.returncode == 0, again.stderr
  assert f"{len(written)} of 12 trials were finished before" in again.stdout
  assert all(path.stat().st_mtime_ns == then for path, then in written.items())
  assert launch(*arguments, f"--workdir={alone}").returncode == 0
  _equal(rows_of(killed), rows_of(alone))


def test_a_worker_with_another_version_is_named_and_left_out(tmp_path):
  preload = tmp_path / "older.py"
  preload.write_text("import jaxdia\njaxdia.__version__ = '0.0.1'\n")
  said = []
  with (
    distributed.LocalCluster(
      n_workers=1, processes=True, memory_limit=None, dashboard_address=":0", preload=str(preload)
    ) as cluster,
    pytest.raises(InputError, match="no worker of the cluster can be used"),
  ):
    experiment.run(small(), tmp_path / "work", cluster=cluster, say=said.append)
  (line,) = said
  assert line.startswith("worker tcp://") and "has jaxdia 0.0.1" in line and "left out" in line
  assert not (tmp_path / "work").exists()


def test_a_worker_reads_again_what_changed_and_refuses_what_differs(tmp_path):
  config = small(name="closed_form")
  config.data.source = f"npz:{tmp_path / 'images.npz'}"
  images = np.random.default_rng(0).uniform(size=(3, 28, 28, 1)).astype(np.float32)
  for seen in (images, images[::-1]):
    np.savez(tmp_path / "images.npz", images=seen, labels=np.arange(3))
    settings = validate(config)
    digests = Clients(settings.clients).digests
    part = Part("closed_form", {5: settings}, {5: digests}, {5: (1,)}, {5: {}}, {5: 3}, 0)
    shares = []
    done = run_part(part, shares.append)
    assert not done.errors and shares == [1.0]
    (row,) = done.found[5][1].rows
    assert row.image == 1 and row.session == 3 and row.scores["mse_normalized"] < 1e-6
  wrong = digests | {"data": {"sha256": "0" * 64}}
  done = run_part(part._replace(digests={5: wrong}), shares.append)
  assert "read another data" in str(done.errors[5]) and not done.found


@pytest.mark.parametrize(
  "where, message",
  [
    ("local:0", "expected local:N"),
    ("local:two", "expected local:N"),
    ("host", "expected local:N"),
    ("tcp://127.0.0.1:1", "no Dask scheduler answers"),
  ],
)
def test_what_is_no_cluster_is_refused(where, message, tmp_path, monkeypatch):
  monkeypatch.setattr("jaxdia.experiment.cluster._ANSWER", "1s")
  with pytest.raises(InputError, match=message):
    experiment.run(small(), tmp_path / "work", cluster=where, say=silent)
  assert not (tmp_path / "work").exists()


def test_progress_weighs_parts_by_what_they_cost():
  stream = io.StringIO()
  work = {(0, "dia"): Work(4, 1, 10.0), (1, "closed_form"): Work(4, 0, 1.0)}
  tally = Tally(work, lambda: 2, stream)
  part = Part("dia", {}, {}, {0: (1, 2)}, {}, {}, 4)
  tally.show([(part, 0.5)])
  assert tally.share == pytest.approx((10 + 10) / 44)
  tally.add(part)
  tally.skip(1, "closed_form", 4)
  assert tally.share == pytest.approx((30 + 4) / 44)
  tally.close()
