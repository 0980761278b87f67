"""The door of the engine: tasks go in, finished trials come out."""

import collections
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Status, same_program
from jaxdia.client import Observation
from jaxdia.core.errors import InputError
from jaxdia.core.machine import forget_programs
from jaxdia.core.trees import shapes_of
from jaxdia.engine.capacity import choose_lanes, halve_lanes
from jaxdia.engine.jobs import Job, Progress, Task, Trial, trial_key
from jaxdia.engine.loop import Loop, init_trial, told_of
from jaxdia.gradients import Method


class Plan(NamedTuple):
  """How trials are shared out.

  Attributes:
    devices: that run them, side by side.
    lanes: trials that each runs at once; 0 for an attack that takes no step.
  """

  devices: tuple[jax.Device, ...]
  lanes: int


def plan(
  tasks: Sequence[Task],
  *,
  lanes: int | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Plan:
  """Returns how `run` would share out trials.

  It depends on all trials of the tasks, not on which of them are left, so that a run that goes
  on has the lanes that it had.

  Args:
    tasks: as in `run`.
    lanes: as in `run`.
    devices: as in `run`.

  Raises:
    InputError: see `run`.
  """
  tasks = _check_tasks(tasks)
  trials = sum(len(task.observations) * task.restarts for task in tasks)
  devices = tuple(devices or jax.local_devices())[:trials]
  if tasks[0].attack.max_iterations == 0:
    return Plan(devices[:1], 0)
  if lanes is None:
    lanes = choose_lanes(tasks[0].attack.model, tasks[0].observations[0], trials, devices)
  return Plan(devices, min(lanes, -(-trials // len(devices))))


def run(
  tasks: Sequence[Task] | Task,
  *,
  lanes: int | None = None,
  chunk: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  checkpoint_path: pathlib.Path | None = None,
  checkpoint_seconds: float = 30.0,
  matching: Method = "auto",
  record: Sequence[int] = (),
  on_progress: Callable[[Progress], None] = lambda progress: None,
  say: Callable[[str], None] = print,
) -> Iterator[Trial]:
  """Runs attacks on many observations, many trials at once.

  One compiled program runs all tasks, and their trials fill the lanes together. So the attacks
  may differ in numbers and dropout rates alone (see `jaxdia.attacks.same_program`), the
  observations in all but shapes. Lanes of a device share the params: trials on others run on
  other devices, or when it is free. Calls of one form are compiled once in a process.

  Trials are the same, bit for bit, for the same number of lanes, devices and clients and the same
  `matching`. Other numbers give others but for rounding, which a long search in float32 amplifies.

  Args:
    tasks: what to run, or the only one.
    lanes: trials that a device runs at once, fewer if they do not fit into its
      memory; see `choose_lanes` if None.
    chunk: steps between two looks at the lanes; if None, as many as take about a
      second. It changes no result.
    devices: all local ones if None, but no more than there are trials.
    checkpoint_path: where running trials are saved, and found again; the file is
      removed at the end.
    checkpoint_seconds: how often.
    matching: how gradients are compared; see `jaxdia.gradients.choose_layers`.
    record: numbers of iterations after which the best images are kept; see
      `recorded_iterations`.
    on_progress: called once a chunk.
    say: called with what a person should read.

  Returns:
    An iterator that yields each trial as it ends, and runs them meanwhile.

  Raises:
    InputError: there is nothing to attack, the tasks cannot share a program, an attack is not
      told what it needs, the checkpoint is of another run, or not even one trial fits into the
      memory.
  """
  tasks = _check_tasks(tasks)
  by_number = {i if task.number is None else task.number: task for i, task in enumerate(tasks)}
  jobs = [
    Job(observation, restart, number)
    for number, task in by_number.items()
    for observation in range(len(task.observations))
    for restart in range(task.restarts)
  ]
  finished = {Job(*pair, number) for number, task in by_number.items() for pair in task.finished}
  if tasks[0].attack.max_iterations == 0:
    return _run_without_steps(by_number, [job for job in jobs if job not in finished])
  shared = plan(tasks, lanes=lanes, devices=devices)
  loop = Loop(by_number, shared.devices, chunk, matching, sorted(record))
  lanes = min(shared.lanes, loop.most_on_a_device(jobs))
  saving = (checkpoint_path, checkpoint_seconds)
  return _run(loop, jobs, finished, lanes, saving, on_progress, say)


def _run_without_steps(tasks: dict[int, Task], jobs: Sequence[Job]) -> Iterator[Trial]:
  """Yields the trials of attacks that have ended after `init`."""
  for job in jobs:
    task = tasks[job.task]
    told = told_of(task, job.observation)
    observation = task.observations[job.observation]
    state = task.attack.init(trial_key(task.key, job), observation, told)
    best = jax.device_get(state.best)
    status = Status(int(state.status))
    yield Trial(job, best.candidate, float(best.objective), float(best.distance), 0, 0, status, 0.0)


def _run(
  loop: Loop,
  jobs: Sequence[Job],
  finished: set[Job],
  lanes: int,
  saving: tuple[pathlib.Path | None, float],
  on_progress: Callable[[Progress], None],
  say: Callable[[str], None],
) -> Iterator[Trial]:
  checkpoint_path, checkpoint_seconds = saving
  queue = collections.deque(job for job in jobs if job not in finished)
  clients = loop.count_clients(jobs)
  done_steps, halved = [], None
  saved = time.monotonic()
  while queue or loop.jobs or loop.postponed:
    if not queue and not loop.jobs:  # what is left needs a program of its own
      queue = collections.deque(loop.postponed)
      loop.postponed.clear()
      loop.stop()
    try:
      if not loop.started:
        forget_programs()
        loop.start(lanes, clients, queue[0])
        if checkpoint_path is not None:
          queue = loop.resume(checkpoint_path, queue)
        done_before = len(finished) - len(done_steps)
      loop.fill(queue)
      gauge = loop.advance()
    except jax.errors.JaxRuntimeError as error:
      halved = halve_lanes(lanes, error)
      say(f"out of memory with {lanes} lanes a device; going on with {halved}")
      lanes = halved
      loop.stop()
      loop.postponed.clear()
      queue = collections.deque(job for job in jobs if job not in finished)
      continue
    for place in loop.ended(gauge):
      trial = loop.take(place, gauge)
      done_steps.append(trial.iterations)
      finished.add(trial.job)
      yield trial
    running = list(loop.jobs)
    running_steps = sum(int(gauge.iteration[p]) for p in running)
    on_progress(
      Progress(
        iteration=max((int(gauge.iteration[p]) for p in running), default=0),
        objective=min((float(gauge.objective[p]) for p in running), default=float("nan")),
        finished=done_before + len(done_steps),
        total=len(jobs),
        steps=sum(done_steps) + running_steps - loop.resumed_steps,
        running_steps=running_steps,
        max_iterations=loop.max_iterations,
        mean_steps=float(np.mean(done_steps)) if done_steps else float("nan"),
        compile_seconds=loop.compile_seconds,
        run_seconds=loop.run_seconds,
        task_seconds=dict(loop.task_seconds),
        halved=halved,
      )
    )
    if checkpoint_path is not None and time.monotonic() - saved >= checkpoint_seconds:
      loop.save(checkpoint_path)
      saved = time.monotonic()
  if checkpoint_path is not None:
    checkpoint_path.unlink(missing_ok=True)


def _check_tasks(tasks: Sequence[Task] | Task) -> list[Task]:
  tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
  if jax.process_count() > 1:
    raise InputError(
      f"this is one of {jax.process_count()} processes of jax.distributed, each of which would run"
      " all trials. Run the engine in one process, or give each its own share of the observations."
    )
  if not jax.sharding.get_abstract_mesh().empty:
    raise InputError(
      "a mesh is set, over which JAX would spread what belongs to one device. Call the engine"
      " outside of jax.set_mesh; it shares out its trials over the devices by itself."
    )
  counts = [(len(task.observations), task.restarts) for task in tasks]
  if not counts or min(min(pair) for pair in counts) < 1:
    pairs = ", ".join(f"{n} observations and {restarts} restarts" for n, restarts in counts)
    raise InputError(f"got {pairs or 'no tasks'}; expected at least one of each.")
  first = tasks[0]
  like = _form(first.observations[0])
  for number, task in enumerate(tasks):
    if not same_program(first.attack, task.attack):
      raise InputError(
        f"task {number} needs another program than the first: its network or what its attack"
        " leaves free differs. Run it in a call of its own."
      )
    for what, given in (("masks", task.masks), ("parts", task.parts)):
      if given is not None and len(given) != len(task.observations):
        raise InputError(
          f"task {number} has {len(given)} {what} for {len(task.observations)} observations;"
          " expected one for each."
        )
    if isinstance(task.observations, (list, tuple)):  # others are seen when they are attacked
      for i, observation in enumerate(task.observations):
        if _form(observation) != like:
          raise InputError(
            f"observation {i} of task {number} has another batch size, loss or defence, or"
            " params, statistics or labels of other shapes, than the first of all. Run it in a call"
            " of its own."
          )
    # An attack that lacks something says so here, not in the middle of a run.
    if len(set(task.finished)) < len(task.observations) * task.restarts:
      told = told_of(task, 0)
      jax.eval_shape(init_trial, task.attack, task.key, task.observations[0], told)
  return tasks


def _form(observation: Observation) -> tuple:
  """Returns what observations must have in common, besides gradients of one form."""
  names = ("params", "mean", "std", "labels", "averages", "local")
  rest = [getattr(observation, name) for name in names]
  leaves, structure = jax.tree.flatten(shapes_of(rest))
  defence = jax.tree.structure(observation.defence)  # its numbers may differ
  return observation.batch_size, observation.loss, defence, structure, tuple(leaves)
