"""The lanes with their jobs: the part of the host loop that knows where everything is."""

import collections
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdia.attacks import Attack, State, Status, Told, parts_of, prepare_for
from jaxdia.client import Observation
from jaxdia.closed_form import check_sign
from jaxdia.core.errors import InputError
from jaxdia.core.trees import digest, shapes_of
from jaxdia.core.types import Key, Params
from jaxdia.engine import checkpoint
from jaxdia.engine.jobs import Job, Task, Trial, trial_key
from jaxdia.engine.lanes import Gauge, LaneProgram, Lanes, create_program
from jaxdia.gradients import Method, Prepared

# The host looks at the lanes about so often.
_CHUNK_SECONDS = 1.0
_MAX_CHUNK = 1_000

_Place = tuple[int, int]  # device, lane
_Client = tuple[int, int]  # number of a sequence of observations, index in it


@jax.jit
def init_trial(attack: Attack, key: Key, observation: Observation, told: Told) -> State:
  """Starts a trial; compiled once for attacks of one program."""
  return attack.init(key, observation, told)


def told_of(task: Task, number: int) -> Told:
  """Returns what an attack is told of one of a task's observations besides it."""
  masks, parts = (x and x[number] for x in (task.masks, task.parts))
  return Told(masks, parts_of(parts))


class Loop:
  """The lanes with their jobs, and the times that they took.

  Attributes:
    jobs: by the place (device, lane) in which they run.
    postponed: jobs whose gradients are of another form than those in the lanes, such as one
      that is not of low rank; they need a program of their own.
    max_iterations: of all attacks.
    started: whether there are lanes.
    compile_seconds: time spent compiling.
    run_seconds: time spent computing.
    task_seconds: {number: of these, those of a task}.
    resumed_steps: steps of resumed trials that were taken before.
  """

  _program: LaneProgram  # this and the lanes are there from `start` to `stop`
  _lanes: Lanes

  def __init__(
    self,
    tasks: Mapping[int, Task],
    devices: Sequence[jax.Device],
    chunk: int | None,
    matching: Method,
    recorded: Sequence[int],
  ):
    """Prepares what is attacked; see `jaxdia.engine.run`. The tasks are by number."""
    self._tasks = tasks
    attack = next(iter(tasks.values())).attack
    self._model, self.max_iterations = attack.model, attack.max_iterations
    self._devices = devices
    self._fixed_chunk = chunk
    self._settings, self._matching = attack.settings, matching
    self._recorded = recorded
    # Tasks may attack the same clients, which then share their slots.
    sequences = list({id(task.observations): None for task in tasks.values()})
    self._sequence = {n: sequences.index(id(task.observations)) for n, task in tasks.items()}
    self._kinds: dict[str, Params] = {}  # those that are distinct, by digest
    self._params: dict[int, str] = {}  # their digest, by number of the task
    for number, task in tasks.items():
      params = task.observations[0].params
      self._params[number] = digest(params)
      self._kinds.setdefault(self._params[number], params)
    # Of the clients in slots: what the server saw, as it is and prepared.
    self._seen: dict[_Client, tuple[Observation, Prepared]] = {}
    self.jobs: dict[_Place, Job] = {}
    self.postponed: list[Job] = []
    self.started = False
    self.compile_seconds = 0.0
    self.run_seconds = 0.0
    self.task_seconds = dict.fromkeys(tasks, 0.0)
    self.resumed_steps = 0

  def count_clients(self, jobs: Sequence[Job]) -> int:
    """Returns how many distinct observations jobs attack.

    Args:
      jobs: all of them.
    """
    return len({self._client(job) for job in jobs})

  def most_on_a_device(self, jobs: Sequence[Job]) -> int:
    """Returns how many of the jobs a device can run at once: at most those on the same params.

    Args:
      jobs: all of them.
    """
    return max(collections.Counter(self._params[job.task] for job in jobs).values())

  def start(self, lanes: int, clients: int, job: Job) -> None:
    """Makes lanes, with no job in them, and compiles all that a run needs.

    Args:
      lanes: on each device.
      clients: that are attacked.
      job: one of those that are to be run, of whose form the gradients in the lanes are.
    """
    start = time.monotonic()
    # What is where: the params of a device, and the client in each slot (device, slot).
    self._held: dict[int, str] = {}
    self._slots: dict[tuple[int, int], _Client] = {}
    self._began: dict[_Place, float] = {}  # run_seconds when the job there began
    self._digests: dict[_Place, bytes] = {}
    observation, prepared = self._observe(job)
    state = self._init(job, observation)
    self._form = shapes_of(prepared)
    attack = self._tasks[job.task].attack
    self._program = create_program(
      attack, prepared, state, lanes, min(lanes, clients), self._devices, self._recorded
    )
    # Each compiled function once, without a step, so that none is compiled in the run.
    self._lanes = self._program.empty()
    self._put({(0, 0): job})
    self._lanes, _ = self._program.advance(self._lanes, 0)
    self._program.read(self._lanes, 0, 0)
    del self._lanes  # before there are others, as memory may be short
    self._lanes = self._program.empty()
    for where in (self._held, self._slots, self._began, self._digests, self.jobs):
      where.clear()
    self.compile_seconds += time.monotonic() - start
    self._chunk = self._fixed_chunk or 1
    self.started = True

  def stop(self) -> None:
    """Gives up the lanes, and what was in them."""
    self.jobs.clear()
    for name in ("_program", "_lanes"):  # a start that failed has left neither
      vars(self).pop(name, None)
    self.resumed_steps = 0
    self.started = False

  def _client(self, job: Job) -> _Client:
    return self._sequence[job.task], job.observation

  def _observe(self, job: Job) -> tuple[Observation, Prepared]:
    """Returns what the server saw of a job's client; kept while the client is in a slot."""
    client = self._client(job)
    if client not in self._seen:
      observation = self._tasks[job.task].observations[job.observation]
      params = self._kinds[self._params[job.task]]
      pairs = zip(jax.tree.leaves(observation.params), jax.tree.leaves(params), strict=True)
      if not all(a is b or np.array_equal(a, b) for a, b in pairs):
        raise InputError(
          f"observation {job.observation} of task {job.task} was made at other params than the"
          " first of its task. Give those at the same params a task of their own."
        )
      check_sign(self._model, observation)
      observation = jax.device_put(observation, self._devices[0])
      prepared = prepare_for(self._model, self._settings, observation, self._matching)
      self._seen[client] = observation, prepared
    return self._seen[client]

  def _init(self, job: Job, observation: Observation) -> State:
    task = self._tasks[job.task]
    told = jax.device_put(told_of(task, job.observation), self._devices[0])
    return init_trial(task.attack, trial_key(task.key, job), observation, told)

  def _find_slot(self, device: int, client: _Client) -> tuple[int, bool]:
    """Returns where on a device a client is or can be put, and whether it is there already."""
    here = [self._slots.get((device, slot)) for slot in range(self._program.num_slots)]
    if client in here:
      return here.index(client), True
    # There are as many slots as clients, or as lanes, so one is free.
    needed = {self._client(job) for (d, _), job in self.jobs.items() if d == device}
    return next(slot for slot, other in enumerate(here) if other not in needed), False

  def _put(
    self, jobs: Mapping[_Place, Job], saved: Mapping[_Place, tuple[State, Any]] | None = None
  ) -> None:
    """Starts jobs in lanes, no more than one on each device, or takes up those that were saved."""
    news = {}
    for (device, lane), job in jobs.items():
      task, client = self._tasks[job.task], self._client(job)
      observation, prepared = self._observe(job)
      self._hold(device, job)
      slot, is_there = self._find_slot(device, client)
      self._slots[device, slot] = client
      if saved is None:
        state = self._init(job, observation)
        images = state.candidate.images
        recording = np.zeros((len(self._recorded), *images.shape), images.dtype)
      else:
        state, recording = saved[device, lane]
      news[device] = (slot, None if is_there else prepared, lane, task.attack, state, recording)
      self.jobs[device, lane] = job
      self._began[device, lane] = self.run_seconds
    self._lanes = self._program.put(self._lanes, news)
    kept = set(self._slots.values())
    self._seen = {client: seen for client, seen in self._seen.items() if client in kept}

  def _hold(self, device: int, job: Job) -> None:
    """Gives a device the params of a job, if it holds others."""
    params = self._params[job.task]
    if self._held.get(device) != params:
      self._lanes = self._program.share(self._lanes, device, self._kinds[params])
      self._held[device] = params

  def _can_take(self, device: int, params: str) -> bool:
    """Returns whether a device holds some params, or is free to be given them."""
    return self._held.get(device) == params or not any(d == device for d, _ in self.jobs)

  def fill(self, queue: collections.deque[Job]) -> None:
    """Puts waiting jobs into free lanes, device by device."""
    num_devices, num_lanes = self._program.shape
    waiting: dict[str, collections.deque[Job]] = {}  # by digest of the params
    for job in queue:
      waiting.setdefault(self._params[job.task], collections.deque()).append(job)
    for lane in range(num_lanes):
      round_of = {}
      for device in range(num_devices):
        if (device, lane) not in self.jobs and (job := self._next(device, waiting)) is not None:
          round_of[device, lane] = job
          self._hold(device, job)  # now, as the next device chooses by what this one holds
      if round_of:
        self._put(round_of)
    left = {job for jobs in waiting.values() for job in jobs}
    for _ in range(len(queue)):
      if (job := queue.popleft()) in left:
        queue.append(job)

  def _next(self, device: int, waiting: dict[str, collections.deque[Job]]) -> Job | None:
    """Takes the next job that a device can run; those of other forms are postponed."""
    while (params := self._choose(device, waiting)) is not None:
      job = waiting[params].popleft()
      if shapes_of(self._observe(job)[1]) == self._form:
        return job
      self.postponed.append(job)
    return None

  def _choose(self, device: int, waiting: dict[str, collections.deque[Job]]) -> str | None:
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
    self._digests.pop(place, None)
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

  def _digest(self, job: Job) -> bytes:
    """Returns what tells a trial from every other one: its attack, key, client and numbers."""
    task, params = self._tasks[job.task], self._params[job.task]
    seen = self._observe(job)[0]
    facts = (seen.local, seen.defence)
    observed = (seen.gradient, seen.labels, seen.mean, seen.std, seen.averages, *facts)
    key = jax.random.key_data(trial_key(task.key, job))
    trial = (task.attack, key, observed, told_of(task, job.observation))
    return checkpoint.digest(trial, params.encode(), repr(self._recorded).encode())

  def _checkpoint(self) -> dict[str, Any]:
    jobs = np.full((*self._program.shape, len(Job._fields)), -1, np.int32)
    seconds = np.zeros(self._program.shape, np.float64)
    digests = np.zeros((*self._program.shape, checkpoint.DIGEST_BYTES), np.uint8)
    for place, job in self.jobs.items():
      jobs[place] = job
      seconds[place] = self.run_seconds - self._began[place]
      if place not in self._digests:
        self._digests[place] = self._digest(job)
      digests[place] = np.frombuffer(self._digests[place], np.uint8)
    lanes = self._lanes.lanes
    trials = {"state": lanes.state, "recording": lanes.recording}
    return {"jobs": jobs, "seconds": seconds, "digests": digests} | trials

  def save(self, path: pathlib.Path) -> None:
    """Saves the running trials."""
    checkpoint.save(path, self._checkpoint())

  def resume(self, path: pathlib.Path, queue: collections.deque[Job]) -> collections.deque[Job]:
    """Puts saved trials that are still wanted into lanes; returns the other jobs.

    The lanes need not be those that were saved: what finds no place starts anew.

    Raises:
      InputError: the file is damaged, or of trials of another attack or client.
    """
    saved = checkpoint.restore(path, self._checkpoint(), lane_axes=2)
    if saved is None:
      return queue
    waiting = set(queue)  # a trial may have ended, and been kept, after the checkpoint
    places = list(np.ndindex(self._program.shape))
    for source in np.ndindex(saved["seconds"].shape):
      job = Job(*map(int, saved["jobs"][source]))
      if job not in waiting or shapes_of(self._observe(job)[1]) != self._form:
        continue
      checkpoint.check_digest(path, saved["digests"][source].tobytes(), self._digest(job))
      # Where it was, if it can be.
      params = self._params[job.task]
      fitting = [p for p in places if p not in self.jobs and self._can_take(p[0], params)]
      if not fitting:
        continue
      place = source if source in fitting else fitting[0]
      trial = jax.tree.map(lambda x, s=source: x[s], (saved["state"], saved["recording"]))
      self._put({place: job}, {place: trial})
      self._began[place] = self.run_seconds - float(saved["seconds"][source])
      self.resumed_steps += int(trial[0].iteration)
    resumed = set(self.jobs.values())
    return collections.deque(job for job in queue if job not in resumed)
