"""One attack on all gradients of an experiment: its trials, and what they found."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxdia import engine
from jaxdia.attacks import Attack, AttackSettings, Candidate, Status, create_attack
from jaxdia.client import Observation
from jaxdia.closed_form import Parts, Recovery, recover, recover_labels
from jaxdia.core.errors import InputError
from jaxdia.core.files import write_json
from jaxdia.experiment import outcomes
from jaxdia.experiment.clients import Clients, Lazy
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.rows import score
from jaxdia.experiment.store import Store
from jaxdia.models import DropoutModel

# Of so many images it is kept how they formed.
SHOWN = 4
# What JAX measures of a compilation.
COMPILING = ("jaxpr_to_mlir_module", "backend_compile")


class AttackRun:
  """One attack on all gradients of an experiment.

  What was found of a gradient is on disk as soon as it is found; once its trials are finished,
  rows and images are kept, and the rest is dropped.

  Attributes:
    name: of the attack.
    attack: what is run.
    restarts: trials for each gradient.
    images: f32[gradients * B, H, W, C], pixels that were found, in the order of the originals; NaN
      where there are none. None before `load`.
    recordings: {gradient number: {iterations: f32[B, H, W, C]}}, how the first formed.
    times: seconds that were spent running and compiling, those of earlier sessions included.
  """

  def __init__(self, name: str, settings: ExperimentSettings, clients: Clients, store: Store):
    """Creates the attack; nothing is read.

    Args:
      name: of the attack.
      settings: of the experiment.
      clients: that are attacked.
      store: where the trials are kept.

    Raises:
      InputError: the attack cannot be run on this network.
    """
    self.name = name
    self.attack: Attack = create_attack(clients.model, settings.attacks[name])
    _check_labels(self.attack.settings, clients.model, settings.data.batch_size)
    self._searches = self.attack.settings.closed_form != "only"
    self.restarts = settings.restarts if self._searches else 1
    self.images: np.ndarray | None = None
    self.recordings: dict[int, dict[int, np.ndarray]] = {}
    self.times = {"run_seconds": 0.0, "compile_seconds": 0.0}
    self._settings = settings
    self._clients = clients
    self._store = store
    self._key = jax.random.key(settings.seed)
    # By gradient number: rows of those whose trials are finished, and trials of the others.
    self._rows: dict[int, list[dict[str, Any]]] = {}
    self._unfinished: dict[int, outcomes.Outcome] = {}

  def load(self) -> None:
    """Takes up what was finished before.

    Raises:
      InputError: what is there is damaged.
    """
    originals = self._clients.data.images
    shape = (len(self._clients.secrets) * self._settings.data.batch_size, *originals.shape[1:])
    self.images = np.full(shape, np.nan, originals.dtype)
    for number in range(len(self._clients.secrets)):
      outcome = outcomes.load(self._outcome_path(number))
      if outcome is not None:
        self._keep(number, outcome)
    self.times = self._times_before = _read_times(self._times_path)

  @property
  def trials(self) -> int:
    """Number of trials in all."""
    return len(self._clients.secrets) * self.restarts

  @property
  def finished(self) -> set[tuple[int, int]]:
    """(gradient number, restart) of the finished trials; all of them before `load`."""
    whole = range(len(self._clients.secrets)) if self.images is None else self._rows
    found = {(number, restart) for number in whole for restart in range(self.restarts)}
    for number, outcome in self._unfinished.items():
      found |= {(number, record.restart) for record in outcome.records}
    return found

  @property
  def is_finished(self) -> bool:
    """Whether all trials are finished."""
    return self.images is None or len(self._rows) == len(self._clients.secrets)

  @property
  def rows(self) -> list[dict[str, Any]]:
    """The rows of results.jsonl that there are, in the order of the images."""
    return [row for _, rows in sorted(self._rows.items()) for row in rows]

  @property
  def observations(self) -> Sequence[Observation]:
    """What the attack is shown: with labels only if it is given them."""
    c = self._clients
    return c.observations if self.attack.settings.labels == "given" else c.unlabelled

  def recover(self, note: Callable[[str], None]) -> None:
    """Computes closed forms, if the attack has some, of gradients that are not finished.

    If it searches nothing, they are its results; else they are kept until its trials are finished.

    Args:
      note: called with a line after each.
    """
    if self.attack.settings.closed_form == "none" or self.is_finished:
      return
    left = [i for i in range(len(self._clients.secrets)) if i not in self._rows]
    key = jax.random.fold_in(self._key, 3)  # no trial's
    for count, number in enumerate(left):
      if self._searches and self._recovery_path(number).exists():
        continue
      start = time.monotonic()
      with compilation() as durations:
        found = recover(
          jax.random.fold_in(key, number), self._clients.model, self.observations[number]
        )
      compiling = sum(durations)
      seconds = time.monotonic() - start - compiling
      self.note_times(seconds, compiling)
      self._times_before = self.times
      if self._searches:
        outcomes.save_recovery(self._recovery_path(number), found, seconds)
      else:
        self._take(_without_search(found, number), outcomes.origin(found, seconds))
      note(f"closed form of batch {count + 1}/{len(left)}: {found.summary()}")

  def task(self, number: int) -> engine.Task:
    """Returns the search for the engine.

    Args:
      number: by which the task is known.
    """
    told = self.attack.settings
    return engine.Task(
      jax.random.fold_in(self._key, 2),
      self.attack,
      self.observations,
      self._settings.restarts,
      # The one place where an attack is handed something of the secret: WIIG is defined by it.
      masks=self._clients.masks if told.masks == "known" else None,
      parts=None if told.closed_form == "none" else Lazy(len(self.observations), self._parts),
      finished=self.finished,
      number=number,
    )

  def take(self, trial: engine.Trial) -> None:
    """Keeps a finished trial, and scores its gradient if it was the last.

    Args:
      trial: of the engine.
    """
    found = None
    if self.attack.settings.closed_form != "none":
      recovery = outcomes.load_recovery(self._recovery_path(trial.job.victim))
      found = outcomes.origin(*recovery) if recovery else None
    self._take(trial, found)

  def note_times(self, run_seconds: float, compile_seconds: float) -> None:
    """Keeps what the search took in this call.

    Args:
      run_seconds: since it began.
      compile_seconds: likewise.
    """
    before, here = self._times_before, (run_seconds, compile_seconds)
    times = {k: v + t for (k, v), t in zip(before.items(), here, strict=True)}
    if times != self.times:
      self.times = times
      write_json(self._times_path, times, durable=False)

  def _take(self, trial: engine.Trial, origin: outcomes.Origin | None) -> None:
    number = trial.job.victim
    outcome = outcomes.merge(self._unfinished.get(number), trial, self._store.session)
    if origin is not None:
      outcome = outcome._replace(origin=origin)
    outcomes.save(self._outcome_path(number), outcome)
    if self._keep(number, outcome):
      self._store.append_results(self._rows[number])
      self._recovery_path(number).unlink(missing_ok=True)

  def _keep(self, number: int, outcome: outcomes.Outcome) -> bool:
    """Scores a gradient if all of its trials are finished; returns whether they are."""
    self._unfinished[number] = outcome
    if len(outcome.records) < self.restarts:
      return False
    clients, settings, recovered = self._clients, self._settings, None
    if self.attack.settings.labels == "recovered":
      origin = outcome.origin
      seen = self.observations
      recovered = recover_labels(clients.model, seen[number]) if origin is None else origin.labels
    secret, size = clients.secrets[number], settings.data.batch_size
    scored = score(
      settings,
      clients.model,
      self.name,
      number,
      secret,
      outcome,
      clients.data,
      clients.pool,
      recovered,
    )
    self._rows[number] = [row | {"session": outcome.best.session} for row in scored.rows]
    self.images[number * size : (number + 1) * size] = scored.images
    if number * size < SHOWN:
      self.recordings[number] = scored.recording
    del self._unfinished[number]
    return True

  def _parts(self, number: int) -> Parts:
    """Returns what was recovered of a gradient that is not finished."""
    found = outcomes.load_recovery(self._recovery_path(number))
    if found is None:
      raise InputError(
        f"the closed form {self._recovery_path(number)} is missing. Run the same command again."
      )
    return found[0].parts

  def _outcome_path(self, number: int) -> pathlib.Path:
    return self._store.path("trials", self.name, f"{number:05d}.npz")

  def _recovery_path(self, number: int) -> pathlib.Path:
    return self._store.path("checkpoint", f"{self.name}_closed_form_{number:05d}.npz")

  @property
  def _times_path(self) -> pathlib.Path:
    return self._store.path("trials", self.name, "times.json")


def _check_labels(settings: AttackSettings, model: DropoutModel, batch_size: int) -> None:
  """Lets an attack that cannot read its labels say so before anything is written."""
  if settings.labels == "recovered":
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.ShapeDtypeStruct((1,), np.float32)
    observation = Observation(shapes, shapes, None, zeros, zeros, batch_size)
    jax.eval_shape(lambda o: recover_labels(model, o), observation)


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


def _read_times(path: pathlib.Path) -> dict[str, float]:
  """Returns the seconds that earlier calls took."""
  if not path.exists():
    return {"run_seconds": 0.0, "compile_seconds": 0.0}
  try:
    times = json.loads(path.read_text())
    return {kind: float(times[kind]) for kind in ("run_seconds", "compile_seconds")}
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(f"{path} is damaged ({error}). Delete it; it only holds times.") from error


def _without_search(recovery: Recovery, number: int) -> engine.Trial:
  """Returns what was recovered as a trial of no iteration."""
  residual = recovery.residual[np.isfinite(recovery.residual)]
  return engine.Trial(
    job=engine.Job(number, 0),
    candidate=Candidate(recovery.parts.images, recovery.parts.masks, None),
    objective=float(residual.max(initial=0.0)),
    distance=0.0,
    iterations=0,
    best_iteration=0,
    status=Status.NO_SEARCH,
    seconds=0.0,
  )
