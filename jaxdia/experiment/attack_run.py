"""One attack on all gradients of an experiment: its trials, and what they found."""

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from msgspec.structs import astuple

from jaxdia import engine
from jaxdia.attacks import CATALOGUE, RECOVERY, Attack
from jaxdia.client import Observation
from jaxdia.closed_form import Recovery, recover_labels
from jaxdia.core.errors import InputError
from jaxdia.core.files import write_atomically, write_json
from jaxdia.core.types import Labels
from jaxdia.experiment import outcomes
from jaxdia.experiment.clients import Clients, Lazy
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.rows import in_order, rows_before, score
from jaxdia.experiment.schema import Row, decode
from jaxdia.experiment.store import Store

# Of so many images it is kept how they formed.
SHOWN = 4
# What JAX measures of a compilation.
COMPILING = ("jaxpr_to_mlir_module", "backend_compile")


class Times(msgspec.Struct, frozen=True):
  """Seconds that were spent running, compiling, and scoring; the last were not kept before."""

  run_seconds: float = 0.0
  compile_seconds: float = 0.0
  scoring_seconds: float = 0.0

  def __add__(self, more: "Times") -> "Times":
    return Times(*map(sum, zip(astuple(self), astuple(more), strict=True)))

  @property
  def seconds(self) -> float:
    """All of them."""
    return sum(astuple(self))


class FinishedGradient(NamedTuple):
  """What came of one gradient, as another process is given it.

  Attributes:
    file: with the finished trials.
    rows: of results.jsonl.
  """

  file: bytes
  rows: list[Row]


class AttackRun:
  """One attack on all gradients of an experiment, or on some.

  What was found of a gradient is on disk as soon as it is found; once its trials are finished,
  rows and images are kept, and the rest is dropped.

  Attributes:
    name: of the attack.
    attack: what is run.
    restarts: trials for each gradient.
    images: f32[gradients * B, H, W, C], pixels that were found, in the order of the originals; NaN
      where there are none. None before `load`.
    recordings: {gradient number: {iterations: f32[B, H, W, C]}}, how the first formed.
    times: that it took, in earlier sessions too.
  """

  def __init__(
    self,
    name: str,
    settings: ExperimentSettings,
    clients: Clients,
    store: Store,
    gradients: Sequence[int] | None = None,
  ):
    """Creates the attack; nothing is read.

    Args:
      name: of the attack.
      settings: of the experiment.
      clients: that are attacked.
      store: where the trials are kept.
      gradients: numbers of those that are attacked; all if None.

    Raises:
      InputError: the attack cannot be run on this network.
    """
    self.name = name
    model = dataclasses.replace(clients.model, convolve=settings.engine.convolve)
    self.attack: Attack = CATALOGUE[name].build(model, settings.attacks[name])
    _check_labels(self.attack, settings.data.batch_size)
    self.restarts = settings.restarts if self.attack.max_iterations else 1  # or all were the same
    self.images: np.ndarray | None = None
    self.recordings: dict[int, dict[int, np.ndarray]] = {}
    self.times = self._times_before = Times()
    self._settings = settings
    self._clients = clients
    self._store = store
    self._gradients = range(len(clients.secrets)) if gradients is None else tuple(gradients)
    self._key = jax.random.key(settings.seed)
    # By gradient number: rows of those whose trials are finished, and trials of the others.
    self._rows: dict[int, list[Row]] = {}
    self._unfinished: dict[int, outcomes.Outcome] = {}
    self._left: dict[int, None] = {}  # numbers of the latter, and of those that have no trials yet
    # Of an earlier session, by mask seed and image.
    self._before: dict[tuple[int | None, int], Row] = {}

  def load(self, kept: Iterable[Row]) -> None:
    """Takes up what was finished before.

    Args:
      kept: rows of results.jsonl; those of what was finished are not made again.

    Raises:
      InputError: what is there is damaged.
    """
    originals = self._clients.data.images
    shape = (len(self._clients.secrets) * self._settings.data.batch_size, *originals.shape[1:])
    self.images = np.full(shape, np.nan, originals.dtype)
    self._before = {(row.mask_seed, row.image): row for row in kept if row.attack == self.name}
    self._left = dict.fromkeys(self._gradients)
    self.times = self._times_before = _read_times(self._times_path)
    for number in self._gradients:
      outcome = outcomes.load(self.outcome_path(number))
      if outcome is not None and self._keep(number, outcome):
        self._recovery_path(number).unlink(missing_ok=True)

  @property
  def trials(self) -> int:
    """Number of trials in all."""
    return len(self._gradients) * self.restarts

  @property
  def finished(self) -> set[tuple[int, int]]:
    """(gradient number, restart) of trials that are not to be run; all of them before `load`."""
    whole = set(range(len(self._clients.secrets))) - self._left.keys()
    found = {(number, restart) for number in whole for restart in range(self.restarts)}
    for number, outcome in self._unfinished.items():
      found |= {(number, record.restart) for record in outcome.records}
    return found

  @property
  def unfinished(self) -> list[int]:
    """Numbers of the gradients of which trials are to be run; none before `load`."""
    return list(self._left)

  @property
  def is_finished(self) -> bool:
    """Whether all trials are finished."""
    return not self._left

  @property
  def rows(self) -> list[Row]:
    """The rows of results.jsonl that there are, in the order of the images."""
    return [row for _, rows in sorted(self._rows.items()) for row in rows]

  @property
  def observations(self) -> Sequence[Observation]:
    """What the attack is shown: with labels only if it is given them."""
    c = self._clients
    return c.observations if self.attack.labels == "given" else c.unlabelled

  def task(self, number: int, note: Callable[[str], None]) -> engine.Task:
    """Returns the attack for the engine.

    Args:
      number: by which the task is known.
      note: called with a line after each closed form.
    """
    return engine.Task(
      jax.random.fold_in(self._key, 2),
      self.attack,
      self.observations,
      self.restarts,
      # The one place where an attack is handed something of the secret: WIIG is defined by it.
      masks=self._clients.masks if self.attack.masks == "known" else None,
      parts=Lazy(len(self.observations), lambda i: self._recover(i, note)),
      finished=self.finished,
      number=number,
    )

  def plan(self) -> engine.Task:
    """Returns the attack for the engine to plan, without what it is told of single gradients."""
    pairs = itertools.product(range(len(self.observations)), range(self.restarts))
    task = self.task(0, lambda text: None)
    return task._replace(masks=None, parts=None, finished=list(pairs))

  def take(self, trial: engine.Trial) -> None:
    """Keeps a finished trial, and scores its gradient if it was the last.

    Args:
      trial: of the engine.
    """
    number = trial.job.observation
    outcome = outcomes.merge(self._unfinished.get(number), trial, self._store.session)
    if recovery := outcomes.load_recovery(self._recovery_path(number)):
      outcome = outcome._replace(recovery=recovery[0], recovery_seconds=recovery[1])
    outcomes.save(self.outcome_path(number), outcome)
    if self._keep_and_write(number, outcome):
      self._recovery_path(number).unlink(missing_ok=True)

  def give(self) -> dict[int, FinishedGradient]:
    """Returns what came of the gradients that are finished, for another process."""
    return {
      n: FinishedGradient(self.outcome_path(n).read_bytes(), rows) for n, rows in self._rows.items()
    }

  def accept(self, number: int, found: FinishedGradient) -> None:
    """Keeps a gradient that another process has finished.

    Args:
      number: of the gradient.
      found: what came of it.
    """
    path = self.outcome_path(number)
    write_atomically(path, lambda file: file.write(found.file))
    outcome = outcomes.load(path)
    assert outcome is not None
    self._before |= {(row.mask_seed, row.image): row for row in found.rows}
    self._keep_and_write(number, outcome)

  def add_times(self, more: Times) -> None:
    """Adds what was done beside the searches of this call: by another process, or on the host.

    Args:
      more: that it took.
    """
    self._times_before += more
    self._set_times(self.times + more)

  def note_times(self, search: Times) -> None:
    """Keeps what the search took in this call.

    Args:
      search: since it began.
    """
    self._set_times(self._times_before + search)

  def _set_times(self, times: Times) -> None:
    if times != self.times:
      self.times = times
      write_json(self._times_path, msgspec.to_builtins(times), durable=False)

  def _recover(self, number: int, note: Callable[[str], None]) -> Recovery | None:
    """Returns what an attack starts from; kept on disk until the gradient's trials are finished."""
    if number not in self._left:  # one of the same form: it is not looked at
      number = next(iter(self._left))
    found = outcomes.load_recovery(self._recovery_path(number))
    if found is not None:
      return found[0]
    # No trial has this key.
    key = jax.random.fold_in(jax.random.fold_in(self._key, RECOVERY), number)
    start = time.monotonic()
    with compilation() as durations:
      recovery = self.attack.recover(key, self.observations[number])
    if recovery is None:
      return None
    took = Times(time.monotonic() - start - sum(durations), sum(durations))
    outcomes.save_recovery(self._recovery_path(number), recovery, took.run_seconds)
    self.add_times(took)
    note(f"closed form of gradient {number} ({len(self._left)} to go): {recovery.summary()}")
    return recovery

  def _keep_and_write(self, number: int, outcome: outcomes.Outcome) -> bool:
    """Does what `_keep` does, and adds the rows to results.jsonl."""
    if kept := self._keep(number, outcome):
      self._store.append_results(row.to_json() for row in self._rows[number])
    return kept

  def _keep(self, number: int, outcome: outcomes.Outcome) -> bool:
    """Scores a gradient if all of its trials are finished; returns whether they are."""
    self._unfinished[number] = outcome
    if len(outcome.records) < self.restarts:
      return False
    if self.attack.has_verdicts and outcome.recovery is not None:
      outcome = outcome._replace(alone=outcome.recovery.parts)
    clients, settings, size = self._clients, self._settings, self._settings.data.batch_size
    rows = rows_before(self._before, settings, self.name, outcome, number)
    if rows is None:
      start = time.monotonic()
      with compilation() as durations:
        labels = self._recovered_labels(number, outcome)
        rows = score(settings, clients, self.name, outcome, number, labels)
      compiling = sum(durations)
      took = Times(0.0, compiling, max(0.0, time.monotonic() - start - compiling))
      with contextlib.suppress(OSError):  # for times alone none need fail
        self.add_times(took)
    self._rows[number] = rows
    del self._left[number]
    images, recording = in_order(clients, outcome, number)
    assert self.images is not None  # of what is loaded
    self.images[number * size : (number + 1) * size] = images
    if number * size < SHOWN:
      self.recordings[number] = recording
    del self._unfinished[number]
    return True

  def _recovered_labels(self, number: int, outcome: outcomes.Outcome) -> Labels | None:
    """Returns the labels that were read from a gradient, if the attack reads them."""
    if self.attack.labels != "recovered":
      return None
    if outcome.recovery:
      return outcome.recovery.parts.labels
    return recover_labels(self._clients.model, self.observations[number])

  def outcome_path(self, number: int) -> pathlib.Path:
    """Returns where the finished trials of a gradient are.

    Args:
      number: of the gradient.
    """
    return self._store.path("trials", self.name, f"{number:05d}.npz")

  def _recovery_path(self, number: int) -> pathlib.Path:
    return self._store.path("checkpoint", f"{self.name}_closed_form_{number:05d}.npz")

  @property
  def _times_path(self) -> pathlib.Path:
    return self._store.path("trials", self.name, "times.json")


def _check_labels(attack: Attack, batch_size: int) -> None:
  """Lets an attack that cannot read its labels say so before anything is written."""
  if attack.labels == "recovered":
    shapes = jax.eval_shape(attack.model.init, jax.random.key(0))
    numbers = jax.ShapeDtypeStruct((1,), np.float32)
    observation = Observation(shapes, shapes, None, numbers, numbers, batch_size)
    jax.eval_shape(lambda o: recover_labels(attack.model, o), observation)


@contextlib.contextmanager
def compilation() -> Iterator[list[float]]:
  """Collects the seconds that XLA compiles inside; tracing in Python is not among them."""
  durations: list[float] = []

  def listen(event: str, seconds: float, **kwargs: Any) -> None:
    del kwargs
    if event in ("/jax/core/compile/" + kind + "_duration" for kind in COMPILING):
      durations.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield durations
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _read_times(path: pathlib.Path) -> Times:
  """Returns what earlier calls took."""
  try:
    return decode(path.read_bytes(), Times)
  except FileNotFoundError:
    return Times()
  except (OSError, msgspec.DecodeError) as error:
    raise InputError(f"{path} is damaged ({error}). Delete it; it only holds times.") from error
