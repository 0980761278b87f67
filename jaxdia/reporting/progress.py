"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from tqdm import tqdm

from jaxdia.engine import Progress

# Where there is no terminal, a line is written about so often.
_LINE_SECONDS = 10.0


class ProgressReport:
  """Shows the progress of one attack."""

  def __init__(
    self,
    name: str,
    max_iterations: int,
    stream: TextIO | None = None,
    on_share: Callable[[float], None] | None = None,
  ):
    """Starts a report.

    Args:
      name: what is run.
      max_iterations: of one trial; bounds the time that is left.
      stream: standard error if None.
      on_share: called with the share of the work that is done, in place of showing anything.
    """
    self._name = name
    self._on_share = on_share
    self._max_iterations = max_iterations
    self._stream = stream or sys.stderr
    self._last_line = -_LINE_SECONDS
    self._bar = None
    if self._stream.isatty() and on_share is None:
      bar = "{percentage:3.0f}%|{bar:20}| {desc}"
      self._bar = tqdm(total=1.0, desc=name, bar_format=bar, file=self._stream)

  def update(self, progress: Progress) -> None:
    """Shows the newest progress."""
    share, left = self._estimate(progress)
    if self._on_share is not None:
      self._on_share(share)
      return
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
    if self._on_share is not None:
      return
    if self._bar is not None:
      self._bar.set_description_str(f"{self._name}: {text}")
    elif time.monotonic() - self._last_line >= _LINE_SECONDS:
      self._last_line = time.monotonic()
      print(f"{self._name}: {text}", file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()

  def _estimate(self, progress: Progress) -> tuple[float, str]:
    """Returns the share of the work that is done and the time that is left, as text."""
    if progress.finished == progress.total:
      return 1.0, ""
    # Trials that ended tell how long the others may take; a trial that outlasts them, and all
    # trials until one has ended, may take the longest.
    bound, expected = "at most", self._max_iterations
    if progress.iteration < progress.mean_steps:
      bound, expected = "about", progress.mean_steps
    unfinished = progress.total - progress.finished
    remaining = max(unfinished * expected - progress.running_steps, 1)
    done = progress.finished * expected + progress.running_steps
    seconds = progress.run_seconds * remaining / max(progress.steps, 1)
    return done / (done + remaining), f"{bound} {duration(seconds)} left"


class StudyProgress:
  """Shows the progress of a study: one bar, and the time that is left."""

  def __init__(self, names: Sequence[str], costs: Sequence[float], stream: TextIO | None = None):
    """Starts the bar.

    Args:
      names: of the cells.
      costs: what each takes, in any unit.
      stream: standard error if None.
    """
    self._names = names
    # A second each for what the costs leave out.
    self._costs = [cost + 1.0 for cost in costs]
    self._stream = stream or sys.stderr
    self._began = time.monotonic()
    self._done = 0.0  # cost of the cells that have ended
    self._skipped = 0.0  # of those, without taking time now
    self._number = 0
    self._bar = None
    if self._stream.isatty():
      bar = "{percentage:3.0f}%|{bar:20}| {desc}"
      self._bar = tqdm(total=1.0, bar_format=bar, file=self._stream)

  def start(self, number: int) -> None:
    """Says which cell is run now."""
    self._number, self._cell_began = number, time.monotonic()
    self.update(0.0)

  def update(self, share: float) -> None:
    """Shows the share of the running cell that is done."""
    if self._bar is not None:
      done = self._done + share * self._costs[self._number]
      self._bar.n = done / sum(self._costs)
      self._bar.set_description_str(f"{self._name(self._number)}{self._left(done)}")

  def finish(self, number: int) -> None:
    """Notes that a cell has ended."""
    seconds = time.monotonic() - self._cell_began
    self._done += self._costs[number]
    if seconds < 0.05:  # it was finished before
      self._skipped += self._costs[number]
    if self._bar is None:
      self.say(f"{self._name(number)} ended after {duration(seconds)}{self._left(self._done)}")
    else:
      self._bar.n = self._done / sum(self._costs)
      self._bar.refresh()

  def _name(self, number) -> str:
    return f"cell {number + 1}/{len(self._names)} {self._names[number]}"

  def _left(self, done) -> str:
    """Returns the time that is left as the end of a sentence, as soon as it can be told."""
    total, worked = sum(self._costs), done - self._skipped
    if done >= total or worked < 0.01 * total:
      return ""
    left = (time.monotonic() - self._began) * (total - done) / worked
    return f", about {duration(left)} left"

  def say(self, text: str) -> None:
    """Shows a line that stays."""
    if self._bar is None:
      print(text, file=self._stream, flush=True)
    else:
      self._bar.write(text, file=self._stream)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


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
