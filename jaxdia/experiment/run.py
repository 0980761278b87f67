"""Runs experiments: one alone, or one attack of several with their trials in the same lanes."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections

from jaxdia import engine, reporting
from jaxdia.config import validate
from jaxdia.description import describe
from jaxdia.experiment.experiment import Experiment


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
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
    model, observations = experiment.model, experiment.observations
    trials = len(observations) * settings.restarts
    lanes, devices = settings.engine.lanes, jax.local_devices()[:trials]
    if lanes is None:
      lanes = engine.choose_lanes(model, observations[0], trials, devices)
    say(describe(settings, model, observations[0], lanes, len(devices)))
    for name, attack in settings.attacks.items():
      if finished := len(experiment.finished(name)):
        say(f"{name}: {finished} of {trials} trials were finished before")
      progress = reporting.ProgressReport(name, attack.max_iterations)
      try:
        errors = search(
          name,
          [experiment],
          lanes=lanes,
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


def search(
  name: str,
  experiments: Sequence[Experiment],
  *,
  lanes: int | None,
  checkpoint_path: pathlib.Path,
  on_progress: Callable[[engine.Progress], None],
  note: Callable[[str], None],
  say: Callable[[str], None],
) -> dict[int, Exception]:
  """Runs an attack of each experiment, or what is left of it, all in the same lanes.

  Args:
    name: of the attack.
    experiments: begun; their settings of the engine are the same, and their attacks share a
      program.
    lanes: trials that a device runs at once; None chooses.
    checkpoint_path: where running trials are saved; of these experiments alone.
    on_progress: called once a chunk.
    note: called with a line after each closed form.
    say: called with what a person should read.

  Returns:
    {place in `experiments`: error} of those that failed; the others were run to their end.
  """
  errors: dict[int, Exception] = {}

  def attempt(number: int, function: Callable[..., None], *arguments: Any) -> None:
    # The others go on without an experiment that fails, whatever it is.
    if number not in errors:
      try:
        function(*arguments)
      except Exception as error:
        errors[number] = error

  for number, experiment in enumerate(experiments):
    attempt(number, experiment.recover, name, note)
  settings = experiments[0].settings
  if settings.attacks[name].closed_form == "only":
    return errors
  well = [number for number in range(len(experiments)) if number not in errors]
  left = [number for number in well if not experiments[number].is_finished(name)]

  def report(progress: engine.Progress) -> None:
    on_progress(progress)
    seconds = dict(zip(well, progress.task_seconds, strict=True))
    for number in left:
      compiling = progress.compile_seconds / len(left)
      attempt(number, experiments[number].note_times, name, seconds[number], compiling)

  try:
    trials = engine.run(
      [experiments[number].task(name) for number in well],
      lanes=lanes,
      chunk=settings.engine.chunk,
      matching=settings.engine.matching,
      record=engine.recorded_iterations(settings.attacks[name].max_iterations),
      checkpoint_path=checkpoint_path,
      checkpoint_seconds=settings.engine.checkpoint_seconds,
      on_progress=report,
      say=say,
    )
    for trial in trials:
      number = well[trial.job.task]
      attempt(number, experiments[number].take, name, trial)
  except Exception as error:
    errors |= {number: error for number in left if number not in errors}
  return errors
