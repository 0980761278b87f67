"""Other processes that do parts of the work, on this machine or on many, through Dask.

Dask starts the workers, finds them, and carries what is sent; which part a worker does is decided
here. So each has one at a time, whatever number of threads it was started with, for a part takes
all cores or accelerators of its process; one that cannot do it is named and left out; and a part is
given to another as soon as its worker is gone.
"""

import collections
import contextlib
import functools
import glob
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

import jaxdia
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.machine import keep_compiled, keep_memory, share_cpu
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.manifest import commit
from jaxdia.experiment.parts import Done, Part, lanes_of, run_part
from jaxdia.experiment.store import Devices

# A part that took so many workers with it is not tried again.
_MOST_LOST = 3
_LOST = f"{_MOST_LOST} workers ended while they did this; is there too little memory?"
# Seconds between two looks at which workers there are, and until one is missed.
_LOOK = 0.5
_PATIENCE = 60.0
_ANSWER = "20s"  # how long a scheduler may take
_TOPIC = "jaxdia-progress"
# What Dask raises for a result whose worker is gone.
_GONE = ("KilledWorker", "FutureCancelledError", "CommClosedError")


class Worker(NamedTuple):
  """A process that does parts.

  Attributes:
    version: of jaxdia in it, with the commit where it is known.
    devices: that it computes on.
    jax: version of JAX.
  """

  version: str
  devices: Devices
  jax: str


def _version() -> str:
  return f"{jaxdia.__version__} ({found})" if (found := commit()) else jaxdia.__version__


def _prepare(workers_here: int | None, dask_worker: Any = None) -> Worker:
  """Makes a worker ready, in its process, and returns what it is.

  Args:
    workers_here: how many share this machine; None if that is for others to settle.
    dask_worker: given by Dask.
  """
  if workers_here is not None:
    _take_share(int(dask_worker.name), workers_here)
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # where a network of the user's own may be, as for a launcher
  keep_compiled()
  share_cpu()
  keep_memory()
  devices = Devices.of_this_process()
  return Worker(_version(), devices, jax.__version__)


def _take_share(number: int, count: int) -> None:
  """Keeps a process to its share of the cores, and to one accelerator."""
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    first, last = number * len(cores) // count, (number + 1) * len(cores) // count
    mine = cores[first:last] or [cores[number % len(cores)]]
    for thread in map(int, os.listdir("/proc/self/task")):
      with contextlib.suppress(OSError):  # it may have ended
        os.sched_setaffinity(thread, mine)
  given = os.environ.get("CUDA_VISIBLE_DEVICES")
  there = glob.glob("/dev/nvidia[0-9]*") if given is None else given.split(",")
  if there:
    numbers = [str(i) for i in range(len(there))] if given is None else there
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers[number % len(numbers)]


def _work(number: int, part: Part) -> Done:
  """Does a part in a worker, and tells how far it is."""
  from distributed import get_worker

  return run_part(part, lambda share: get_worker().log_event(_TOPIC, (number, share)))


class Cluster:
  """Workers.

  Attributes:
    workers: by address, those that can be given parts.
  """

  def __init__(self, where: Any, say: Callable[[str], None]):
    """Finds the workers, or starts them.

    Args:
      where: "local:4" for as many processes on this machine, the address of a Dask scheduler such
        as "tcp://host:8786", or a cluster or client object of Dask.
      say: called with what a person should read.

    Raises:
      InputError: there is no Dask, nothing is at the address, or no worker can be used.
    """
    try:
      import distributed
    except ImportError as error:
      raise InputError(
        f"a cluster needs Dask ({first_line(error)}). Install it with"
        " pip install 'jaxdia[cluster]', here and where the workers are."
      ) from error
    self._ended = threading.Event()  # of some part
    self._seen = time.monotonic()  # a worker
    self._say = say
    self._here: int | None = None
    self._closing = contextlib.ExitStack()
    self._left_out: set[str] = set()
    self._shares: dict[int, float] = {}
    self._free: str | None = None  # a worker that is given a part next
    self._devices: Devices | None = None
    self.workers: dict[str, Worker] = {}
    try:
      self._client: Any = self._open(distributed, where)
      self._client.subscribe_topic(_TOPIC, self._on_event)
      self._await_workers()
    except BaseException:
      self.close()
      raise

  def _open(self, distributed: Any, where: Any) -> Any:
    """Returns a client of what `where` names."""
    if isinstance(where, distributed.Client):
      return where
    if isinstance(where, str):
      # What matters is said in words of our own.
      logging.getLogger("distributed").setLevel(logging.CRITICAL)
      kind, _, number = where.partition(":")
      if kind == "local" and number.isdecimal() and int(number):
        self._here = int(number)
        where = self._closing.enter_context(
          distributed.LocalCluster(
            n_workers=self._here,
            threads_per_worker=1,
            processes=True,
            memory_limit=None,  # of Dask's own data, of which there are none
            dashboard_address=":0",
            silence_logs=logging.ERROR,
          )
        )
      elif "://" not in where:
        raise InputError(
          f"--cluster is {where!r}; expected local:N for N processes on this machine, or the"
          " address of a Dask scheduler, such as tcp://host:8786."
        )
    try:
      return self._closing.enter_context(
        distributed.Client(where, set_as_default=False, timeout=_ANSWER)
      )
    except (OSError, ValueError, TypeError) as error:
      raise InputError(
        f"no Dask scheduler answers at {where} ({first_line(error)}). Start one with"
        " `dask scheduler`, or give --cluster its address."
      ) from error

  def close(self) -> None:
    """Ends the workers, if they were started here."""
    self._closing.close()

  def __enter__(self) -> "Cluster":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def _await_workers(self) -> None:
    """Waits until there are workers."""
    began, waited = time.monotonic(), False
    while not self.workers or (self._here or 0) > len(self.workers) + len(self._left_out):
      self._look()
      if self._left_out and not self.workers:
        raise InputError("no worker of the cluster can be used; the lines above say why.")
      if not waited and time.monotonic() - began > 5:
        self._say("waiting for workers")
        waited = True
      time.sleep(0.05)

  def _look(self) -> None:
    """Looks which workers there are, and makes those ready that are new."""
    there = set(self._client.nthreads())
    for address in self.workers.keys() - there:
      del self.workers[address]
    for address in sorted(there - self.workers.keys() - self._left_out):
      answers = self._client.run(_prepare, self._here, workers=[address], on_error="return")
      if address not in answers:
        continue  # it went while it was asked
      answer = answers[address]
      if isinstance(answer, BaseException):
        reason = f"{type(answer).__name__}: {first_line(answer)}"
        self._leave_out(address, f"it cannot run jaxdia {_version()} ({reason})")
      elif answer.version != _version():
        self._leave_out(address, f"it has jaxdia {answer.version}, this process {_version()}")
      else:
        if answer.jax != jax.__version__:
          self._say(
            f"worker {address} has JAX {answer.jax}, this process {jax.__version__}: results are"
            " equal but for rounding"
          )
        self.workers[address] = answer
        self._devices = self._devices or answer.devices

  def _leave_out(self, address: str, reason: str) -> None:
    self._left_out.add(address)
    self._say(f"worker {address} is left out: {reason}. Install the same version there.")

  @property
  def devices(self) -> Devices:
    """What a worker computes on; of the first, as all should be alike."""
    assert self._devices is not None  # there was one at the beginning
    return self._devices

  def lanes_of(self, attack: str, settings: Mapping[int, ExperimentSettings]) -> int:
    """Returns in how many lanes a device an attack begins; see `parts.lanes_of`.

    Args:
      attack: its name.
      settings: of the experiments that share its program.

    Raises:
      InputError: each worker that was asked ended.
    """
    ask = functools.partial(lanes_of, attack, dict(settings), len(self.workers))
    for _ in range(_MOST_LOST):
      while not self.workers:
        self._notice()
        time.sleep(_LOOK)
        self._look()
      address = self._free if self._free in self.workers else next(iter(self.workers))
      future = self._submit(address, ask)
      while address in self.workers and not future.done():
        self._await_any()
      if future.done():
        return future.result(timeout=_PATIENCE)
      future.cancel()
      self._say(f"worker {address} is gone; another is asked")
    raise InputError(_LOST)

  def _submit(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Gives a worker something to do; returns its future."""
    future = self._client.submit(function, *arguments, workers=[address], pure=False)
    future.add_done_callback(lambda _: self._ended.set())
    return future

  def _await_any(self) -> None:
    """Waits until something has ended, but not long, and looks which workers there are."""
    self._ended.wait(_LOOK)
    self._ended.clear()
    self._look()

  def _on_event(self, event: tuple[float, tuple[int, float]]) -> None:
    number, share = event[1]
    if number in self._shares:
      self._shares[number] = share

  def run(
    self,
    parts: Iterator[Part],
    on_progress: Callable[[Iterable[tuple[Part, float]]], None],
  ) -> Iterator[tuple[Part, Done]]:
    """Lets the workers do parts, and yields each as it is done.

    Args:
      parts: what to do; they are made when a worker is free.
      on_progress: called often, with the parts that are being done and the share that is done.
    """
    again: collections.deque[tuple[int, Part]] = collections.deque()
    running: dict[str, tuple[int, Part, Any]] = {}  # by worker
    lost: collections.Counter[int] = collections.Counter()
    numbered = enumerate(parts)
    try:
      while True:
        for address in self.workers.keys() - running.keys():
          self._free = address
          number, part = again.popleft() if again else next(numbered, (-1, None))
          if part is None:
            break
          self._shares[number] = 0.0
          running[address] = number, part, self._submit(address, _work, number, part)
        if not running and not again and self.workers:
          return
        self._notice()
        on_progress((part, self._shares[number]) for number, part, _ in running.values())
        self._await_any()
        for address, (number, part, future) in list(running.items()):
          if address in self.workers and not future.done():
            continue
          done = self._result(part, future)
          del running[address]
          if done is None:
            future.cancel()
            lost[number] += 1
            if lost[number] < _MOST_LOST:
              self._say(f"worker {address} is gone; its part is given to another")
              again.append((number, part))
              continue
            done = _failed(part, InputError(_LOST))
          del self._shares[number]
          yield part, done
    finally:
      self._free = None
      for _, _, future in running.values():
        with contextlib.suppress(Exception):  # the cluster may be gone
          future.cancel()

  def _notice(self) -> None:
    """Says once a minute that there is no worker."""
    now = time.monotonic()
    if self.workers:
      self._seen = now
    elif now - self._seen > _PATIENCE:
      self._say("no worker is there; waiting for one")
      self._seen = now

  def _result(self, part: Part, future: Any) -> Done | None:
    """Returns what came of a part; None if its worker is gone."""
    if not future.done():
      return None
    try:
      return future.result(timeout=_PATIENCE)
    except Exception as error:
      if isinstance(error, TimeoutError) or type(error).__name__ in _GONE:
        return None
      return _failed(part, error)


def _failed(part: Part, error: Exception) -> Done:
  return Done({}, dict.fromkeys(part.settings, error), {}, None, ())
