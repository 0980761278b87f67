"""Runs experiments: one alone, or one attack of several with their trials in the same lanes."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from jaxdia import engine
from jaxdia.core.errors import first_line
from jaxdia.experiment.attack_run import Times
from jaxdia.experiment.config import validate
from jaxdia.experiment.description import describe
from jaxdia.experiment.experiment import Experiment
from jaxdia.experiment.progress import ProgressReport


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Attacks the configured images, and writes and returns what came of it.

  In the work directory are afterwards `config.json`, `manifest.json` of the first session and
  `sessions.jsonl` of all, `results.jsonl` (one object an image), `summary.json`,
  `reconstructions.npz`, `recordings.npz` if there was a search, and `grid.png`; `trials/` keeps
  finished trials, and `checkpoint/` running ones while they run. The same call goes on where
  it was interrupted, and ends with the same numbers (see `jaxdia.experiment.store`).

  Args:
    config: as made by the files in `configs/`.
    workdir: made if needed; refused if it belongs to another experiment, or if another process
      is in it.
    say: called with what a person should read.

  Returns:
    The summary: by attack, counts and statistics of each metric.

  Raises:
    InputError: something about the input; nothing has been written then, but
      for what was finished before a checkpoint turned out to be damaged.
  """
  settings, workdir = validate(config), pathlib.Path(workdir)
  with jax.enable_x64(settings.precision == "float64"):
    experiment = Experiment(settings, workdir)
    experiment.begin()
    with contextlib.closing(experiment):
      alone = {0: experiment}
      plans = {name: _plan(name, alone, _lanes(name, alone)[0] or None) for name in experiment.runs}
      attacks = {name: one.attack for name, one in experiment.runs.items()}
      say(describe(settings, experiment.clients, attacks, plans))
      for name, one in experiment.runs.items():
        if finished := len(one.finished):
          say(f"{name}: {finished} of {one.trials} trials were finished before")
        progress = ProgressReport([name], [1.0])
        try:
          errors = run_attack(
            name,
            alone,
            checkpoint_path=workdir / "checkpoint" / f"{name}.npz",
            progress=progress,
            say=say,
          )
        finally:
          progress.close()
        for error in errors.values():
          raise error
      return experiment.finish(say)


def _plan(name: str, experiments: Mapping[int, Experiment], lanes: int | None) -> engine.Plan:
  """Returns how the engine shares out an attack, whatever of it is finished."""
  tasks = [one.runs[name].plan() for one in experiments.values()]
  devices = next(iter(experiments.values())).store.devices
  return engine.plan(tasks, lanes=lanes, devices=devices)


def _lanes(name: str, experiments: Mapping[int, Experiment]) -> tuple[int, int]:
  """Returns in how many lanes a device an attack goes on, and in how many it would begin."""
  asked = next(iter(experiments.values())).settings.engine.lanes
  before = (one.store.lanes(name) for one in experiments.values())
  lanes = next((lanes for lanes in before if lanes is not None), None)
  fresh = _plan(name, experiments, lanes if asked is None else asked).lanes
  return fresh if lanes is None else lanes, fresh


def run_attack(
  name: str,
  experiments: Mapping[int, Experiment],
  *,
  checkpoint_path: pathlib.Path,
  progress: ProgressReport,
  say: Callable[[str], None],
) -> dict[int, Exception]:
  """Runs an attack of each experiment, or what is left of it, all in the same lanes.

  No error of an experiment is raised but for an interruption (whatever is no `Exception`): it is
  returned, so that the others go on. An error of the engine, which is of no one experiment, makes
  each run by itself, and is returned of those that it is raised for again.

  Args:
    name: of the attack.
    experiments: by number; their settings of the engine are the same, and their attacks share a
      program. Of one that is not begun nothing is run; it only tells how many trials there are.
    checkpoint_path: where running trials are saved, known by the numbers.
    progress: told how far it is.
    say: called with what a person should read.

  Returns:
    {number: error} of those that failed. The others were run to their end.
  """
  errors: dict[int, Exception] = {}

  def attempt(number: int, function: Callable[..., None], *arguments: Any) -> None:
    try:
      function(*arguments)
    except Exception as error:  # the others go on without it, whatever it is
      errors.setdefault(number, error)

  left = [number for number, one in experiments.items() if not one.runs[name].is_finished]
  if not left:
    return errors
  lanes, fresh = _lanes(name, experiments)
  for number in left:
    attempt(number, experiments[number].store.start, name, lanes, fresh, say)
  runs = {number: one.runs[name] for number, one in experiments.items() if number not in errors}
  left = [number for number in left if number in runs]
  if not left:
    return errors
  halved = (one.store.halved(name) for one in experiments.values())
  lanes = min([lanes, *(fewer for fewer in halved if fewer is not None)])
  most = runs[left[0]].attack.max_iterations
  settings, store = experiments[left[0]].settings, experiments[left[0]].store

  def report(now: engine.Progress) -> None:
    progress.update(now)
    for number in left:
      if now.halved is not None:
        experiments[number].store.note_halved(name, now.halved)
      with contextlib.suppress(OSError):  # for times alone none need fail
        compiling = now.compile_seconds / len(left)
        runs[number].note_times(Times(now.task_seconds[number], compiling))

  try:
    trials = engine.run(
      [one.task(number, progress.note) for number, one in runs.items()],
      lanes=lanes or None,  # an attack that takes no step has none
      chunk=settings.engine.chunk,
      devices=store.devices,
      matching=settings.engine.matching,
      record=engine.recorded_iterations(most),
      checkpoint_path=checkpoint_path,
      checkpoint_seconds=settings.engine.checkpoint_seconds,
      on_progress=report,
      say=say,
    )
    for trial in trials:
      number = trial.job.task
      attempt(number, runs[number].take, trial)
      if errors.keys() >= set(left):
        break
  except Exception as error:
    unfinished = [n for n in left if n not in errors and not runs[n].is_finished]
    if len(runs) == 1:
      return errors | dict.fromkeys(unfinished, error)
    say(f"{name}: {first_line(error)}; going on with each experiment by itself")
    for number in unfinished:
      errors |= run_attack(
        name,
        {number: experiments[number]},
        checkpoint_path=checkpoint_path.with_stem(f"{checkpoint_path.stem}_{number}"),
        progress=progress,
        say=say,
      )
  return errors
