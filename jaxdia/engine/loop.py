"""The lanes with their jobs: the part of the host loop that knows where everything is."""

import collections
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxdia.attacks import Status
from jaxdia.client import Observation
from jaxdia.engine import checkpoint
from jaxdia.engine.jobs import Job, Task, Trial, trial_key
from jaxdia.engine.lanes import Gauge, Given, create_program
from jaxdia.matching import Method, prepare_alike, suits

# The host looks at the lanes about so often.
_CHUNK_SECONDS = 1.0
_MAX_CHUNK = 1_000

_Place = tuple[int, int]  # device, lane


class Loop:
  """The lanes with their jobs, and the times that they took.

  Attributes:
    jobs: by the place (device, lane) in which they run.
    started: whether there are lanes.
    compile_seconds: time spent compiling.
    run_seconds: time spent computing.
    task_seconds: {number: of these, those of a task}.
    resumed_steps: steps of resumed trials that were taken before.
  """

  def __init__(
    self,
    tasks: Mapping[int, Task],
    devices: Sequence[jax.Device],
    chunk: int | None,
    matching: Method,
    recorded: Sequence[int],
  ):
    """Prepares what is attacked; see `jaxdia.engine.run`. The tasks are by number."""
    start = time.monotonic()
    self._tasks = tasks
    self._attack = next(iter(tasks.values())).attack
    self._devices = devices
    self._fixed_chunk = chunk
    self._recorded = recorded
    # Tasks may attack the same victims, which then share their slots.
    distinct = {_identity(o): o for task in tasks.values() for o in task.observations}
    numbers = {identity: number for number, identity in enumerate(distinct)}
    self._victims_of = {
      task_number: [numbers[_identity(o)] for o in task.observations]
      for task_number, task in tasks.items()
    }
    method = suits(self._attack.settings.distance, matching)
    self._victims = prepare_alike(self._attack.model, list(distinct.values()), method)
    self._params = _number_params(self._victims)  # of each victim
    dtype = self._victims[0].dtype
    self._variants = {n: task.attack.variant.as_arrays(dtype) for n, task in tasks.items()}
    self.jobs: dict[_Place, Job] = {}
    self.started = False
    self.compile_seconds = 0.0
    self.run_seconds = time.monotonic() - start
    self.task_seconds = dict.fromkeys(tasks, self.run_seconds / len(tasks))
    self.resumed_steps = 0

  def most_on_a_device(self, jobs: Sequence[Job]) -> int:
    """Returns how many of the jobs a device can run at once at the most: those on the same params.

    Args:
      jobs: all of them.
    """
    return max(collections.Counter(self._params_of(job) for job in jobs).values())

  def start(self, lanes: int, job: Job) -> None:
    """Makes lanes, with no job in them.

    Args:
      lanes: on each device.
      job: one of those that are to be run.
    """
    start = time.monotonic()
    slots = min(lanes, len(self._victims))
    # What is where: the params of a device, and the victim in each slot (device, slot).
    self._held: dict[int, int] = {}
    self._slots: dict[tuple[int, int], int] = {}
    self._began: dict[_Place, float] = {}  # run_seconds when the job there began
    self._program = create_program(
      self._attack,
      self._victims[self._number(job)],
      self._given(job),
      lanes,
      slots,
      self._devices,
      self._recorded,
    )
    # Each compiled function once, without a step, so that none is compiled in the run.
    self._lanes = self._program.empty()
    self._load((0, 0), job)
    self._lanes, _ = self._program.advance(self._lanes, 0)
    self._program.read(self._lanes, 0, 0)
    self._lanes = None
    self._lanes = self._program.empty()
    for where in (self._held, self._slots, self._began, self.jobs):
      where.clear()
    self.compile_seconds += time.monotonic() - start
    self._chunk = self._fixed_chunk or 1
    self.started = True

  def stop(self) -> None:
    """Gives up the lanes, and what was in them."""
    self.jobs.clear()
    self._program = self._lanes = None
    self.resumed_steps = 0
    self.started = False

  def _number(self, job: Job) -> int:
    """Returns the number of a job's victim among all that are distinct."""
    return self._victims_of[job.task][job.victim]

  def _params_of(self, job: Job) -> int:
    """Returns the number of the params that a job's victim was observed at."""
    return self._params[self._number(job)]

  def _given(self, job: Job) -> Given:
    task = self._tasks[job.task]
    masks, parts = (x and x[job.victim] for x in (task.masks, task.parts))
    return Given(masks, parts, self._variants[job.task])

  def _slot(self, device: int, victim: int) -> int:
    """Returns where on a device a victim is, or is put now."""
    here = [self._slots.get((device, slot)) for slot in range(self._program.num_slots)]
    if victim in here:
      return here.index(victim)
    # There are as many slots as victims, or as lanes, so one is free.
    needed = {self._number(job) for (d, _), job in self.jobs.items() if d == device}
    slot = next(slot for slot, other in enumerate(here) if other not in needed)
    self._lanes = self._program.place(self._lanes, device, slot, self._victims[victim])
    self._slots[device, slot] = victim
    return slot

  def _load(self, place: _Place, job: Job) -> None:
    device, victim = place[0], self._number(job)
    if self._held.get(device) != self._params[victim]:
      self._lanes = self._program.share(self._lanes, device, self._victims[victim].params)
      self._held[device] = self._params[victim]
    slot = self._slot(device, victim)
    key = trial_key(self._tasks[job.task].key, job)
    self._lanes = self._program.load(self._lanes, *place, slot, key, self._given(job))
    self.jobs[place] = job
    self._began[place] = self.run_seconds

  def _can_take(self, device: int, params: int) -> bool:
    """Returns whether a device holds some params, or is free to be given them."""
    return self._held.get(device) == params or not any(d == device for d, _ in self.jobs)

  def fill(self, queue: collections.deque[Job]) -> None:
    """Puts waiting jobs into free lanes, device by device."""
    num_devices, num_lanes = self._program.shape
    places = [(d, lane) for lane in range(num_lanes) for d in range(num_devices)]
    places = [place for place in places if place not in self.jobs]
    waiting: dict[int, collections.deque[Job]] = {}  # by params
    for job in queue if places else ():
      waiting.setdefault(self._params_of(job), collections.deque()).append(job)
    for place in places:
      params = self._choose(place[0], waiting)
      if params is not None:
        job = waiting[params].popleft()
        queue.remove(job)
        self._load(place, job)

  def _choose(self, device: int, waiting: dict[int, collections.deque[Job]]) -> int | None:
    """Returns the params on whose jobs a device goes on; None if it can take no waiting job.

    Those that it holds; else, if it is free, such as no other device holds, with the most jobs.
    """
    able = [n for n, jobs in waiting.items() if jobs and self._can_take(device, n)]
    held = self._held.get(device)
    others = {params for d, params in self._held.items() if d != device}
    return max(able, key=lambda n: (n == held, n not in others, len(waiting[n])), default=None)

  def advance(self) -> Gauge:
    """Runs one chunk, if not set then of a length that takes about `_CHUNK_SECONDS`."""
    start = time.monotonic()
    self._lanes, gauge = self._program.advance(self._lanes, self._chunk)
    seconds = time.monotonic() - start
    self.run_seconds += seconds
    for job in self.jobs.values():
      self.task_seconds[job.task] += seconds / len(self.jobs)
    if self._fixed_chunk is None:
      wanted = self._chunk * _CHUNK_SECONDS / max(seconds, 1e-9)
      self._chunk = int(np.clip(wanted, 1, min(2 * self._chunk, _MAX_CHUNK)))
    return gauge

  def ended(self, gauge: Gauge) -> list[_Place]:
    """Returns the places whose trials have ended."""
    return [place for place in self.jobs if gauge.status[place] != Status.RUNNING]

  def take(self, place: _Place, gauge: Gauge) -> Trial:
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
    jobs = np.full((*self._program.shape, len(Job._fields)), -1, np.int32)
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
    places = list(np.ndindex(self._program.shape))
    lanes = jax.tree.map(np.array, jax.device_get((self._lanes.state, self._lanes.recording)))
    old_lanes = (saved["state"], saved["recording"])
    for source in np.ndindex(saved["seconds"].shape):
      job = Job(*map(int, saved["jobs"][source]))
      if job not in waiting:
        continue
      # Where it was, if it can be.
      params = self._params_of(job)
      fitting = [p for p in places if p not in self.jobs and self._can_take(p[0], params)]
      if not fitting:
        continue
      place = source if source in fitting else fitting[0]
      self._load(place, job)
      self._began[place] = self.run_seconds - float(saved["seconds"][source])
      for new, old in zip(jax.tree.leaves(lanes), jax.tree.leaves(old_lanes), strict=True):
        new[place] = old[source]
      self.resumed_steps += int(lanes[0].iteration[place])
    self._lanes = self._program.restore(self._lanes, *lanes)
    resumed = set(self.jobs.values())
    return collections.deque(job for job in queue if job not in resumed)


def _identity(observation: Observation) -> tuple[int, ...]:
  """Returns what observations have in common that are made of the same arrays."""
  return tuple(map(id, jax.tree.leaves(observation)))


def _number_params(victims: Sequence[Observation]) -> list[int]:
  """Returns for each victim a number that is the same for those with equal params."""
  kinds: list[list] = []
  numbers = []
  for victim in victims:
    leaves = jax.tree.leaves(victim.params)
    same = (
      number
      for number, kind in enumerate(kinds)
      if all(a is b or np.array_equal(a, b) for a, b in zip(leaves, kind, strict=True))
    )
    number = next(same, None)
    if number is None:
      number = len(kinds)
      kinds.append(leaves)
    numbers.append(number)
  return numbers
