"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from jaxdia.engine import Progress

# Where there is no terminal, a line is written about so often.
_LINE_SECONDS = 10.0
_STUDY_LINE_SECONDS = 60.0


class ProgressReport:
  """Shows the progress of one attack."""

  def __init__(self, name: str, max_iterations: int, stream: TextIO | None = None):
    """Starts a report.

    Args:
      name: what is run.
      max_iterations: of one trial; bounds the time that is left.
      stream: standard error if None.
    """
    self._name = name
    self._max_iterations = max_iterations
    self._stream = stream or sys.stderr
    self._last_line = -_LINE_SECONDS
    self._bar = None
    if self._stream.isatty():
      bar = "{percentage:3.0f}%|{bar:20}| {desc}"
      self._bar = tqdm(total=1.0, desc=name, bar_format=bar, file=self._stream)

  def update(self, progress: Progress) -> None:
    """Shows the newest progress."""
    share, left = _estimate(progress, self._max_iterations)
    text = (
      f"iteration {progress.iteration}, objective {progress.objective:.3g},"
      f" {progress.finished}/{progress.total} trials done, {duration(progress.run_seconds)}"
      f" run + {duration(progress.compile_seconds)} compile, {left}"
    )
    if progress.finished == progress.total:
      text = (
        f"{progress.total} trials done, {duration(progress.run_seconds)} run +"
        f" {duration(progress.compile_seconds)} compile"
      )
    if self._bar is not None:
      self._bar.n = share
      self._bar.set_description_str(f"{self._name}: {text}")
    elif time.monotonic() - self._last_line >= _LINE_SECONDS or progress.finished == progress.total:
      self._last_line = time.monotonic()
      print(f"{self._name}: {text}", file=self._stream, flush=True)

  def note(self, text: str) -> None:
    """Shows what is done before the first trial.

    Args:
      text: one line.
    """
    if self._bar is not None:
      self._bar.set_description_str(f"{self._name}: {text}")
    elif time.monotonic() - self._last_line >= _LINE_SECONDS:
      self._last_line = time.monotonic()
      print(f"{self._name}: {text}", file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


class StudyProgress:
  """Shows the progress of a study: one bar, and the time that is left."""

  def __init__(self, names: Sequence[str], costs: Sequence[float], stream: TextIO | None = None):
    """Starts the bar.

    Args:
      names: of its steps.
      costs: what each takes, in any unit.
      stream: standard error if None.
    """
    self._names = names
    # A second each for what the costs leave out.
    self._costs = [cost + 1.0 for cost in costs]
    self._stream = stream or sys.stderr
    self._began = self._last_line = time.monotonic()
    self._done = 0.0  # cost of the steps that have ended
    self._skipped = 0.0  # of that, and of the running step, without taking time now
    self._number = 0
    self._fresh = True  # nothing was heard of the running step
    self._bar = None
    if self._stream.isatty():
      bar = "{percentage:3.0f}%|{bar:20}| {desc}"
      self._bar = tqdm(total=1.0, bar_format=bar, file=self._stream)

  def start(self, number: int) -> None:
    """Says which step is taken now."""
    self._number, self._step_began, self._fresh = number, time.monotonic(), True
    self._show(0.0, "")

  def update(self, progress: Progress, max_iterations: int) -> None:
    """Shows how far the engine is in the running step.

    Args:
      progress: the newest.
      max_iterations: of one trial.
    """
    share, _ = _estimate(progress, max_iterations)
    if self._fresh:  # what is done already at its start took no time now
      self._skipped += share * self._costs[self._number]
      self._fresh = False
    self._show(share, f", {progress.finished}/{progress.total} trials done")

  def note(self, text: str) -> None:
    """Shows what is done in the running step.

    Args:
      text: one line.
    """
    self._show(0.0, f", {text}")

  def _show(self, share: float, text: str) -> None:
    done = self._done + share * self._costs[self._number]
    text = f"{self._name(self._number)}{text}{self._left(done)}"
    if self._bar is not None:
      self._bar.n = done / sum(self._costs)
      self._bar.set_description_str(text)
    elif time.monotonic() - self._last_line >= _STUDY_LINE_SECONDS:
      self.say(f"{100 * done / sum(self._costs):.0f}% {text}")

  def finish(self, number: int, worked: bool) -> None:
    """Notes that a step has ended.

    Args:
      number: of the step.
      worked: whether there was anything to do.
    """
    seconds = time.monotonic() - self._step_began
    self._done += self._costs[number]
    if not worked:
      self._skipped += self._costs[number]
    if self._bar is None:
      self.say(f"{self._name(number)} ended after {duration(seconds)}{self._left(self._done)}")
    else:
      self._bar.n = self._done / sum(self._costs)
      self._bar.refresh()

  def _name(self, number) -> str:
    return f"{number + 1}/{len(self._names)} {self._names[number]}"

  def _left(self, done) -> str:
    """Returns the time that is left as the end of a sentence, as soon as it can be told."""
    total, worked = sum(self._costs), done - self._skipped
    if done >= total or worked < 0.01 * total:
      return ""
    left = (time.monotonic() - self._began) * (total - done) / worked
    return f", about {duration(left)} left"

  def say(self, text: str) -> None:
    """Shows a line that stays."""
    self._last_line = time.monotonic()
    if self._bar is None:
      print(text, file=self._stream, flush=True)
    else:
      self._bar.write(text, file=self._stream)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


def _estimate(progress: Progress, max_iterations: int) -> tuple[float, str]:
  """Returns the share of the work that is done and the time that is left, as text."""
  if progress.finished == progress.total:
    return 1.0, ""
  # Trials that ended tell how long the others may take; a trial that outlasts them, and all
  # trials until one has ended, may take the longest.
  bound, expected = "at most", max_iterations
  if progress.iteration < progress.mean_steps:
    bound, expected = "about", progress.mean_steps
  unfinished = progress.total - progress.finished
  remaining = max(unfinished * expected - progress.running_steps, 1)
  done = progress.finished * expected + progress.running_steps
  seconds = progress.run_seconds * remaining / max(progress.steps, 1)
  return done / (done + remaining), f"{bound} {duration(seconds)} left"


def duration(seconds: float) -> str:
  """Returns a time as a person reads it."""
  if 0 < seconds < 0.95:
    return f"{seconds:.1g} s"
  if seconds < 60:
    return f"{seconds:.0f} s"
  minutes, seconds = divmod(int(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {seconds:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"
