"""What the engine is given to run, and what comes of it."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Attack, Candidate, Status
from jaxdia.client import Observation
from jaxdia.closed_form import Parts, Recovery
from jaxdia.core.types import Images, Key, Masks

# Images of a trial that are recorded, at most.
RECORDED = 36


class Task(NamedTuple):
  """An attack on some observations.

  Attributes:
    key: random key; a trial's own key is folded from it by observation and restart, so results
      do not depend on lanes, devices or other tasks, but for rounding.
    attack: what to run.
    observations: of one model and batch size, all at the same params. One is asked for when it is
      attacked, so they may be computed then; tasks on the same sequence share what is computed.
    restarts: number of trials for each observation.
    masks: the client's masks for each observation, if the attack knows them.
    parts: of `attack.recover` for each observation, or what it returned, if the attack starts
      from that.
    finished: (observation, restart) of the trials that are left out.
    number: by which its jobs are known, in a checkpoint too; its place among the tasks if None.
  """

  key: Key
  attack: Attack
  observations: Sequence[Observation]
  restarts: int = 1
  masks: Sequence[Masks] | None = None
  parts: Sequence[Parts | Recovery] | None = None
  finished: Collection[tuple[int, int]] = ()
  number: int | None = None


class Job(NamedTuple):
  """One trial to be run: the index of an observation and of its restart, and the task's number."""

  observation: int
  restart: int
  task: int = 0


class Trial(NamedTuple):
  """A finished trial.

  Attributes:
    job: which one.
    candidate: the best point; arrays on the host.
    objective: there.
    distance: of the gradients there.
    iterations: steps taken in all.
    best_iteration: the step that measured the best point, from 0.
    status: why it ended.
    seconds: from its start to the end of the chunk (about a second) in which it
      ended, without compilation. Trials in other lanes ran at the same time.
    recording: {iterations: f[B, H, W, C]}, the best images after so many, as far as it came.
  """

  job: Job
  candidate: Candidate
  objective: float
  distance: float
  iterations: int
  best_iteration: int
  status: Status
  seconds: float
  recording: dict[int, Images] = {}


class Progress(NamedTuple):
  """How far a run is, once a chunk.

  Attributes:
    iteration: steps of the trial that is furthest on among the running ones.
    objective: the least best objective among the running trials; NaN if none runs.
    finished: number of finished trials.
    total: number of all trials.
    steps: steps that this call took in all trials.
    running_steps: steps of the running trials, taken before included.
    max_iterations: after which a trial ends at the latest.
    mean_steps: mean over the trials that this call finished; NaN if none.
    compile_seconds: time spent compiling.
    run_seconds: time spent computing.
    task_seconds: {number: of these, those of a task}, by its share of the running trials.
    halved: lanes a device that were left when memory was short; None if it never was.
  """

  iteration: int
  objective: float
  finished: int
  total: int
  steps: int
  running_steps: int
  max_iterations: int
  mean_steps: float
  compile_seconds: float
  run_seconds: float
  task_seconds: dict[int, float]
  halved: int | None = None


def recorded_iterations(max_iterations: int) -> tuple[int, ...]:
  """Returns numbers of iterations that show how a reconstruction forms, each a little larger.

  Args:
    max_iterations: the last one; of none nothing is recorded.
  """
  if not max_iterations:
    return ()
  return tuple(np.unique(np.geomspace(1, max_iterations, RECORDED).round().astype(int)).tolist())


def trial_key(key: Key, job: Job) -> Key:
  """Returns the key of a trial, which depends on nothing but its observation and restart.

  Args:
    key: of the task.
    job: the trial.
  """
  return jax.random.fold_in(jax.random.fold_in(key, job.observation), job.restart)
