"""Progress of what runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from jaxdia.engine import Progress

# Where there is no terminal, a line is written about so often.
_LINE_SECONDS = 30.0


class ProgressReport:
  """Shows how far an attack, or the steps of a study, are, and the time that is left."""

  def __init__(self, names: Sequence[str], costs: Sequence[float], stream: TextIO | None = None):
    """Starts the bar.

    Args:
      names: of the steps.
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
    self._compiling = 0.0  # seconds of the steps that have ended, and of the running one
    self._step_compiling = 0.0
    self._number = 0
    self._bar = None
    if self._stream.isatty():
      bar = "{percentage:3.0f}%|{bar:20}| {desc}"
      self._bar = tqdm(total=1.0, bar_format=bar, file=self._stream)
    self.start(0)

  def start(self, number: int) -> None:
    """Says which step is taken now."""
    self._number, self._step_began, self._fresh = number, time.monotonic(), True
    self._compiling, self._step_compiling = self._compiling + self._step_compiling, 0.0
    self._show(0.0, "")

  def update(self, progress: Progress) -> None:
    """Shows how far the engine is in the running step.

    Args:
      progress: the newest.
    """
    share, bound = _estimate(progress)
    self._step_compiling = progress.compile_seconds
    self._skip(share)
    took = f"{duration(progress.run_seconds)} run + {duration(progress.compile_seconds)} compile"
    if ended := progress.finished == progress.total:
      text = f"{progress.total} trials done, {took}"
    else:
      text = (
        f"{progress.finished}/{progress.total} trials done, iteration {progress.iteration},"
        f" objective {progress.objective:.3g}, {took}"
      )
    self._show(share, f": {text}", bound, ended and len(self._names) == 1)

  def update_share(self, share: float, text: str) -> None:
    """Shows how far the running step is, if others do it.

    Args:
      share: that is done.
      text: one line.
    """
    self._skip(share)
    self._show(share, f": {text}")

  def _skip(self, share: float) -> None:
    if self._fresh:  # what is done already at its start took no time now
      self._skipped += share * self._costs[self._number]
      self._fresh = False

  def note(self, text: str) -> None:
    """Shows what is done in the running step.

    Args:
      text: one line.
    """
    self._show(0.0, f": {text}")

  def finish(self, number: int, worked: bool) -> None:
    """Notes that a step has ended.

    Args:
      number: of the step.
      worked: whether there was anything to do.
    """
    self._done += self._costs[number]
    if not worked:
      self._skipped += self._costs[number]
    took = duration(time.monotonic() - self._step_began)
    self._show(0.0, f" ended after {took}", now=True)

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

  def _show(self, share: float, text: str, bound: str = "about", now: bool = False) -> None:
    """Shows the running step, of which a share is done; without a terminal if it is time, or now.

    Args:
      share: of the step, from 0 to 1.
      text: after its name.
      bound: what the time that is left is.
      now: whether the line is due in any case.
    """
    total = sum(self._costs)
    done = min(self._done + share * self._costs[self._number], total)
    several = f"{self._number + 1}/{len(self._names)} " if len(self._names) > 1 else ""
    text = f"{several}{self._names[self._number]}{text}{self._left(done, bound)}"
    if self._bar is not None:
      self._bar.n = done / total
      self._bar.set_description_str(text)
    elif now or time.monotonic() - self._last_line >= _LINE_SECONDS:
      self.say(text if now else f"{100 * done / total:.0f}% {text}")

  def _left(self, done: float, bound: str) -> str:
    """Returns the time that is left as the end of a sentence, as soon as it can be told."""
    total, worked = sum(self._costs), done - self._skipped
    if done >= total or worked < 0.01 * total:
      return ""
    seconds = time.monotonic() - self._began - self._compiling - self._step_compiling
    return f", {bound} {duration(max(seconds, 0.0) * (total - done) / worked)} left"


def share_done(progress: Progress) -> float:
  """Returns the share of its work that the engine has done, from 0 to 1.

  Args:
    progress: the newest.
  """
  return _estimate(progress)[0]


def _estimate(progress: Progress) -> tuple[float, str]:
  """Returns the share of the work that is done, and what it makes of the time that is left."""
  if progress.finished == progress.total:
    return 1.0, ""
  # Trials that ended tell how long the others may take; a trial that outlasts them, and all
  # trials until one has ended, may take the longest.
  bound, expected = "at most", float(progress.max_iterations)
  if progress.iteration < progress.mean_steps:
    bound, expected = "about", progress.mean_steps
  unfinished = progress.total - progress.finished
  remaining = max(unfinished * expected - progress.running_steps, 1)
  done = progress.finished * expected + progress.running_steps
  return done / (done + remaining), bound


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
