"""Runs one attack of several experiments, with their trials in the same lanes."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping

from jaxdia import engine
from jaxdia.core.errors import first_line
from jaxdia.experiment.attack_run import Times
from jaxdia.experiment.experiment import Experiment


def plan(
  name: str, experiments: Mapping[int, Experiment], lanes: int | None, processes: int = 1
) -> engine.Plan:
  """Returns how the engine shares out an attack, whatever of it is finished.

  Args:
    name: of the attack.
    experiments: by number.
    lanes: a device; chosen if None.
    processes: that share out the trials, each with the devices of this one.
  """
  tasks = [one.runs[name].plan() for one in experiments.values()]
  devices = next(iter(experiments.values())).store.devices * processes
  return engine.plan(tasks, lanes=lanes, devices=devices)


def noted_lanes(name: str, experiments: Mapping[int, Experiment]) -> int | None:
  """Returns in how many lanes a device an attack was begun; None if it was not.

  Args:
    name: of the attack.
    experiments: by number.
  """
  before = (one.store.lanes(name) for one in experiments.values())
  return next((lanes for lanes in before if lanes is not None), None)


def start(
  name: str,
  experiments: Mapping[int, Experiment],
  lanes: int,
  fresh: int,
  say: Callable[[str], None],
) -> tuple[int, dict[int, Exception]]:
  """Notes that an attack is run on what is left of experiments.

  Args:
    name: of the attack.
    experiments: by number.
    lanes: in how many a device it is run.
    fresh: in how many it would be run if it was not begun before.
    say: called with what a person should read.

  Returns:
    In how many lanes a device it goes on, which are fewer if memory was short, and errors by
    experiment.
  """
  errors: dict[int, Exception] = {}
  for number, one in experiments.items():
    if one.runs[name].is_finished:
      continue
    try:
      one.store.start(name, lanes, fresh, say)
    except Exception as error:  # the others go on without it, whatever it is
      errors[number] = error
  halved = (one.store.halved(name) for one in experiments.values())
  return min([lanes, *(fewer for fewer in halved if fewer is not None)]), errors


def lanes_of(name: str, experiments: Mapping[int, Experiment]) -> tuple[int, int]:
  """Returns in how many lanes a device an attack goes on, and in how many it would begin.

  Args:
    name: of the attack.
    experiments: by number.
  """
  asked = next(iter(experiments.values())).settings.engine.lanes
  lanes = noted_lanes(name, experiments)
  fresh = plan(name, experiments, lanes if asked is None else asked).lanes
  return fresh if lanes is None else lanes, fresh


def run_attack(
  name: str,
  experiments: Mapping[int, Experiment],
  *,
  checkpoint_path: pathlib.Path | None,
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
    checkpoint_path: where running trials are saved, known by the numbers; nowhere if None.
    on_progress: called once a chunk.
    note: called with a line after each closed form.
    say: called with what a person should read.

  Returns:
    {number: error} of those that failed. The others were run to their end.
  """
  errors: dict[int, Exception] = {}

  left = [number for number, one in experiments.items() if not one.runs[name].is_finished]
  if not left:
    if checkpoint_path is not None:  # of a call that was interrupted after its last trial
      checkpoint_path.unlink(missing_ok=True)
    return errors
  lanes, failed = start(name, experiments, *lanes_of(name, experiments), say)
  errors |= failed
  runs = {number: one.runs[name] for number, one in experiments.items() if number not in errors}
  left = [number for number in left if number in runs]
  if not left:
    return errors
  most = runs[left[0]].attack.max_iterations
  settings, store = experiments[left[0]].settings, experiments[left[0]].store

  def report(now: engine.Progress) -> None:
    on_progress(now)
    for number in left:
      if now.halved is not None:
        experiments[number].store.note_halved(name, now.halved)
      with contextlib.suppress(OSError):  # for times alone none need fail
        compiling = now.compile_seconds / len(left)
        runs[number].note_times(Times(now.task_seconds[number], compiling))

  try:
    trials = engine.run(
      [one.task(number, note) for number, one in runs.items()],
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
      try:
        runs[number].take(trial)
      except Exception as error:  # likewise
        errors.setdefault(number, error)
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
        checkpoint_path=checkpoint_path
        and checkpoint_path.with_stem(f"{checkpoint_path.stem}_{number}"),
        on_progress=on_progress,
        note=note,
        say=say,
      )
  return errors
