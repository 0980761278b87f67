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
from jaxdia.closed_form import Parts
from jaxdia.engine import checkpoint
from jaxdia.engine.capacity import RECORDED, choose_lanes, halve_lanes
from jaxdia.engine.lanes import Gauge, Given, create_program
from jaxdia.errors import InputError
from jaxdia.matching import Method, prepare_alike, suits
from jaxdia.typing import Key, Masks

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
  recording: dict[int, np.ndarray] = {}


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


def recorded_iterations(max_iterations: int, count: int = RECORDED) -> tuple[int, ...]:
  """Returns numbers of iterations that show how a reconstruction forms, each a little larger.

  Args:
    max_iterations: the last one.
    count: how many, at most.
  """
  return tuple(np.unique(np.geomspace(1, max_iterations, count).round().astype(int)).tolist())


def trial_key(key: Key, job: Job) -> Key:
  """Returns the key of a trial, which depends on nothing but its job."""
  return jax.random.fold_in(jax.random.fold_in(key, job.victim), job.restart)


def run(
  key: Key,
  attack: Attack,
  observations: Sequence[Observation],
  *,
  restarts: int = 1,
  masks: Sequence[Masks] | None = None,
  parts: Sequence[Parts] | None = None,
  lanes: int | None = None,
  chunk: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  finished: Collection[Job] = (),
  checkpoint_path: pathlib.Path | None = None,
  checkpoint_seconds: float = 30.0,
  matching: Method = "auto",
  record: Sequence[int] = (),
  on_progress: Callable[[Progress], None] = lambda progress: None,
  say: Callable[[str], None] = print,
) -> Iterator[Trial]:
  """Runs an attack on many observations, many trials at once.

  Args:
    key: random key; a trial's own key is folded from it by victim and restart,
      so results do not depend on lanes or devices.
    attack: what to run.
    observations: of one model and batch size; they share their params.
    restarts: number of trials for each observation.
    masks: the client's masks for each observation, if the attack knows them.
    parts: of `jaxdia.closed_form.recover` for each observation, if the attack starts
      from them.
    lanes: trials that a device runs at once, fewer if they do not fit into its
      memory; see `choose_lanes` if None.
    chunk: steps between two looks at the lanes; if None, as many as take about a
      second.
    devices: all local ones if None, but no more than there are trials.
    finished: jobs that are left out.
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
    InputError: there is nothing to attack, the checkpoint cannot be used, or not
      even one trial fits into the memory.
  """
  if not observations or restarts < 1:
    raise InputError(
      f"got {len(observations)} observations and {restarts} restarts; expected at least one of"
      " each."
    )
  jobs = [Job(v, r) for v in range(len(observations)) for r in range(restarts)]
  finished = set(finished)
  queue = collections.deque(job for job in jobs if job not in finished)
  if not queue:
    _remove(checkpoint_path)
    return
  _check_alike(observations)
  # All of these from all jobs, not from those that are left, so that a resumed run finds its lanes.
  devices = list(devices or jax.local_devices())[: len(jobs)]
  if lanes is None:
    lanes = choose_lanes(attack.model, observations[0], len(jobs), devices)
  lanes = min(lanes, -(-len(jobs) // len(devices)))
  given = [Given(masks and masks[i], parts and parts[i]) for i in range(len(observations))]
  loop = _Loop(key, attack, observations, given, devices, chunk, matching, sorted(record))
  done_steps = []
  saved = time.monotonic()
  while queue or loop.jobs:
    try:
      if not loop.started:
        loop.start(lanes)
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
    key: Key,
    attack: Attack,
    observations: Sequence[Observation],
    given: Sequence[Given],
    devices: Sequence[jax.Device],
    chunk: int | None,
    matching: Method,
    recorded: Sequence[int],
  ):
    start = time.monotonic()
    method = suits(attack.settings.distance, matching)
    self._observations = prepare_alike(attack.model, list(observations), method)
    self._key = key
    self._attack = attack
    self._given = given
    self._devices = devices
    self._fixed_chunk = chunk
    self._recorded = recorded
    self.compile_seconds = 0.0
    self.run_seconds = time.monotonic() - start
    self.resumed_steps = 0
    self.started = False
    self.jobs: dict[tuple[int, int], Job] = {}  # (device, lane) -> job

  def start(self, lanes: int) -> None:
    """Makes lanes, with no job in them."""
    start = time.monotonic()
    first, given = self._observations[0], self._given[0]
    slots = min(lanes, len(self._observations))
    self._victims: dict[tuple[int, int], int] = {}  # (device, slot) -> victim
    self._program = create_program(
      self._attack, first, given, lanes, slots, self._devices, self._recorded
    )
    self._lanes = self._program.empty()
    # Each compiled function once, without a step, so that none is compiled in the run.
    self._place(0, 0, 0)
    self._lanes = self._program.load(self._lanes, 0, 0, 0, trial_key(self._key, Job(0, 0)), given)
    self._lanes, _ = self._program.advance(self._lanes, 0)
    self._program.read(self._lanes, 0, 0)
    self._victims.clear()
    self._lanes = None
    self._lanes = self._program.empty()
    self.compile_seconds += time.monotonic() - start
    self._chunk = self._fixed_chunk or 1
    self._began: dict[tuple[int, int], float] = {}  # place -> run_seconds when its job began
    self.started = True

  def stop(self) -> None:
    """Gives up the lanes, and what was in them."""
    self.jobs.clear()
    self._program = self._lanes = None
    self.resumed_steps = 0
    self.started = False

  def _place(self, device, slot, victim):
    self._lanes = self._program.place(self._lanes, device, slot, self._observations[victim])
    self._victims[device, slot] = victim

  def _slot(self, device, victim) -> int:
    """Returns where on a device a victim is, or is put now."""
    here = [self._victims.get((device, slot)) for slot in range(self._program.num_slots)]
    if victim in here:
      return here.index(victim)
    # There are as many slots as victims, or as lanes, so one is free.
    needed = {job.victim for (d, _), job in self.jobs.items() if d == device}
    slot = next(slot for slot, other in enumerate(here) if other not in needed)
    self._place(device, slot, victim)
    return slot

  def _load(self, place, job):
    slot = self._slot(place[0], job.victim)
    key = trial_key(self._key, job)
    self._lanes = self._program.load(self._lanes, *place, slot, key, self._given[job.victim])
    self.jobs[place] = job
    self._began[place] = self.run_seconds

  def fill(self, queue: collections.deque[Job]) -> None:
    """Puts waiting jobs into free lanes, device by device."""
    num_devices, num_lanes = self._program.shape
    places = [(d, lane) for lane in range(num_lanes) for d in range(num_devices)]
    for place in places:
      if queue and place not in self.jobs:
        self._load(place, queue.popleft())

  def advance(self) -> Gauge:
    """Runs one chunk, if not set then of a length that takes about `_CHUNK_SECONDS`."""
    start = time.monotonic()
    self._lanes, gauge = self._program.advance(self._lanes, self._chunk)
    seconds = time.monotonic() - start
    self.run_seconds += seconds
    if self._fixed_chunk is None:
      wanted = self._chunk * _CHUNK_SECONDS / max(seconds, 1e-9)
      self._chunk = int(np.clip(wanted, 1, min(2 * self._chunk, _MAX_CHUNK)))
    return gauge

  def ended(self, gauge: Gauge) -> list[tuple[int, int]]:
    """Returns the places whose trials have ended."""
    return [place for place in self.jobs if gauge.status[place] != Status.RUNNING]

  def take(self, place: tuple[int, int], gauge: Gauge) -> Trial:
    """Takes a finished trial out of its lane."""
    best, recording = self._program.read(self._lanes, *place)
    iterations = int(gauge.iteration[place])
    return Trial(
      job=self.jobs.pop(place),
      candidate=best.candidate,
      objective=float(best.objective),
      distance=float(best.distance),
      iterations=iterations,
      best_iteration=int(best.iteration),
      status=Status(int(gauge.status[place])),
      seconds=self.run_seconds - self._began.pop(place),
      recording={n: x for n, x in zip(self._recorded, recording, strict=True) if n <= iterations},
    )

  def _checkpoint(self):
    jobs = np.full((*self._program.shape, 2), -1, np.int32)
    seconds = np.zeros(self._program.shape, np.float64)
    for place, job in self.jobs.items():
      jobs[place] = job
      seconds[place] = self.run_seconds - self._began[place]
    lanes = {"state": self._lanes.state, "recording": self._lanes.recording}
    return {"jobs": jobs, "seconds": seconds} | lanes

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
    lanes = jax.tree.map(np.array, jax.device_get((self._lanes.state, self._lanes.recording)))
    old_lanes = (saved["state"], saved["recording"])
    for source in np.ndindex(saved["seconds"].shape):
      job = Job(*map(int, saved["jobs"][source]))
      if job not in waiting or (place := next(places, None)) is None:
        continue
      self._load(place, job)
      self._began[place] = self.run_seconds - float(saved["seconds"][source])
      for new, old in zip(jax.tree.leaves(lanes), jax.tree.leaves(old_lanes), strict=True):
        new[place] = old[source]
      self.resumed_steps += int(lanes[0].iteration[place])
    self._lanes = self._program.restore(self._lanes, *lanes)
    resumed = set(self.jobs.values())
    return collections.deque(job for job in queue if job not in resumed)
