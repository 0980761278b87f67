"""The time that is left, as a person reads it."""

import io
import time

import pytest

from jaxdia.engine import Progress
from jaxdia.experiment.progress import ProgressReport


def _progress(finished, total=100, running_steps=0, mean_steps=10.0, compile_seconds=0.0, most=10):
  return Progress(
    iteration=0, objective=1.0, finished=finished, total=total, steps=0, mean_steps=mean_steps,
    max_iterations=most,
    running_steps=running_steps, compile_seconds=compile_seconds, run_seconds=1.0, task_seconds={},
  )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


def test_what_was_done_before_does_not_count_as_quick(clock):
  """Of 100 trials 80 were done before; two more take two minutes: 18 need about 18."""
  stream = io.StringIO()
  progress = ProgressReport(["dia in 4 cells"], [999.0], stream)
  progress.start(0)
  progress.update(_progress(80))
  clock[0] = 120.0
  progress.update(_progress(82))
  (line,) = stream.getvalue().splitlines()
  assert line.startswith("82% dia in 4 cells: 82/100 trials done, ")
  minutes = int(line.rsplit("about ", 1)[1].split(" min")[0])
  assert 15 <= minutes <= 21, line


def test_steps_without_work_do_not_count_either(clock):
  stream = io.StringIO()
  progress = ProgressReport(["a", "b", "c"], [99.0, 99.0, 99.0], stream)
  progress.start(0)
  clock[0] = 1.0
  progress.finish(0, worked=False)
  progress.start(1)
  clock[0] = 61.0
  progress.finish(1, worked=True)
  assert "2/3 b ended after 1 min 00 s, about 1 min 0" in stream.getvalue()


def test_compiling_is_not_taken_for_work(clock):
  """A quarter is done after 30 s, 20 of which went to compiling: 30 s of work are left."""
  stream = io.StringIO()
  progress = ProgressReport(["dia"], [999.0], stream)
  progress.update(_progress(0, 4, 0, float("nan"), 20.0, most=1000))
  clock[0] = 30.0
  progress.update(_progress(0, 4, 1000, float("nan"), 20.0, most=1000))
  # No trial has ended, so that all may take the longest.
  assert stream.getvalue().endswith(", at most 30 s left\n"), stream.getvalue()


def test_the_last_trial_is_told_at_once(clock):
  stream = io.StringIO()
  progress = ProgressReport(["dia"], [999.0], stream)
  clock[0] = 1.0
  progress.update(_progress(4, 4, most=1000))
  assert stream.getvalue() == "dia: 4 trials done, 1 s run + 0 s compile\n"
