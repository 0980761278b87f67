"""Work directories: whose they are, one process at a time, and what an interruption leaves."""

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from experiment_cases import ROOT, launch, rows_of, silent, small, timeless

import jaxdia
from jaxdia import data, engine, evaluation, experiment, study
from jaxdia.core.errors import InputError
from jaxdia.experiment.attack_run import AttackRun
from jaxdia.experiment.lock import Lock


def test_killed_and_started_again_it_ends_with_the_same_numbers(tmp_path):
  arguments = [
    "--config.attack.max_iterations=1500",
    "--config.model.hidden_sizes=(128,128)",
    "--config.data.count=4",
    "--config.engine.checkpoint_seconds=0",
    "--config.engine.lanes=1",  # so that the last trials begin when the first have ended
  ]
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  assert launch(f"--workdir={alone}", *arguments).returncode == 0
  kills = 0
  checkpoint, first = killed / "checkpoint" / "dia.npz", killed / "trials" / "dia" / "00000.npz"
  for wanted in (checkpoint, first):  # in the first trials, and between the first and the last
    process = launch(f"--workdir={killed}", *arguments, popen=True)
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.02)
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
  assert kills == 2
  assert not (killed / "summary.json").exists()
  result = launch(f"--workdir={killed}", *arguments)
  assert result.returncode == 0, result.stderr
  assert timeless(rows_of(alone)) == timeless(rows_of(killed))
  sessions = [row["session"] for row in rows_of(killed)]
  assert sessions[-1] == 2 == len((killed / "sessions.jsonl").read_text().splitlines()) - 1
  assert min(sessions) < 2  # the first image was finished before the second kill
  for name in ("originals", "dia"):
    with np.load(alone / "reconstructions.npz") as a, np.load(killed / "reconstructions.npz") as b:
      np.testing.assert_array_equal(a[name], b[name])


def test_a_finished_run_is_shown_again_without_computing(tmp_path, monkeypatch):
  first = experiment.run(small(), tmp_path, say=silent)
  monkeypatch.setattr(sys.modules["jaxdia.engine.loop"], "create_program", None)
  lines = []
  second = experiment.run(small(), tmp_path, say=lines.append)
  assert second == first  # the times too
  assert any("3 of 3 trials were finished before" in line for line in lines)


def _interrupt_after(monkeypatch, count):
  """Lets the engine yield so many trials, and then behave as if Ctrl-C was pressed."""
  run = engine.run

  def interrupted(tasks, **options):
    yield from itertools.islice(run(tasks, **options), count)
    raise KeyboardInterrupt

  monkeypatch.setattr(engine, "run", interrupted)


def _begun(workdir, monkeypatch):
  """Interrupts an experiment of 24 trials, which would fill up to 3 lanes on each of 8 devices."""
  config = small(restarts=8, max_iterations=5)
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    _interrupt_after(patched, 9)
    experiment.run(config, workdir, say=silent)
  return config


@pytest.mark.parametrize(
  ("field", "value"), [("lanes", 3), ("matching", "formed"), ("convolve", "product")]
)
def test_an_interrupted_run_goes_on_with_the_engine_that_it_was_begun_with(
  field, value, tmp_path, monkeypatch
):
  config = _begun(tmp_path, monkeypatch)
  before = getattr(config.engine, field)
  config.engine[field] = value
  message = f"begun with config.engine.{field}={before}; with {value} it would end with other"
  with pytest.raises(InputError, match=message):
    experiment.run(config, tmp_path, say=silent)
  config.engine[field], config.engine.chunk = before, 2  # the chunk changes no result
  experiment.run(config, tmp_path, say=silent)
  config.engine[field] = value  # nothing is computed any more
  experiment.run(config, tmp_path, say=silent)


def test_lanes_that_were_chosen_are_kept(tmp_path, monkeypatch):
  """Two lanes were chosen at the start; what a machine would choose now does not matter."""
  config = small(restarts=8, max_iterations=5)
  config.engine.lanes = None
  used = []
  run = engine.run
  choose = sys.modules["jaxdia.engine.run"]
  monkeypatch.setattr(engine, "run", lambda *a, **k: used.append(k["lanes"]) or run(*a, **k))
  monkeypatch.setattr(choose, "choose_lanes", lambda *arguments: 2)
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    _interrupt_after(patched, 9)
    experiment.run(config, tmp_path, say=silent)
  monkeypatch.setattr(choose, "choose_lanes", lambda *arguments: 3)
  experiment.run(config, tmp_path, say=silent)
  assert used == [2, 2]
  engine_settings = json.loads((tmp_path / "config.json").read_text())["engine"]
  assert engine_settings["lanes"] == {"dia": 2} and engine_settings["devices"] == 8


def test_a_run_that_was_short_of_memory_goes_on_in_the_lanes_that_fit(tmp_path, monkeypatch):
  loop, asked = sys.modules["jaxdia.engine.loop"], []
  create = loop.create_program

  def create_in_little_memory(attack, observation, state, lanes, *arguments):
    asked.append(lanes)
    program = create(attack, observation, state, lanes, *arguments)

    def advance(state, steps):
      if lanes > 1 and steps:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
      return program.advance(state, steps)

    return program._replace(advance=advance)

  monkeypatch.setattr(loop, "create_program", create_in_little_memory)
  config = small(restarts=8, max_iterations=5)
  config.engine.lanes = 3
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    _interrupt_after(patched, 9)
    experiment.run(config, tmp_path, say=silent)
  assert asked == [3, 1]
  asked.clear()
  said = []
  experiment.run(config, tmp_path, say=said.append)
  assert asked == [1] and not [line for line in said if "memory" in line]
  engine_of = [
    json.loads(s)["engine"] for s in (tmp_path / "sessions.jsonl").read_text().splitlines()
  ]
  assert [one["lanes"] for one in engine_of] == [{"dia": 3}, {"dia": 1}]
  assert len(rows_of(tmp_path)) == 3


def test_a_run_goes_on_on_as_many_devices_as_it_was_begun_on(tmp_path, monkeypatch):
  config = _begun(tmp_path, monkeypatch)
  path = tmp_path / "config.json"
  there = json.loads(path.read_text())
  for devices, used in ((3, 3), (9, 8)):
    path.write_text(json.dumps(there | {"engine": there["engine"] | {"devices": devices}}))
    lines = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
      _interrupt_after(patched, 1)
      experiment.run(config, tmp_path, say=lines.append)
    session = json.loads((tmp_path / "sessions.jsonl").read_text().splitlines()[-1])
    assert session["engine"]["devices"] == used
    assert any("begun on 9 devices (cpu), going on on 8" in x for x in lines) == (used == 8)


def test_each_session_and_what_it_made_is_kept(tmp_path, monkeypatch):
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    _interrupt_after(patched, 2)
    experiment.run(small(max_iterations=5), tmp_path, say=silent)
  monkeypatch.setattr(jaxdia, "__version__", "9.9.9")
  experiment.run(small(max_iterations=5), tmp_path, say=silent)
  experiment.run(small(max_iterations=5), tmp_path, say=silent)  # makes nothing
  sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
  assert [s["session"] for s in sessions] == [0, 1]
  assert [s["jaxdia"] for s in sessions][1] == "9.9.9" != sessions[0]["jaxdia"]
  assert sessions[1]["engine"]["lanes"] == {"dia": 1} and sessions[1]["device"] == "cpu"
  assert sorted(row["session"] for row in rows_of(tmp_path)) == [0, 0, 1]
  assert json.loads((tmp_path / "manifest.json").read_text())["jaxdia"] == sessions[0]["jaxdia"]


def test_results_are_added_as_images_are_finished_and_not_written_anew(tmp_path, monkeypatch):
  written, seen = [], []
  module = sys.modules["jaxdia.experiment.store"]
  write, append = module.write_json_lines, module.Store.append_results

  def spy(self, rows):
    append(self, rows)
    seen.append(len(rows_of(tmp_path)))

  monkeypatch.setattr(module, "write_json_lines", lambda p, r: written.append(p) or write(p, r))
  monkeypatch.setattr(module.Store, "append_results", spy)
  experiment.run(small(max_iterations=3), tmp_path, say=silent)
  assert seen == [1, 2, 3] and len(written) == 2  # at the start and, in order, at the end


def test_what_was_scored_is_not_scored_again(tmp_path, monkeypatch):
  experiment.run(small(), tmp_path / "alone", say=silent)
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    _interrupt_after(patched, 2)
    experiment.run(small(), tmp_path / "again", say=silent)
  evaluate, scored = evaluation.evaluate, []

  def counted(model, secret, *arguments, **more):
    scored.append(int(secret.labels[0]))
    return evaluate(model, secret, *arguments, **more)

  monkeypatch.setattr(evaluation, "evaluate", counted)
  experiment.run(small(), tmp_path / "again", say=silent)
  alone, again = rows_of(tmp_path / "alone"), rows_of(tmp_path / "again")
  assert scored == [again[2]["label"]] and [row["session"] for row in again] == [0, 0, 1]
  assert timeless(alone) == timeless(again)
  for file in ("reconstructions.npz", "recordings.npz"):
    with np.load(tmp_path / "alone" / file) as a, np.load(tmp_path / "again" / file) as b:
      np.testing.assert_array_equal(a["dia"], b["dia"])


def test_rows_that_are_not_of_the_trials_on_disk_are_made_anew(tmp_path):
  experiment.run(small(), tmp_path, say=silent)
  rows = rows_of(tmp_path)
  other = [rows[0] | {"ssim": 0.5}, rows[1] | {"iterations": 7}, dict(rows[2])]
  del other[2]["psnr"]  # as of a version without this metric
  lines = [json.dumps(row) for row in other]
  (tmp_path / "results.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
  experiment.run(small(), tmp_path, say=silent)
  assert rows_of(tmp_path) == [other[0], *rows[1:]]  # the first, which may be its, was kept


def test_a_second_process_in_a_work_directory_ends_with_one_line(tmp_path):
  lock = Lock(tmp_path / "run")
  lock.acquire()
  result = launch(f"--workdir={tmp_path / 'run'}", "--config.data.count=1")
  assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
  assert f"is in use by process {os.getpid()} on {platform.node()} since 2" in result.stderr
  with pytest.raises(InputError, match="is in use by process"):
    study.run(study.study_config("T", "Q?", small()), tmp_path / "run", say=silent)
  assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "lock.json"}
  lock.release()
  experiment.run(small(max_iterations=2), tmp_path / "run", say=silent)
  experiment.run(small(max_iterations=2), tmp_path / "run", say=silent)  # it was given back
  assert not (tmp_path / "run" / "lock.json").exists()


def test_a_lock_of_a_killed_process_holds_nobody_up(tmp_path):
  program = (
    "import pathlib, sys, time; from jaxdia.experiment.lock import Lock;"
    "lock = Lock(pathlib.Path(sys.argv[1])); lock.acquire();"
    "print('held', flush=True); time.sleep(600)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE
  )
  assert process.stdout.readline() == b"held\n"
  with pytest.raises(InputError, match=f"in use by process {process.pid} on"):
    Lock(tmp_path).acquire()
  (tmp_path / ".results.jsonl.123.tmp").write_text("half")
  process.kill()
  process.communicate()
  assert (tmp_path / "lock.json").exists()
  lock = Lock(tmp_path)
  lock.acquire()
  assert not list(tmp_path.glob(".*"))
  lock.release()


def test_a_work_directory_of_another_experiment_is_refused(tmp_path):
  experiment.run(small(), tmp_path, say=silent)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(InputError, match="attacks.dia.max_iterations is 60, this one's is 70"):
    experiment.run(small(max_iterations=70), tmp_path, say=silent)
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_data_file_that_changed_is_another_experiment(tmp_path):
  victims = data.load("samples:mnist", 4)
  config = small()
  config.data.source, config.data.count = f"npz:{tmp_path}/victims.npz", 2
  labels = victims.labels
  np.savez(tmp_path / "victims.npz", images=victims.images[:2], labels=labels[:2])
  experiment.run(config, tmp_path / "run", say=silent)
  np.savez(tmp_path / "victims.npz", images=victims.images[2:], labels=np.array([7, 2]))
  with pytest.raises(InputError, match="holds another experiment: its data.sha256"):
    experiment.run(config, tmp_path / "run", say=silent)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", b"{", b"{}", b"[" * 10**5])
def test_a_work_directory_with_an_odd_config_is_refused(content, tmp_path):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(InputError, match="work directory"):
    experiment.run(small(), tmp_path, say=silent)


def test_a_work_directory_where_trials_is_a_file_is_refused(tmp_path):
  (tmp_path / "trials").write_text("")
  with pytest.raises(InputError, match="cannot write in the work directory"):
    experiment.run(small(), tmp_path, say=silent)


def test_a_damaged_checkpoint_names_its_file_and_keeps_finished_results(tmp_path):
  config = small()
  experiment.run(config, tmp_path, say=silent)
  rows = rows_of(tmp_path)
  (tmp_path / "trials" / "dia" / "00002.npz").unlink()  # as if killed before the last trial
  checkpoint = tmp_path / "checkpoint" / "dia.npz"
  checkpoint.parent.mkdir(exist_ok=True)
  checkpoint.write_bytes(b"PK\x03\x04 damaged")
  with pytest.raises(InputError, match=f"{checkpoint} is damaged"):
    experiment.run(config, tmp_path, say=silent)
  assert rows_of(tmp_path) == rows[:2]
  checkpoint.unlink()
  experiment.run(config, tmp_path, say=silent)
  assert timeless(rows_of(tmp_path)) == timeless(rows)


def test_a_damaged_finished_result_names_its_file(tmp_path):
  experiment.run(small(), tmp_path, say=silent)
  path = tmp_path / "trials" / "dia" / "00001.npz"
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(InputError, match=f"{path} is damaged.*all others are kept"):
    experiment.run(small(), tmp_path, say=silent)


@pytest.mark.parametrize("workdir", ["/dev/null/run", "/proc/run"])
def test_a_work_directory_that_cannot_be_written_is_refused(workdir):
  with pytest.raises(InputError, match=f"work directory {workdir}"):
    experiment.run(small(), workdir, say=silent)


def test_the_checkpoint_of_an_attack_that_had_ended_is_removed(tmp_path):
  """As if the run was killed after its last trial was kept, and before its checkpoint was not."""
  experiment.run(small(max_iterations=5), tmp_path, say=silent)
  checkpoint = tmp_path / "checkpoint" / "dia.npz"
  checkpoint.parent.mkdir(exist_ok=True)
  checkpoint.write_bytes(b"old")
  experiment.run(small(max_iterations=5), tmp_path, say=silent)
  assert not checkpoint.exists()


@pytest.mark.parametrize(
  "change",
  [lambda a: a.astype("datetime64[s]"), lambda a: a.astype(np.float64), lambda a: a[..., 0]],
)
def test_a_finished_result_with_another_array_is_damaged(change, tmp_path):
  experiment.run(small(max_iterations=5), tmp_path, say=silent)
  path = tmp_path / "trials" / "dia" / "00001.npz"
  with np.load(path) as file:
    arrays = dict(file)
  np.savez(path, **arrays | {"recording": change(arrays["recording"])})
  with pytest.raises(InputError, match=f"{path} is damaged"):
    experiment.run(small(max_iterations=5), tmp_path, say=silent)
  names = sorted(set(arrays) - {"names"})
  np.savez(path, **arrays | {"names": names})  # as it was written before types stood there
  assert len(experiment.run(small(max_iterations=5), tmp_path, say=silent)) == 1


def test_the_times_of_a_chunk_do_not_wait_for_the_disk(tmp_path, monkeypatch):
  """Sixty chunks, each of which notes its times, wait for it as often as one."""
  synced, noted, fsync = [], [], os.fsync
  note_times = AttackRun.note_times

  def spy(run, times):
    noted.append(times)
    note_times(run, times)

  monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
  monkeypatch.setattr(AttackRun, "note_times", spy)
  counts = []
  for chunk in (60, 1):
    config = small(max_iterations=60)
    config.engine.chunk, config.engine.checkpoint_seconds = chunk, 3600
    experiment.run(config, tmp_path / str(chunk), say=silent)
    counts.append((len(noted), len(synced)))
    noted.clear()
    synced.clear()
  (few, once), (many, again) = counts
  assert many >= few + 50 and once == again > 0
