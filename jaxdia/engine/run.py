"""The door of the engine: tasks go in, finished trials come out."""

import collections
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxdia.client import Observation
from jaxdia.core.errors import InputError
from jaxdia.engine.capacity import choose_lanes, halve_lanes
from jaxdia.engine.jobs import Job, Progress, Task, Trial
from jaxdia.engine.loop import Loop
from jaxdia.matching import Method


def run(
  tasks: Sequence[Task],
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
  may differ in numbers and dropout rates alone (see `Attack.shares_program`), the observations in
  all but shapes. Lanes of a device share the params: trials on others run on other devices, or
  when it is free.

  Args:
    tasks: what to run.
    lanes: trials that a device runs at once, fewer if they do not fit into its
      memory; see `choose_lanes` if None.
    chunk: steps between two looks at the lanes; if None, as many as take about a
      second.
    devices: all local ones if None, but no more than there are trials.
    checkpoint_path: where running trials are saved, and found again; the file is
      removed at the end.
    checkpoint_seconds: how often.
    matching: how gradients are compared; see `jaxdia.matching.choose_layers`.
    record: numbers of iterations after which the best images are kept; see
      `recorded_iterations`.
    on_progress: called once a chunk.
    say: called with what a person should read.

  Yields:
    Each trial as it ends.

  Raises:
    InputError: there is nothing to attack, the tasks cannot share a program, the checkpoint
      cannot be used, or not even one trial fits into the memory.
  """
  _check_tasks(tasks)
  by_number = {i if task.number is None else task.number: task for i, task in enumerate(tasks)}
  jobs = [
    Job(victim, restart, number)
    for number, task in by_number.items()
    for victim in range(len(task.observations))
    for restart in range(task.restarts)
  ]
  finished = {Job(*pair, number) for number, task in by_number.items() for pair in task.finished}
  queue = collections.deque(job for job in jobs if job not in finished)
  if not queue:
    _remove(checkpoint_path)
    return
  # All of these from all jobs, not from those that are left, so that a resumed run finds its lanes.
  devices = list(devices or jax.local_devices())[: len(jobs)]
  loop = Loop(by_number, devices, chunk, matching, sorted(record))
  if lanes is None:
    lanes = choose_lanes(tasks[0].attack.model, tasks[0].observations[0], len(jobs), devices)
  lanes = min(lanes, -(-len(jobs) // len(devices)), loop.most_on_a_device(jobs))
  done_steps = []
  saved = time.monotonic()
  while queue or loop.jobs:
    try:
      if not loop.started:
        loop.start(lanes, queue[0])
        if checkpoint_path is not None:
          queue = loop.resume(checkpoint_path, queue)
        done_before = len(jobs) - len(queue) - len(loop.jobs) - len(done_steps)
      loop.fill(queue)
      gauge = loop.advance()
    except jax.errors.JaxRuntimeError as error:
      fewer = halve_lanes(lanes, error)
      say(f"out of memory with {lanes} lanes a device; going on with {fewer}")
      lanes = fewer
      loop.stop()
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
        mean_steps=float(np.mean(done_steps)) if done_steps else float("nan"),
        compile_seconds=loop.compile_seconds,
        run_seconds=loop.run_seconds,
        task_seconds=dict(loop.task_seconds),
      )
    )
    if checkpoint_path is not None and time.monotonic() - saved >= checkpoint_seconds:
      loop.save(checkpoint_path)
      saved = time.monotonic()
  _remove(checkpoint_path)


def _check_tasks(tasks: Sequence[Task]) -> None:
  counts = [(len(task.observations), task.restarts) for task in tasks]
  if not counts or min(min(pair) for pair in counts) < 1:
    pairs = ", ".join(f"{n} observations and {restarts} restarts" for n, restarts in counts)
    raise InputError(f"got {pairs or 'no tasks'}; expected at least one of each.")
  first = tasks[0]
  like = _form(first.observations[0])
  for number, task in enumerate(tasks):
    if not first.attack.shares_program(task.attack):
      raise InputError(
        f"task {number} needs another program than the first: its network or what its attack"
        " leaves free differs. Run it in a call of its own."
      )
    for i, observation in enumerate(task.observations):
      if _form(observation) != like:
        raise InputError(
          f"observation {i} of task {number} has another batch size, or params, statistics or"
          " labels of other shapes, than the first of all. Run it in a call of its own."
        )


def _form(observation: Observation):
  """Returns what observations must have in common besides what `prepare_alike` sees to."""
  rest = (observation.params, observation.mean, observation.std, observation.labels)
  forms = jax.tree.map(lambda x: (x.shape, x.dtype), rest)
  return observation.batch_size, forms, jax.tree.structure(rest)


def _remove(path: pathlib.Path | None) -> None:
  if path is not None:
    path.unlink(missing_ok=True)
