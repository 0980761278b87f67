"""A configured experiment in its work directory."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxdia import data, engine, evaluation, outcomes
from jaxdia.attacks import AttackSettings, Candidate, Status, create_attack
from jaxdia.attacks.told import told
from jaxdia.client import Observation, Secret
from jaxdia.closed_form import Recovery, recover, recover_labels
from jaxdia.config import ExperimentSettings
from jaxdia.core.errors import InputError
from jaxdia.core.files import write_json, write_json_lines, write_npz
from jaxdia.experiment.grid import write_grid
from jaxdia.experiment.rows import Facts, score
from jaxdia.experiment.schema import Row, Summary
from jaxdia.experiment.summary import summarize
from jaxdia.experiment.table import table
from jaxdia.manifest import manifest
from jaxdia.models import DropoutModel
from jaxdia.victims import create_model, load_pool, load_victims, observe_clients
from jaxdia.workdir import check_workdir, digest

# Of so many images it is kept how they formed.
_SHOWN = 4
# What JAX measures of a compilation.
_COMPILING = ("jaxpr_to_mlir_module", "backend_compile")


class Experiment:
  """The victims of an experiment, what the attacks found of them, and what is written of it.

  Attributes:
    settings: of the experiment.
    model: the client's network.
    observations: what the server sees, one for each gradient.
  """

  def __init__(
    self,
    settings: ExperimentSettings,
    workdir: pathlib.Path,
    like: "Experiment | None" = None,
  ):
    """Loads the images and lets the clients compute their gradients; nothing is written.

    Args:
      settings: of the experiment.
      workdir: which need not exist.
      like: another experiment; if its clients are the same, they are taken from it.

    Raises:
      InputError: about the victims, the network, or a work directory of another experiment.
    """
    self.settings = settings
    self._workdir = workdir
    same = like is not None and clients_key(like.settings) == clients_key(settings)
    self._victims: data.Victims = like._victims if same else load_victims(settings.data)
    self.model: DropoutModel = like.model if same else create_model(settings.model, self._victims)
    for attack_settings in settings.attacks.values():
      _check_labels(attack_settings, self.model, settings.data.batch_size)
    self._config = settings.to_json()
    self._config["data"]["sha256"] = digest(self._victims)
    check_workdir(workdir, self._config)
    if same:
      self._pool, self.observations, self._secrets = like._pool, like.observations, like._secrets
    else:
      self._pool: np.ndarray = load_pool(settings.data, self._victims)
      pairs = observe_clients(settings, self.model, self._victims)
      self.observations: list[Observation] = pairs[0]
      self._secrets: list[Secret] = pairs[1]
    self._attacks = {
      name: create_attack(self.model, attack) for name, attack in settings.attacks.items()
    }
    self._done: dict[str, dict[int, outcomes.Outcome]] = {}  # by attack and batch
    self._rows: dict[str, dict[int, list[Row]]] = {}  # by attack and batch
    self._images: dict[str, np.ndarray] = {}
    self._recordings: dict[str, dict[int, dict[int, np.ndarray]]] = {}  # by attack and batch
    # Closed forms by attack and batch, with seconds; none of a batch that was finished before.
    self._recoveries: dict[str, dict[int, tuple[Recovery, float]]] = {}
    self._times: dict[str, dict[str, float]] = {}
    self._times_before: dict[str, dict[str, float]] = {}  # what earlier calls took
    self._begun = False
    self._originals = np.concatenate([self._victims.images] * settings.data.mask_seeds)
    self._trial_key = jax.random.fold_in(jax.random.key(settings.seed), 2)

  def _outcome_path(self, name: str, batch: int) -> pathlib.Path:
    return self._workdir / "trials" / name / f"{batch:05d}.npz"

  def _recovery_path(self, name: str, batch: int) -> pathlib.Path:
    return self._workdir / "checkpoint" / f"{name}_closed_form_{batch:05d}.npz"

  def _times_path(self, name: str) -> pathlib.Path:
    return self._workdir / "trials" / name / "times.json"

  def begin(self) -> None:
    """Makes the work directory, and takes up what was finished before.

    Raises:
      InputError: the directory cannot be written, or what is there is damaged.
    """
    settings, workdir = self.settings, self._workdir
    try:
      (workdir / "trials").mkdir(parents=True, exist_ok=True)
      write_json(workdir / "config.json", self._config)
      if not (workdir / "manifest.json").exists():
        more = {"seed": settings.seed, "precision": settings.precision}
        more["data_sha256"] = self._config["data"]["sha256"]
        write_json(workdir / "manifest.json", manifest(**more))
    except OSError as error:
      raise InputError(
        f"cannot write in the work directory {workdir} ({error}). Choose another --workdir."
      ) from error
    for name in settings.attacks:
      self._rows[name] = {}
      self._recordings[name] = {}
      self._images[name] = np.full_like(self._originals, np.nan)
      found = {i: outcomes.load(self._outcome_path(name, i)) for i in range(len(self._secrets))}
      self._done[name] = {i: outcome for i, outcome in found.items() if outcome is not None}
      for batch in self._done[name]:
        self._evaluate(name, batch)
      self._times[name] = _read_times(self._times_path(name))
      self._times_before[name] = dict(self._times[name])
    self._begun = True
    self._write_results()

  def finished(self, name: str) -> set[tuple[int, int]]:
    """Returns (gradient, restart) of the finished trials of an attack; all if it is not begun."""
    if not self._begun:
      restarts = range(self._restarts(name))
      return set(itertools.product(range(len(self.observations)), restarts))
    return {
      (batch, record.restart)
      for batch, outcome in self._done[name].items()
      for record in outcome.records
    }

  def is_finished(self, name: str) -> bool:
    """Returns whether all trials of an attack are finished."""
    return len(self.finished(name)) >= len(self.observations) * self._restarts(name)

  @property
  def complete(self) -> bool:
    """Whether all attacks are finished."""
    return all(map(self.is_finished, self.settings.attacks))

  @property
  def seconds(self) -> float:
    """Seconds that all attacks took, those of earlier calls included."""
    return sum(sum(times.values()) for times in self._times.values())

  def recover(self, name: str, note: Callable[[str], None]) -> None:
    """Computes the closed forms of an attack that has some, where they are not finished.

    If it searches nothing, they are its results; else they are kept until its trials are finished.

    Args:
      name: of the attack.
      note: called with a line after each.
    """
    closed_form = self.settings.attacks[name].closed_form
    if closed_form == "none" or self.is_finished(name):
      return
    left = [i for i in range(len(self.observations)) if not self._has_all(name, i)]
    recoveries = self._recoveries.setdefault(name, {})
    for count, i in enumerate(left):
      if found := recoveries.get(i) or outcomes.load_recovery(self._recovery_path(name, i)):
        recoveries[i] = found
        continue
      start = time.monotonic()
      observation = self._shown_to(name, self.observations[i])
      with _compilation() as durations:
        recovery = recover(jax.random.fold_in(self._trial_key, i), self.model, observation)
      compiling = sum(durations)
      seconds = time.monotonic() - start - compiling
      recoveries[i] = recovery, seconds
      self._times_before[name]["run_seconds"] += seconds
      self._times_before[name]["compile_seconds"] += compiling
      self.note_times(name, 0.0, 0.0)
      if closed_form == "only":
        self.take(name, _without_search(recovery, i))
        del recoveries[i]
      else:
        outcomes.save_recovery(self._recovery_path(name, i), recovery, seconds)
      note(f"closed form of batch {count + 1}/{len(left)}: {recovery.summary()}")

  def task(self, name: str, number: int) -> engine.Task:
    """Returns the search of an attack for the engine.

    Args:
      name: of the attack.
      number: by which the task is known.
    """
    settings, attack = self.settings, self._attacks[name]
    parts = None
    if attack.settings.closed_form != "none":
      found = self._recoveries.get(name, {})
      spare = next(iter(found.values()), None)  # of a finished batch it is not looked at
      pairs = [found.get(batch, spare) for batch in range(len(self.observations))]
      parts = [recovery.parts for recovery, _ in pairs] if found else None
    return engine.Task(
      self._trial_key,
      attack,
      [self._shown_to(name, observation) for observation in self.observations],
      settings.restarts,
      # The one place where an attack is handed something of the secret: WIIG is defined by it.
      masks=[s.masks for s in self._secrets] if attack.settings.masks == "known" else None,
      parts=parts,
      finished=self.finished(name),
      number=number,
    )

  def take(self, name: str, trial: engine.Trial) -> None:
    """Keeps a finished trial, and scores its batch if it was the last."""
    batch, done = trial.job.victim, self._done[name]
    done[batch] = outcomes.merge(done.get(batch), trial)
    if recovered := self._recoveries.get(name, {}).get(batch):
      done[batch] = done[batch]._replace(origin=outcomes.origin(*recovered))
    outcomes.save(self._outcome_path(name, batch), done[batch])
    if self._has_all(name, batch):
      self._recovery_path(name, batch).unlink(missing_ok=True)
    self._evaluate(name, batch)
    self._write_results()

  def note_times(self, name: str, run_seconds: float, compile_seconds: float) -> None:
    """Keeps what the search of an attack took in this call."""
    before, here = self._times_before[name], (run_seconds, compile_seconds)
    times = {k: v + t for (k, v), t in zip(before.items(), here, strict=True)}
    if times != self._times[name]:
      self._times[name] = times
      write_json(self._times_path(name), times)

  def _restarts(self, name) -> int:
    return 1 if self.settings.attacks[name].closed_form == "only" else self.settings.restarts

  def _has_all(self, name, batch) -> bool:
    outcome = self._done[name].get(batch)
    return outcome is not None and len(outcome.records) >= self._restarts(name)

  def _shown_to(self, name: str, observation: Observation) -> Observation:
    """Returns an observation without the labels unless the attack is given them."""
    if self.settings.attacks[name].labels == "given":
      return observation
    return dataclasses.replace(observation, labels=None)

  def _evaluate(self, name: str, batch: int) -> None:
    """Scores one batch once all of its trials are finished."""
    settings, outcome = self.settings, self._done[name][batch]
    if not self._has_all(name, batch):
      return
    recovered = None
    if settings.attacks[name].labels == "recovered":
      origin, observation = outcome.origin, self.observations[batch]
      recovered = recover_labels(self.model, observation) if origin is None else origin.labels
    secret, size = self._secrets[batch], settings.data.batch_size
    facts = Facts(settings, self.model, self._victims, self._pool)
    scored = score(facts, name, secret, outcome, number=batch, recovered=recovered)
    self._rows[name][batch] = scored.rows
    self._images[name][batch * size : (batch + 1) * size] = scored.images
    if batch * size < _SHOWN:
      self._recordings[name][batch] = scored.recording
    self._done[name][batch] = outcome._replace(recording={})  # which takes much memory

  def _rows_of(self, name: str) -> list[Row]:
    return [row for _, rows in sorted(self._rows[name].items()) for row in rows]

  def _write_results(self) -> None:
    rows = [row.to_json() for name in self._rows for row in self._rows_of(name)]
    write_json_lines(self._workdir / "results.jsonl", rows)

  def finish(self, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes what is made of all results, and shows the table."""
    attacks = {
      name: summarize(
        self._rows_of(name),
        len(self._originals),
        told=told(settings.masks, settings.labels),
        pool=len(self._pool),
        **self._times[name],
      )
      for name, settings in self.settings.attacks.items()
    }
    floors = evaluation.floors(self._victims.images, self._pool, self._victims.statistics)
    summary = Summary(attacks=attacks, floors=floors).to_json()
    write_json(self._workdir / "summary.json", summary)
    labels = np.concatenate([self._victims.labels] * self.settings.data.mask_seeds)
    write_npz(
      self._workdir / "reconstructions.npz",
      {"originals": self._originals, "labels": labels} | self._images,
    )
    self._write_recordings()
    captions = {name: [_caption(row) for row in self._rows_of(name)] for name in self._rows}
    write_grid(self._workdir / "grid.png", self._originals, self._images, captions)
    say("\n" + table(attacks))
    say(f"\npictures: {self._workdir / 'grid.png'}")
    say(f"numbers:  {self._workdir / 'results.jsonl'}, {self._workdir / 'summary.json'}")
    return {name: summary[name] for name in attacks}

  def _write_recordings(self) -> None:
    """Writes how the first images formed; a trial that ended keeps its last picture."""
    kept = {}
    iterations = sorted({n for r in self._recordings.values() for x in r.values() for n in x})
    for name, by_batch in self._recordings.items():
      recordings = [recording for _, recording in sorted(by_batch.items())]
      if not iterations or not all(recordings):
        continue
      frames = []
      for n in iterations:
        shown = [r[max((k for k in r if k <= n), default=min(r))] for r in recordings]
        frames.append(np.concatenate(shown)[:_SHOWN])
      pixels = np.clip(np.stack(frames, axis=1), 0, 1)
      kept[name] = np.round(np.nan_to_num(pixels) * 255).astype(np.uint8)
    if kept:
      write_npz(self._workdir / "recordings.npz", {"iterations": np.asarray(iterations)} | kept)


def clients_key(settings: ExperimentSettings) -> str:
  """Returns what experiments on the same clients have in common."""
  fields = settings.to_json()
  shared = {name: fields[name] for name in ("seed", "precision", "data", "model")}
  return json.dumps(shared, sort_keys=True)


def _check_labels(settings: AttackSettings, model: DropoutModel, batch_size: int) -> None:
  """Lets an attack that cannot read its labels say so before anything is written."""
  if settings.labels == "recovered":
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.ShapeDtypeStruct((1,), np.float32)
    observation = Observation(shapes, shapes, None, zeros, zeros, batch_size)
    jax.eval_shape(lambda o: recover_labels(model, o), observation)


@contextlib.contextmanager
def _compilation() -> Iterator[list[float]]:
  """Collects the seconds that XLA compiles inside; tracing in Python is not among them."""
  durations: list[float] = []

  def listen(event: str, seconds: float, **kwargs: Any) -> None:
    del kwargs
    if event in ("/jax/core/compile/" + kind + "_duration" for kind in _COMPILING):
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


def _without_search(recovery: Recovery, batch: int) -> engine.Trial:
  """Returns what was recovered as a trial of no iteration."""
  residual = recovery.residual[np.isfinite(recovery.residual)]
  return engine.Trial(
    job=engine.Job(batch, 0),
    candidate=Candidate(recovery.parts.images, recovery.parts.masks, None),
    objective=float(residual.max(initial=0.0)),
    distance=0.0,
    iterations=0,
    best_iteration=0,
    status=Status.NO_SEARCH,
    seconds=0.0,
  )


def _caption(row: Row) -> str:
  if row.status in ("failed", "not_applicable"):
    return row.status.replace("_", " ")
  return f"MSE {row.scores['mse_normalized']:.1e}\nSSIM {row.scores['ssim']:.2f}"
