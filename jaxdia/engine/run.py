"""The door of the engine: tasks go in, finished trials come out."""

import collections
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Status
from jaxdia.core.errors import InputError, check_count, check_number, unknown
from jaxdia.core.machine import forget_programs
from jaxdia.core.transfers import each_with_transfers, with_transfers
from jaxdia.engine.capacity import choose_lanes, halve_lanes
from jaxdia.engine.checks import check_tasks
from jaxdia.engine.jobs import Job, Progress, Task, Trial, trial_key
from jaxdia.engine.loop import Loop, told_of
from jaxdia.gradients import METHODS, Method


class Plan(NamedTuple):
  """How trials are shared out.

  Attributes:
    devices: that run them, side by side.
    lanes: trials that each runs at once; 0 for an attack that takes no step.
  """

  devices: tuple[jax.Device, ...]
  lanes: int


@with_transfers
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
  return _share_out(check_tasks(tasks), lanes, devices)


def _share_out(
  tasks: Sequence[Task], lanes: int | None, devices: Sequence[jax.Device] | None
) -> Plan:
  if lanes is not None:
    lanes = check_count("lanes of a run", lanes, 1)
  devices = [devices] if isinstance(devices, jax.Device) else devices
  if devices is not None and (
    not isinstance(devices, Sequence)
    or not all(isinstance(device, jax.Device) for device in devices)
  ):
    raise InputError(f"devices is {devices!r}; expected those of JAX, such as jax.devices()[:1].")
  trials = sum(len(task.observations) * task.restarts for task in tasks)
  devices = tuple(devices or jax.local_devices())[:trials]
  if tasks[0].attack.max_iterations == 0:
    return Plan(devices[:1], 0)
  if lanes is None:
    lanes = choose_lanes(tasks[0].attack.model, tasks[0].observations[0], trials, devices)
  return Plan(devices, min(lanes, -(-trials // len(devices))))


@with_transfers
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
  may differ in numbers and dropout rates alone, the observations in all but shapes (see
  `jaxdia.attacks.program_of`). Lanes of a device share the params: trials on others run on
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
  tasks = check_tasks(tasks)
  if chunk is not None:
    chunk = check_count("chunk of a run", chunk, 1)
  if matching not in METHODS:
    raise unknown("way to match gradients:", matching, METHODS)
  seconds = (lambda value: value >= 0), "a number of at least 0"
  checkpoint_seconds = check_number("checkpoint_seconds", checkpoint_seconds, *seconds)
  record = [check_count("a recorded iteration", iteration, 0) for iteration in record]
  if checkpoint_path is not None:
    checkpoint_path = pathlib.Path(checkpoint_path)
  numbers = [i if task.number is None else task.number for i, task in enumerate(tasks)]
  if len(set(numbers)) < len(numbers):
    raise InputError(
      f"the tasks have the numbers {numbers}; expected that each has one of its own, by which its"
      " trials are known. Leave number out."
    )
  by_number = dict(zip(numbers, tasks, strict=True))
  jobs = [
    Job(observation, restart, number)
    for number, task in by_number.items()
    for observation in range(len(task.observations))
    for restart in range(task.restarts)
  ]
  finished = {Job(*pair, number) for number, task in by_number.items() for pair in task.finished}
  if tasks[0].attack.max_iterations == 0:
    left = [job for job in jobs if job not in finished]
    return each_with_transfers(_run_without_steps(by_number, left))
  shared = _share_out(tasks, lanes, devices)
  loop = Loop(by_number, shared.devices, chunk, matching, sorted(record))
  lanes = min(shared.lanes, loop.most_on_a_device(jobs))
  saving = (checkpoint_path, checkpoint_seconds)
  return each_with_transfers(_run(loop, jobs, finished, lanes, saving, on_progress, say))


def _run_without_steps(tasks: dict[int, Task], jobs: Sequence[Job]) -> Generator[Trial, None, None]:
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
) -> Generator[Trial, None, None]:
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
