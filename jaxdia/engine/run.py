"""The host loop: jobs go into lanes, finished trials come out."""

import collections
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdia.attacks import Attack, Candidate, Status
from jaxdia.client import Observation
from jaxdia.engine import checkpoint
from jaxdia.engine.lanes import Gauge, LaneProgram, create_program
from jaxdia.errors import InputError
from jaxdia.matching import Method, prepare_alike, suits
from jaxdia.models import DropoutModel
from jaxdia.typing import Key, Masks

# Device memory that the lanes may take where their number is not set.
_LANE_MEMORY = 4 * 2**30
_MAX_LANES = 16
# The host looks at the lanes about so often.
_CHUNK_SECONDS = 1.0
_MAX_CHUNK = 1_000


class Job(NamedTuple):
  """One trial to be run: the index of an observation, and of its restart."""

  victim: int
  restart: int


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
  """

  job: Job
  candidate: Candidate
  objective: float
  distance: float
  iterations: int
  best_iteration: int
  status: Status
  seconds: float


class Progress(NamedTuple):
  """How far a run is, once a chunk.

  Attributes:
    iteration: steps of the trial that is furthest on among the running ones.
    objective: the least best objective among the running trials; NaN if none runs.
    finished: number of finished trials.
    total: number of all trials.
    steps: steps that this call took in all trials.
    running_steps: steps of the running trials, taken before included.
    mean_steps: mean over the trials that this call finished; NaN if none.
    compile_seconds: time spent compiling.
    run_seconds: time spent computing.
  """

  iteration: int
  objective: float
  finished: int
  total: int
  steps: int
  running_steps: int
  mean_steps: float
  compile_seconds: float
  run_seconds: float


def trial_key(key: Key, job: Job) -> Key:
  """Returns the key of a trial, which depends on nothing but its job."""
  return jax.random.fold_in(jax.random.fold_in(key, job.victim), job.restart)


def choose_lanes(model: DropoutModel, observation: Observation, jobs: int, devices: int) -> int:
  """Returns a number of lanes a device that suits the jobs and the memory.

  Args:
    model: the client's network.
    observation: one of those that are attacked.
    jobs: number of trials.
    devices: number of devices.
  """
  masks = model.mask_shapes(observation.batch_size)
  entries = sum(int(np.prod(shape)) for shape in masks.values())
  params = sum(leaf.size for leaf in jax.tree.leaves(observation.params))
  # At worst a lane holds its target and about four arrays like the parameters for the dummy
  # gradient and its derivative; and about eight arrays like the masks for the search.
  lane_bytes = 4 * (5 * params + 8 * entries)
  return max(1, min(-(-jobs // devices), _MAX_LANES, _LANE_MEMORY // lane_bytes))


def run(
  key: Key,
  attack: Attack,
  observations: Sequence[Observation],
  *,
  restarts: int = 1,
  masks: Sequence[Masks] | None = None,
  lanes: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  finished: Collection[Job] = (),
  checkpoint_path: pathlib.Path | None = None,
  checkpoint_seconds: float = 30.0,
  matching: Method = "auto",
  on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Trial]:
  """Runs an attack on many observations, many trials at once.

  Args:
    key: random key; a trial's own key is folded from it by victim and restart,
      so results do not depend on lanes or devices.
    attack: what to run.
    observations: of one model and batch size; they share their params.
    restarts: number of trials for each observation.
    masks: the client's masks for each observation, if the attack knows them.
    lanes: trials that a device runs at once; chosen from the memory if None.
    devices: all local ones if None.
    finished: jobs that are left out.
    checkpoint_path: where running trials are saved, and found again; the file is
      removed at the end.
    checkpoint_seconds: how often.
    matching: how gradients are compared; see `jaxdia.matching.choose_layers`.
    on_progress: called once a chunk.

  Yields:
    Each trial as it ends.

  Raises:
    InputError: there is nothing to attack, or the checkpoint cannot be used.
  """
  if not observations or restarts < 1:
    raise InputError(
      f"got {len(observations)} observations and {restarts} restarts; expected at least one of"
      " each."
    )
  devices = list(devices or jax.local_devices())
  jobs = [Job(v, r) for v in range(len(observations)) for r in range(restarts)]
  finished = set(finished)
  queue = collections.deque(job for job in jobs if job not in finished)
  if not queue:
    _remove(checkpoint_path)
    return
  if lanes is None:
    # From all jobs, not from those that are left, so that a resumed run finds its lanes.
    lanes = choose_lanes(attack.model, observations[0], len(jobs), len(devices))
  _check_alike(observations)
  method = suits(attack.settings.distance, matching)
  observations = prepare_alike(attack.model, list(observations), method)
  program = create_program(
    attack, observations[0], masks[0] if masks is not None else None, lanes, devices
  )
  loop = _Loop(program, key, observations, masks)
  if checkpoint_path is not None:
    queue = loop.resume(checkpoint_path, queue)
  saved = time.monotonic()
  done_before = len(jobs) - len(queue) - len(loop.jobs)
  done_steps = []
  while queue or loop.jobs:
    loop.fill(queue)
    gauge = loop.advance()
    for place in loop.ended(gauge):
      trial = loop.take(place, gauge)
      done_steps.append(trial.iterations)
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
      )
    )
    if checkpoint_path is not None and time.monotonic() - saved >= checkpoint_seconds:
      loop.save(checkpoint_path)
      saved = time.monotonic()
  _remove(checkpoint_path)


def _check_alike(observations: Sequence[Observation]) -> None:
  first = observations[0]
  for i, other in enumerate(observations):
    shared = [(o.params, o.mean, o.std) for o in (first, other)]
    same = jax.tree.structure(shared[0]) == jax.tree.structure(shared[1]) and all(
      a is b or np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, shared), strict=True)
    )
    if not same or first.batch_size != other.batch_size:
      raise InputError(
        f"observation {i} has other params, statistics or batch size than the first; all must"
        " share them. Run the others in a call of their own."
      )


def _remove(path: pathlib.Path | None) -> None:
  if path is not None:
    path.unlink(missing_ok=True)


class _Loop:
  """The lanes with their jobs, and the times that they took."""

  def __init__(
    self,
    program: LaneProgram,
    key: Key,
    observations: Sequence[Observation],
    masks: Sequence[Masks] | None,
  ):
    self._program = program
    self._key = key
    self._observations = observations
    self._masks = masks
    self._lanes = program.empty()
    self._chunk = 1
    self._compiled = False
    self._started: dict[tuple[int, int], float] = {}  # run_seconds at which a job began
    self.jobs: dict[tuple[int, int], Job] = {}  # (device, lane) -> job
    self.compile_seconds = 0.0
    self.run_seconds = 0.0
    self.resumed_steps = 0

  def _load(self, place, job):
    masks = self._masks[job.victim] if self._masks is not None else None
    self._lanes = self._program.load(
      self._lanes, *place, trial_key(self._key, job), self._observations[job.victim], masks
    )
    self.jobs[place] = job
    self._started[place] = self.run_seconds

  def fill(self, queue: collections.deque[Job]) -> None:
    """Puts waiting jobs into free lanes, device by device."""
    num_devices, num_lanes = self._program.shape
    places = [(d, lane) for lane in range(num_lanes) for d in range(num_devices)]
    for place in places:
      if queue and place not in self.jobs:
        self._load(place, queue.popleft())

  def advance(self) -> Gauge:
    """Runs one chunk, of a length that takes about `_CHUNK_SECONDS`."""
    if not self._compiled:  # no steps: only compiles
      start = time.monotonic()
      self._lanes, _ = self._program.advance(self._lanes, 0)
      self.compile_seconds += time.monotonic() - start
      self._compiled = True
    start = time.monotonic()
    self._lanes, gauge = self._program.advance(self._lanes, self._chunk)
    seconds = time.monotonic() - start
    self.run_seconds += seconds
    wanted = self._chunk * _CHUNK_SECONDS / max(seconds, 1e-9)
    self._chunk = int(np.clip(wanted, 1, min(2 * self._chunk, _MAX_CHUNK)))
    return gauge

  def ended(self, gauge: Gauge) -> list[tuple[int, int]]:
    """Returns the places whose trials have ended."""
    return [place for place in self.jobs if gauge.status[place] != Status.RUNNING]

  def take(self, place: tuple[int, int], gauge: Gauge) -> Trial:
    """Takes a finished trial out of its lane."""
    best = self._program.read(self._lanes, *place)
    return Trial(
      job=self.jobs.pop(place),
      candidate=best.candidate,
      objective=float(best.objective),
      distance=float(best.distance),
      iterations=int(gauge.iteration[place]),
      best_iteration=int(best.iteration),
      status=Status(int(gauge.status[place])),
      seconds=self.run_seconds - self._started.pop(place),
    )

  def _checkpoint(self):
    jobs = np.full((*self._program.shape, 2), -1, np.int32)
    seconds = np.zeros(self._program.shape, np.float64)
    for place, job in self.jobs.items():
      jobs[place] = job
      seconds[place] = self.run_seconds - self._started[place]
    return {"jobs": jobs, "seconds": seconds, "state": self._lanes.state}

  def save(self, path: pathlib.Path) -> None:
    """Saves the running trials."""
    checkpoint.save(path, self._checkpoint())

  def resume(self, path: pathlib.Path, queue: collections.deque[Job]) -> collections.deque[Job]:
    """Puts saved trials that are still wanted into lanes; returns the other jobs.

    The lanes need not be those that were saved: what finds no place starts anew.
    """
    saved = checkpoint.restore(path, self._checkpoint(), lane_axes=2)
    if saved is None:
      return queue
    waiting = set(queue)  # a trial may have ended, and been kept, after the checkpoint
    places = np.ndindex(self._program.shape)
    state = jax.tree.map(np.array, jax.device_get(self._lanes.state))
    for source in np.ndindex(saved["seconds"].shape):
      job = Job(*map(int, saved["jobs"][source]))
      if job not in waiting or (place := next(places, None)) is None:
        continue
      self._load(place, job)
      self._started[place] = -float(saved["seconds"][source])
      for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(saved["state"]), strict=True):
        new[place] = old[source]
      self.resumed_steps += int(state.iteration[place])
    self._lanes = self._program.restore(self._lanes, state)
    resumed = set(self.jobs.values())
    return collections.deque(job for job in queue if job not in resumed)
