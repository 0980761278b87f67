"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from jaxdia.engine import Progress

# Where there is no terminal, a line is written about so often.
_LINE_SECONDS = 10.0


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
    share, left = self._estimate(progress)
    text = (
      f"iteration {progress.iteration}, objective {progress.objective:.3g},"
      f" {progress.finished}/{progress.total} trials done, {_duration(progress.run_seconds)}"
      f" run + {_duration(progress.compile_seconds)} compile, {left}"
    )
    if progress.finished == progress.total:
      text = (
        f"{progress.total} trials done, {_duration(progress.run_seconds)} run +"
        f" {_duration(progress.compile_seconds)} compile"
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
    return done / (done + remaining), f"{bound} {_duration(seconds)} left"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.0f} s"
  minutes, seconds = divmod(int(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {seconds:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"
