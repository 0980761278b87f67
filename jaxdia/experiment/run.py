"""Runs experiments: one alone, or one attack of several with their trials in the same lanes."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from jaxdia import engine, reporting
from jaxdia.core.errors import first_line
from jaxdia.experiment.config import validate
from jaxdia.experiment.description import describe
from jaxdia.experiment.experiment import Experiment


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
    experiment.begin(say)
    with contextlib.closing(experiment):
      lanes = _lanes(next(iter(settings.attacks)), {0: experiment})
      trials = max(one.trials for one in experiment.runs.values())
      devices = len(experiment.store.devices[:trials])
      say(describe(settings, experiment.clients, min(lanes, -(-trials // devices)), devices))
      for name, one in experiment.runs.items():
        if finished := len(one.finished):
          say(f"{name}: {finished} of {one.trials} trials were finished before")
        progress = reporting.ProgressReport(name, settings.attacks[name].max_iterations)
        try:
          errors = run_attack(
            name,
            {0: experiment},
            checkpoint_path=workdir / "checkpoint" / f"{name}.npz",
            on_progress=progress.update,
            note=progress.note,
            say=say,
          )
        finally:
          progress.close()
        for error in errors.values():
          raise error
      return experiment.finish(say)


def _lanes(name: str, experiments: Mapping[int, Experiment]) -> int:
  """Returns in how many lanes a device an attack is run, or was begun before."""
  before = (one.store.lanes(name) for one in experiments.values())
  if found := next((lanes for lanes in before if lanes is not None), None):
    return found
  first = next(iter(experiments.values()))
  if first.settings.engine.lanes is not None:
    return first.settings.engine.lanes
  trials = sum(one.runs[name].trials for one in experiments.values())
  model, observation = first.clients.model, first.clients.observations[0]
  return engine.choose_lanes(model, observation, trials, first.store.devices[:trials])


def run_attack(
  name: str,
  experiments: Mapping[int, Experiment],
  *,
  checkpoint_path: pathlib.Path,
  on_progress: Callable[[engine.Progress], None],
  note: Callable[[str], None],
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
    on_progress: called once a chunk.
    note: called with a line after each closed form.
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

  for number, experiment in experiments.items():
    attempt(number, experiment.runs[name].recover, note)
  well = {number: one for number, one in experiments.items() if number not in errors}
  runs = {number: one.runs[name] for number, one in well.items()}
  left = [number for number, one in runs.items() if not one.is_finished]
  if not left:
    return errors
  lanes = _lanes(name, well)
  for number in left:
    well[number].store.fix_lanes(name, lanes)
  settings, store = well[left[0]].settings, well[left[0]].store

  def report(progress: engine.Progress) -> None:
    on_progress(progress)
    for number in left:
      with contextlib.suppress(OSError):  # for times alone none need fail
        seconds = progress.task_seconds[number], progress.compile_seconds / len(left)
        runs[number].note_times(*seconds)

  try:
    trials = engine.run(
      [one.task(number) for number, one in runs.items()],
      lanes=lanes,
      chunk=settings.engine.chunk,
      devices=store.devices,
      matching=settings.engine.matching,
      record=engine.recorded_iterations(settings.attacks[name].max_iterations),
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
    if len(well) == 1:
      return errors | dict.fromkeys(unfinished, error)
    say(f"{name}: {first_line(error)}; going on with each experiment by itself")
    for number in unfinished:
      errors |= run_attack(
        name,
        {number: well[number]},
        checkpoint_path=checkpoint_path.with_stem(f"{checkpoint_path.stem}_{number}"),
        on_progress=on_progress,
        note=note,
        say=say,
      )
  return errors
