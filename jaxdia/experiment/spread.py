"""An attack of several experiments on a cluster: what is given away, and what is taken back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TextIO

from jaxdia.experiment.cluster import Cluster
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.experiment import Experiment
from jaxdia.experiment.parts import Done, Part
from jaxdia.experiment.progress import ProgressReport
from jaxdia.experiment.shared_lanes import noted_lanes, start

# A worker has so many parts or more of an attack to do, so that none waits long for the last; but
# not fewer trials than fill its lanes, and no more than fill them so many times.
_PARTS_A_WORKER = 4
_FILLS = 4
# Gradients a part of an attack that searches nothing, at most.
_MOST = 64


def fix_lanes(
  name: str,
  experiments: Mapping[int, Experiment],
  settings: Mapping[int, ExperimentSettings],
  cluster: Cluster,
  say: Callable[[str], None],
) -> tuple[int, dict[int, Exception]]:
  """Notes in how many lanes a device an attack is run, and returns it, and errors by experiment.

  Args:
    name: of the attack.
    experiments: by number, of which something is left.
    settings: by number, of these and all others that share its program.
    cluster: that will run it.
    say: called with what a person should read.
  """
  asked = next(iter(settings.values())).engine.lanes
  noted = noted_lanes(name, experiments)
  if noted is not None and (asked is None or asked >= noted):
    lanes = fresh = noted  # more workers now would have fewer
  else:
    fresh = cluster.lanes_of(name, settings)
    lanes = fresh if noted is None else noted
  return start(name, experiments, lanes, fresh, say)


def cut(
  name: str, experiments: Mapping[int, Experiment], lanes: int, cluster: Cluster
) -> Iterator[Part]:
  """Yields what is left of an attack in parts.

  Args:
    name: of the attack.
    experiments: by number.
    lanes: a device.
    cluster: that will run them.
  """
  runs = {number: one.runs[name] for number, one in experiments.items()}
  left = [(number, gradient) for number, run in runs.items() for gradient in run.unfinished]
  restarts = next(iter(runs.values())).restarts
  fair = -(-len(left) // (_PARTS_A_WORKER * max(1, len(cluster.workers))))
  if lanes:
    fill = -(-lanes * cluster.devices.count // restarts)
    size = min(max(fair, fill), _FILLS * fill)
  else:
    size = min(fair, _MOST)
  for first in range(0, len(left), size):
    gradients: dict[int, tuple[int, ...]] = {}
    for number, gradient in left[first : first + size]:
      gradients[number] = (*gradients.get(number, ()), gradient)
    yield _part(name, experiments, gradients, lanes)


def _part(name, experiments, gradients, lanes) -> Part:
  of = {number: experiments[number] for number in gradients}
  paths = {
    number: {g: one.runs[name].outcome_path(g) for g in gradients[number]}
    for number, one in of.items()
  }
  return Part(
    name,
    {number: one.settings for number, one in of.items()},
    {number: one.clients.digests for number, one in of.items()},
    gradients,
    {n: {g: p.read_bytes() for g, p in found.items() if p.exists()} for n, found in paths.items()},
    {number: one.store.session for number, one in of.items()},
    lanes,
  )


def take(
  experiments: Mapping[int, Experiment], part: Part, done: Done, say: Callable[[str], None]
) -> dict[int, Exception]:
  """Keeps what came of a part, and returns errors by experiment.

  Args:
    experiments: by number; what came of others is dropped.
    part: what was to be done.
    done: what came of it.
    say: called with what a person should read.
  """
  for text in done.said:
    say(text)
  errors = {number: error for number, error in done.errors.items() if number in experiments}
  for number, one in experiments.items():
    run = one.runs.get(part.attack)
    if run is None or number not in part.settings:
      continue
    try:
      for gradient, found in done.found.get(number, {}).items():
        run.accept(gradient, found)
      if number in done.times:
        run.add_times(done.times[number])
      if done.halved is not None:
        one.store.note_halved(part.attack, done.halved)
    except Exception as error:  # as of a disk that is full
      errors.setdefault(number, error)
  return errors


class Work(NamedTuple):
  """What there is to do of one attack of one experiment.

  Attributes:
    gradients: in all.
    finished: of these, before.
    cost: of one, in any unit.
  """

  gradients: int
  finished: int
  cost: float


class Tally:
  """How far a cluster is with all that there is to do.

  Attributes:
    share: of the cost that is done, from 0 to 1.
  """

  def __init__(
    self,
    work: Mapping[tuple[int, str], Work],
    workers: Callable[[], int],
    stream: TextIO | None = None,
  ):
    """Starts counting.

    Args:
      work: of each attack of each experiment.
      workers: tells how many there are now.
      stream: where it is shown; standard error if None.
    """
    self._work, self._workers = work, workers
    self._total = sum(one.gradients for one in work.values())
    self._finished = sum(one.finished for one in work.values())
    self._cost = max(1e-9, sum(one.gradients * one.cost for one in work.values()))
    self._done = sum(one.finished * one.cost for one in work.values())
    self._progress = ProgressReport(["cluster"], [1.0], stream)
    self.say = self._progress.say
    self.close = self._progress.close
    self.show(())

  def add(self, part: Part) -> None:
    """Notes that a part is done.

    Args:
      part: that is done.
    """
    self._finished += part.count
    self._done += self._cost_of(part)

  def skip(self, number: int, attack: str, count: int) -> None:
    """Notes gradients that turn out to be finished.

    Args:
      number: of the experiment.
      attack: its name.
      count: how many.
    """
    self._finished += count
    self._done += count * self._work[number, attack].cost
    self.show(())

  def show(self, running: Iterable[tuple[Part, float]]) -> None:
    """Shows how far it is.

    Args:
      running: parts that workers do now, and which share of each is done.
    """
    done = self._done + sum(share * self._cost_of(part) for part, share in running)
    self.share, count = min(1.0, done / self._cost), self._workers()
    self._progress.update_share(
      self.share,
      f"{count} worker{'s' if count != 1 else ''}, {self._finished}/{self._total} gradients done",
    )

  def _cost_of(self, part: Part) -> float:
    work = ((self._work[n, part.attack], len(found)) for n, found in part.gradients.items())
    return sum(one.cost * count for one, count in work)
