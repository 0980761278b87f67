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

from jaxdia import data, engine, evaluation, models, outcomes, reporting
from jaxdia.attacks import AttackSettings, Candidate, Status, create_attack
from jaxdia.client import Observation, Secret, observe
from jaxdia.closed_form import Parts, recover, recover_labels
from jaxdia.config import ExperimentSettings, validate
from jaxdia.description import describe
from jaxdia.errors import InputError
from jaxdia.files import write_json, write_json_lines, write_npz
from jaxdia.models import DropoutModel
from jaxdia.workdir import check_workdir, digest


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Attacks the configured victims, and writes and returns what came of it.

  In the work directory are afterwards `config.json`, `results.jsonl` (one object
  an image), `summary.json`, `reconstructions.npz` and `grid.png`; `trials/` keeps
  finished trials, and `checkpoint/` running ones while they run. The same call
  goes on where it was interrupted.

  Args:
    config: as made by the files in `configs/`.
    workdir: made if needed; refused if it belongs to another experiment.
    say: called with what a person should read.

  Returns:
    The summary: by attack, counts and statistics of each metric.

  Raises:
    InputError: something about the input; nothing has been written then, but
      for what was finished before a checkpoint turned out to be damaged.
  """
  settings = validate(config)
  with jax.enable_x64(settings.precision == "float64"):
    return _run(settings, pathlib.Path(workdir), say)


def _run(settings, workdir, say) -> dict[str, Any]:
  victims = data.load(
    settings.data.source,
    settings.data.count,
    settings.data.offset,
    image_size=settings.data.image_size,
    num_classes=settings.data.num_classes,
    statistics=settings.data.statistics,
  )
  options = dict(settings.model)
  model = models.create(
    options.pop("name"), victims.images.shape[1:], victims.num_classes, **options
  )
  for attack_settings in settings.attacks.values():
    _check_labels(attack_settings, model, settings.data.batch_size)
  config_json = settings.to_json()
  config_json["data"]["sha256"] = digest(victims)
  check_workdir(workdir, config_json)
  observations, secrets = _observe(settings, model, victims)
  try:
    (workdir / "trials").mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config_json)
  except OSError as error:
    raise InputError(
      f"cannot write in the work directory {workdir} ({error}). Choose another --workdir."
    ) from error
  trials = len(observations) * settings.restarts
  lanes, devices = settings.engine.lanes, jax.local_devices()[:trials]
  if lanes is None:
    lanes = engine.choose_lanes(model, observations[0], trials, devices)
  say(describe(settings, model, observations[0], lanes, len(devices)))
  experiment = _Experiment(settings, workdir, model, victims, observations, secrets, lanes)
  experiment.load()
  for name in settings.attacks:
    experiment.attack(name, say)
  return experiment.finish(say)


def _check_labels(settings: AttackSettings, model: DropoutModel, batch_size: int) -> None:
  """Lets an attack that cannot read its labels say so before anything is written."""
  if settings.labels == "recovered":
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.ShapeDtypeStruct((1,), np.float32)
    observation = Observation(shapes, shapes, None, zeros, zeros, batch_size)
    jax.eval_shape(lambda o: recover_labels(model, o), observation)


def _observe(settings, model, victims) -> tuple[list[Observation], list[Secret]]:
  """Draws the weights and lets each client compute its gradient."""
  key = jax.random.key(settings.seed)
  params = jax.jit(model.init)(jax.random.fold_in(key, 0))
  params = jax.tree.map(lambda x: x.astype(settings.precision), params)
  client_key = jax.random.fold_in(key, 1)
  images = data.normalize(victims.images, victims.statistics)
  size = settings.data.batch_size
  pairs = [
    observe(
      jax.random.fold_in(client_key, i),
      model,
      params,
      images[i * size : (i + 1) * size],
      victims.labels[i * size : (i + 1) * size],
      statistics=victims.statistics,
    )
    for i in range(len(images) // size)
  ]
  observations, secrets = zip(*pairs, strict=True)
  return list(observations), list(secrets)


class _Experiment:
  """The attacks of one experiment, and what is written of them."""

  def __init__(self, settings, workdir, model, victims, observations, secrets, lanes):
    self._settings: ExperimentSettings = settings
    self._workdir: pathlib.Path = workdir
    self._model: DropoutModel = model
    self._victims: data.Victims = victims
    self._observations: list[Observation] = observations
    self._secrets: list[Secret] = secrets
    self._lanes: int = lanes
    self._done: dict[str, dict[int, outcomes.Outcome]] = {}  # by attack and batch
    self._rows: dict[str, dict[int, list[dict[str, Any]]]] = {}  # by attack and batch
    self._images: dict[str, np.ndarray] = {}
    self._times: dict[str, dict[str, float]] = {}
    self._trial_key = jax.random.fold_in(jax.random.key(settings.seed), 2)

  def _outcome_path(self, name: str, batch: int) -> pathlib.Path:
    return self._workdir / "trials" / name / f"{batch:05d}.npz"

  def _times_path(self, name: str) -> pathlib.Path:
    return self._workdir / "trials" / name / "times.json"

  def load(self) -> None:
    """Takes up what was finished before."""
    for name in self._settings.attacks:
      self._rows[name] = {}
      self._images[name] = np.full_like(self._victims.images, np.nan)
      found = {i: outcomes.load(self._outcome_path(name, i)) for i in range(len(self._secrets))}
      self._done[name] = {i: outcome for i, outcome in found.items() if outcome is not None}
      for batch in self._done[name]:
        self._evaluate(name, batch)
      self._times[name] = _read_times(self._times_path(name))
    self._write_results()

  def attack(self, name: str, say: Callable[[str], None]) -> None:
    """Runs one attack on all batches, or what is left of it."""
    settings, done = self._settings, self._done[name]
    attack = create_attack(self._model, settings.attacks[name])
    finished = {
      engine.Job(i, record.restart) for i, outcome in done.items() for record in outcome.records
    }
    if finished:
      total = len(self._observations) * settings.restarts
      say(f"{name}: {len(finished)} of {total} trials were finished before")
    progress = reporting.ProgressReport(name, attack.settings.max_iterations)
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
    size = settings.data.batch_size
    record, secret = outcome.best, self._secrets[batch]
    attack, origin, recovered = settings.attacks[name], outcome.origin, None
    if attack.labels == "recovered":
      recovered = recover_labels(self._model, self._observations[batch])
      if origin is not None:
        recovered = origin.labels
    alone = attack.closed_form == "only"
    result = evaluation.evaluate(
      self._model,
      secret,
      outcome.candidate,
      self._victims.statistics,
      evaluation.found_labels(outcome.candidate, recovered),
      found=origin.verdict > 0 if alone else None,
      known_masks=origin.known_masks if alone else None,
    )
    rows = []
    for i, score in enumerate(result.scores):
      rows.append(
        {
          "victim": settings.data.offset + batch * size + i,
          "batch": batch,
          "label": int(secret.labels[i]),
          "attack": name,
          "model": settings.model["name"],
          "dropout_rate": settings.model["dropout_rate"],
          "batch_size": size,
        }
        | {key: None if outcome.failed else value for key, value in score.items()}
        | {
          "objective": None if outcome.failed or alone else record.objective,
          "gradient_distance": None if outcome.failed or alone else record.distance,
          "iterations": record.iterations,
          "best_iteration": record.best_iteration,
          "restart": record.restart,
          "seconds": round(record.seconds + (origin.seconds if origin else 0), 3),
          "status": "failed" if outcome.failed else record.status.name.lower(),
          "closed_form": None
          if origin is None
          else outcomes.describe_origin(origin, int(result.order[i])),
        }
      )
    if alone:
      for row in rows:
        row["status"] = row["closed_form"]["verdict"]
    self._rows[name][batch] = rows
    if not outcome.failed:
      self._images[name][batch * size : (batch + 1) * size] = result.reconstructions

  def _rows_of(self, name: str) -> list[dict[str, Any]]:
    return [row for _, rows in sorted(self._rows[name].items()) for row in rows]

  def _write_results(self) -> None:
    rows = [row for name in self._rows for row in self._rows_of(name)]
    write_json_lines(self._workdir / "results.jsonl", rows)

  def finish(self, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes what is made of all results, and shows the table."""
    summary = {
      name: reporting.summarize(self._rows_of(name), self._settings.data.count) | self._times[name]
      for name in self._rows
    }
    write_json(self._workdir / "summary.json", summary)
    write_npz(
      self._workdir / "reconstructions.npz",
      {"originals": self._victims.images, "labels": self._victims.labels} | self._images,
    )
    captions = {name: [_caption(row) for row in self._rows_of(name)] for name in self._rows}
    reporting.write_grid(self._workdir / "grid.png", self._victims.images, self._images, captions)
    say("\n" + reporting.table(summary))
    say(f"\npictures: {self._workdir / 'grid.png'}")
    say(f"numbers:  {self._workdir / 'results.jsonl'}, {self._workdir / 'summary.json'}")
    return summary


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
