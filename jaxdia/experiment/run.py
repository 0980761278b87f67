"""Runs experiments: one alone, or one attack of several with their trials in the same lanes."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from jaxdia import engine
from jaxdia.config import validate
from jaxdia.core.errors import first_line
from jaxdia.description import describe
from jaxdia.experiment.experiment import Experiment
from jaxdia.experiment.progress import ProgressReport


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
      progress = ProgressReport([name], [attack.max_iterations])
      try:
        errors = search(
          name,
          {0: experiment},
          lanes=lanes,
          checkpoint_path=workdir / "checkpoint" / f"{name}.npz",
          on_progress=lambda p, show=progress, most=attack.max_iterations: show.update(p, most),
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
  experiments: Mapping[int, Experiment],
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
    experiments: by number; their settings of the engine are the same, and their attacks share a
      program. Of one that is not begun nothing is run; it only tells how many trials there are.
    lanes: trials that a device runs at once; None chooses.
    checkpoint_path: where running trials are saved, known by the numbers.
    on_progress: called once a chunk.
    note: called with a line after each closed form.
    say: called with what a person should read.

  Returns:
    {number: error} of those that failed. The others were run to their end: an error that is
    of no one experiment makes each run by itself.
  """
  errors: dict[int, Exception] = {}

  def attempt(number: int, function: Callable[..., None], *arguments: Any) -> None:
    try:
      function(*arguments)
    except Exception as error:  # the others go on without it, whatever it is
      errors.setdefault(number, error)

  for number, experiment in experiments.items():
    attempt(number, experiment.recover, name, note)
  well = {number: one for number, one in experiments.items() if number not in errors}
  left = [number for number, one in well.items() if not one.is_finished(name)]
  if not left:
    return errors
  settings = well[left[0]].settings

  def report(progress: engine.Progress) -> None:
    on_progress(progress)
    for number in left:
      with contextlib.suppress(OSError):  # for times alone none need fail
        seconds = progress.task_seconds[number], progress.compile_seconds / len(left)
        well[number].note_times(name, *seconds)

  try:
    trials = engine.run(
      [one.task(name, number) for number, one in well.items()],
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
      number = trial.job.task
      attempt(number, well[number].take, name, trial)
      if errors.keys() >= set(left):
        break
  except Exception as error:
    unfinished = [n for n in left if n not in errors and not well[n].is_finished(name)]
    if len(well) == 1:
      return errors | dict.fromkeys(unfinished, error)
    say(f"{name}: {first_line(error)}; going on with each experiment by itself")
    for number in unfinished:
      path = checkpoint_path.with_stem(f"{checkpoint_path.stem}_{number}")
      alone = {number: well[number]}
      options = {"on_progress": on_progress, "note": note, "say": say}
      errors |= search(name, alone, lanes=lanes, checkpoint_path=path, **options)
  return errors
