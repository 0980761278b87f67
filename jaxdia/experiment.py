"""Runs a configured experiment in a work directory."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxdia import data, engine, evaluation, outcomes, reporting
from jaxdia.attacks import AttackSettings, Candidate, Status, create_attack
from jaxdia.client import Observation, Secret
from jaxdia.closed_form import Parts, recover, recover_labels
from jaxdia.config import ExperimentSettings, validate
from jaxdia.description import describe
from jaxdia.errors import InputError
from jaxdia.files import write_json, write_json_lines, write_npz
from jaxdia.manifest import manifest
from jaxdia.models import DropoutModel
from jaxdia.scoring import score
from jaxdia.victims import create_model, load_pool, load_victims, observe_clients
from jaxdia.workdir import check_workdir, digest

# Of so many images it is kept how they formed.
_SHOWN = 4


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
  on_share: Callable[[float], None] | None = None,
) -> dict[str, Any]:
  """Attacks the configured victims, and writes and returns what came of it.

  In the work directory are afterwards `config.json`, `manifest.json`, `results.jsonl`
  (one object an image), `summary.json`, `reconstructions.npz`, `recordings.npz` if
  there was a search, and `grid.png`; `trials/` keeps finished trials, and
  `checkpoint/` running ones while they run. The same call goes on where it was
  interrupted.

  Args:
    config: as made by the files in `configs/`.
    workdir: made if needed; refused if it belongs to another experiment.
    say: called with what a person should read.
    on_share: called with the share of the work that is done, in place of the progress of each
      attack.

  Returns:
    The summary: by attack, counts and statistics of each metric.

  Raises:
    InputError: something about the input; nothing has been written then, but
      for what was finished before a checkpoint turned out to be damaged.
  """
  settings = validate(config)
  with jax.enable_x64(settings.precision == "float64"):
    return _run(settings, pathlib.Path(workdir), say, on_share)


def _run(settings, workdir, say, on_share) -> dict[str, Any]:
  victims = load_victims(settings.data)
  model = create_model(settings.model, victims)
  for attack_settings in settings.attacks.values():
    _check_labels(attack_settings, model, settings.data.batch_size)
  pool = load_pool(settings.data, victims)
  sha256 = digest(victims)
  config_json = settings.to_json()
  config_json["data"]["sha256"] = sha256
  check_workdir(workdir, config_json)
  observations, secrets = observe_clients(settings, model, victims)
  try:
    (workdir / "trials").mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config_json)
    if not (workdir / "manifest.json").exists():
      more = {"seed": settings.seed, "data_sha256": sha256, "precision": settings.precision}
      write_json(workdir / "manifest.json", manifest(**more))
  except OSError as error:
    raise InputError(
      f"cannot write in the work directory {workdir} ({error}). Choose another --workdir."
    ) from error
  trials = len(observations) * settings.restarts
  lanes, devices = settings.engine.lanes, jax.local_devices()[:trials]
  if lanes is None:
    lanes = engine.choose_lanes(model, observations[0], trials, devices)
  say(describe(settings, model, observations[0], lanes, len(devices)))
  experiment = _Experiment(settings, workdir, model, victims, observations, secrets, lanes, pool)
  experiment.load()
  for number, name in enumerate(settings.attacks):
    experiment.attack(name, say, on_share and _part(on_share, number, len(settings.attacks)))
  return experiment.finish(say)


def _part(on_share, number, count):
  return lambda share: on_share((number + share) / count)


def _check_labels(settings: AttackSettings, model: DropoutModel, batch_size: int) -> None:
  """Lets an attack that cannot read its labels say so before anything is written."""
  if settings.labels == "recovered":
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.ShapeDtypeStruct((1,), np.float32)
    observation = Observation(shapes, shapes, None, zeros, zeros, batch_size)
    jax.eval_shape(lambda o: recover_labels(model, o), observation)


class _Experiment:
  """The attacks of one experiment, and what is written of them."""

  def __init__(self, settings, workdir, model, victims, observations, secrets, lanes, pool):
    self._settings: ExperimentSettings = settings
    self._workdir: pathlib.Path = workdir
    self._model: DropoutModel = model
    self._victims: data.Victims = victims
    self._observations: list[Observation] = observations
    self._secrets: list[Secret] = secrets
    self._lanes: int = lanes
    self._pool: np.ndarray = pool
    self._done: dict[str, dict[int, outcomes.Outcome]] = {}  # by attack and batch
    self._rows: dict[str, dict[int, list[dict[str, Any]]]] = {}  # by attack and batch
    self._images: dict[str, np.ndarray] = {}
    self._recordings: dict[str, dict[int, dict[int, np.ndarray]]] = {}  # by attack and batch
    self._times: dict[str, dict[str, float]] = {}
    self._originals = np.concatenate([victims.images] * settings.data.mask_seeds)
    self._trial_key = jax.random.fold_in(jax.random.key(settings.seed), 2)

  def _outcome_path(self, name: str, batch: int) -> pathlib.Path:
    return self._workdir / "trials" / name / f"{batch:05d}.npz"

  def _times_path(self, name: str) -> pathlib.Path:
    return self._workdir / "trials" / name / "times.json"

  def load(self) -> None:
    """Takes up what was finished before."""
    for name in self._settings.attacks:
      self._rows[name] = {}
      self._recordings[name] = {}
      self._images[name] = np.full_like(self._originals, np.nan)
      found = {i: outcomes.load(self._outcome_path(name, i)) for i in range(len(self._secrets))}
      self._done[name] = {i: outcome for i, outcome in found.items() if outcome is not None}
      for batch in self._done[name]:
        self._evaluate(name, batch)
      self._times[name] = _read_times(self._times_path(name))
    self._write_results()

  def attack(
    self,
    name: str,
    say: Callable[[str], None],
    on_share: Callable[[float], None] | None = None,
  ) -> None:
    """Runs one attack on all batches, or what is left of it."""
    settings, done = self._settings, self._done[name]
    attack = create_attack(self._model, settings.attacks[name])
    finished = {
      engine.Job(i, record.restart) for i, outcome in done.items() for record in outcome.records
    }
    if finished:
      total = len(self._observations) * settings.restarts
      say(f"{name}: {len(finished)} of {total} trials were finished before")
    progress = reporting.ProgressReport(name, attack.settings.max_iterations, on_share=on_share)
    before = dict(self._times[name])  # what earlier calls took

    def on_progress(report):
      progress.update(report)
      self._times[name] = {kind: before[kind] + getattr(report, kind) for kind in before}
      write_json(self._times_path(name), self._times[name])

    observations = [self._shown_to(attack.settings, o) for o in self._observations]
    try:
      recoveries = None
      if attack.settings.closed_form != "none":
        recoveries = self._recover(name, observations, progress)
        self._times[name]["run_seconds"] += sum(seconds for _, seconds in recoveries)
        before = dict(self._times[name])
        write_json(self._times_path(name), before)
      if attack.settings.closed_form == "only":
        trials = _without_search(recoveries)
      else:
        trials = engine.run(
          self._trial_key,
          attack,
          observations,
          restarts=settings.restarts,
          # The one place where an attack is handed something of the secret: WIIG is defined by it.
          masks=[s.masks for s in self._secrets] if attack.settings.masks == "known" else None,
          parts=recoveries and _parts(recoveries),
          lanes=self._lanes,
          chunk=settings.engine.chunk,
          matching=settings.engine.matching,
          finished=finished,
          record=engine.recorded_iterations(attack.settings.max_iterations),
          checkpoint_path=self._workdir / "checkpoint" / f"{name}.npz",
          checkpoint_seconds=settings.engine.checkpoint_seconds,
          on_progress=on_progress,
          say=say,
        )
      for trial in trials:
        batch = trial.job.victim
        done[batch] = outcomes.merge(done.get(batch), trial)
        if recoveries is not None:
          done[batch] = done[batch]._replace(origin=outcomes.origin(*recoveries[batch]))
        outcomes.save(self._outcome_path(name, batch), done[batch])
        self._evaluate(name, batch)
        self._write_results()
    finally:
      progress.close()

  def _recover(self, name, observations, progress) -> list[tuple[Any, float]]:
    """Returns closed forms of the batches that are not finished, with seconds; else (None, 0)."""
    left = [i for i in range(len(observations)) if not self._is_finished(name, i)]
    found: list[tuple[Any, float]] = [(None, 0.0)] * len(observations)
    for count, i in enumerate(left):
      start = time.monotonic()
      recovery = recover(jax.random.fold_in(self._trial_key, i), self._model, observations[i])
      found[i] = recovery, time.monotonic() - start
      progress.note(f"closed form of batch {count + 1}/{len(left)}: {recovery.summary()}")
    return found

  def _is_finished(self, name, batch) -> bool:
    outcome, attack = self._done[name].get(batch), self._settings.attacks[name]
    restarts = 1 if attack.closed_form == "only" else self._settings.restarts
    return outcome is not None and len(outcome.records) >= restarts

  def _shown_to(self, settings: AttackSettings, observation: Observation) -> Observation:
    """Returns an observation without the labels unless the attack is given them."""
    if settings.labels == "given":
      return observation
    return dataclasses.replace(observation, labels=None)

  def _evaluate(self, name: str, batch: int) -> None:
    """Scores one batch once all of its trials are finished."""
    settings, outcome = self._settings, self._done[name][batch]
    if not self._is_finished(name, batch):
      return
    recovered = None
    if settings.attacks[name].labels == "recovered":
      origin, observation = outcome.origin, self._observations[batch]
      recovered = recover_labels(self._model, observation) if origin is None else origin.labels
    secret, size = self._secrets[batch], settings.data.batch_size
    scored = score(
      settings,
      self._model,
      name,
      batch,
      secret,
      outcome,
      self._victims,
      self._pool,
      recovered,
    )
    self._rows[name][batch] = scored.rows
    self._images[name][batch * size : (batch + 1) * size] = scored.images
    if batch * size < _SHOWN:
      self._recordings[name][batch] = scored.recording
    self._done[name][batch] = outcome._replace(recording={})  # which takes much memory

  def _rows_of(self, name: str) -> list[dict[str, Any]]:
    return [row for _, rows in sorted(self._rows[name].items()) for row in rows]

  def _write_results(self) -> None:
    rows = [row for name in self._rows for row in self._rows_of(name)]
    write_json_lines(self._workdir / "results.jsonl", rows)

  def finish(self, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes what is made of all results, and shows the table."""
    summary = {
      name: reporting.summarize(self._rows_of(name), len(self._originals))
      | {"pool": len(self._pool)}
      | self._times[name]
      for name in self._rows
    }
    floors = evaluation.floors(self._victims.images, self._pool, self._victims.statistics)
    write_json(self._workdir / "summary.json", summary | {"floors": floors})
    labels = np.concatenate([self._victims.labels] * self._settings.data.mask_seeds)
    write_npz(
      self._workdir / "reconstructions.npz",
      {"originals": self._originals, "labels": labels} | self._images,
    )
    self._write_recordings()
    captions = {name: [_caption(row) for row in self._rows_of(name)] for name in self._rows}
    reporting.write_grid(self._workdir / "grid.png", self._originals, self._images, captions)
    say("\n" + reporting.table(summary))
    say(f"\npictures: {self._workdir / 'grid.png'}")
    say(f"numbers:  {self._workdir / 'results.jsonl'}, {self._workdir / 'summary.json'}")
    return summary

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


def _read_times(path: pathlib.Path) -> dict[str, float]:
  """Returns the seconds that earlier calls took."""
  if not path.exists():
    return {"run_seconds": 0.0, "compile_seconds": 0.0}
  try:
    times = json.loads(path.read_text())
    return {kind: float(times[kind]) for kind in ("run_seconds", "compile_seconds")}
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(f"{path} is damaged ({error}). Delete it; it only holds times.") from error


def _without_search(recoveries) -> Iterator[engine.Trial]:
  """Yields what was recovered as trials of no iteration."""
  for batch, (recovery, _) in enumerate(recoveries):
    if recovery is None:
      continue
    parts = recovery.parts
    residual = recovery.residual[np.isfinite(recovery.residual)]
    yield engine.Trial(
      job=engine.Job(batch, 0),
      candidate=Candidate(parts.images, parts.masks, None),
      objective=float(residual.max(initial=0.0)),
      distance=0.0,
      iterations=0,
      best_iteration=0,
      status=Status.NO_SEARCH,
      seconds=0.0,
    )


def _parts(recoveries) -> list[Parts]:
  """Returns the parts of each batch; those of a finished one are any, and not looked at."""
  parts = [recovery.parts for recovery, _ in recoveries if recovery is not None]
  spare = next(iter(parts), None)
  return [spare if recovery is None else recovery.parts for recovery, _ in recoveries]


def _caption(row: dict[str, Any]) -> str:
  if row["status"] in ("failed", "not_applicable"):
    return row["status"].replace("_", " ")
  return f"MSE {row['mse_normalized']:.1e}\nSSIM {row['ssim']:.2f}"
