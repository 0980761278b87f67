"""A part of an attack's work: what another process is given, what it does, and what it gives back.

Numbers that name experiments are those of the study, or 0 of one alone. A part is done in a work
directory of its own, which is dropped: what counts is what it gives back.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxdia import engine
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import write_atomically
from jaxdia.experiment.attack_run import FinishedGradient, Times
from jaxdia.experiment.clients import Clients
from jaxdia.experiment.config import ClientsSettings, ExperimentSettings
from jaxdia.experiment.experiment import Experiment
from jaxdia.experiment.progress import share_done
from jaxdia.experiment.shared_lanes import plan, run_attack
from jaxdia.experiment.store import Devices


class Part(NamedTuple):
  """An attack on some gradients of experiments that share its program.

  Attributes:
    attack: its name.
    settings: of each experiment.
    digests: of the clients of each, as the driver has them.
    gradients: numbers of those to attack, of each experiment.
    kept: of each experiment, the files of those of which some trials are finished.
    sessions: of each experiment, the number of the session that the results belong to.
    lanes: a device; 0 of an attack that takes no step.
  """

  attack: str
  settings: dict[int, ExperimentSettings]
  digests: dict[int, dict[str, Any]]
  gradients: dict[int, tuple[int, ...]]
  kept: dict[int, dict[int, bytes]]
  sessions: dict[int, int]
  lanes: int

  @property
  def count(self) -> int:
    """Number of gradients."""
    return sum(map(len, self.gradients.values()))


class Done(NamedTuple):
  """What came of a part.

  Attributes:
    found: of each gradient of each experiment.
    errors: of the experiments that failed.
    times: that each experiment took.
    halved: lanes a device that were left when memory was short; None if it never was.
    said: what a person should read.
  """

  found: dict[int, dict[int, FinishedGradient]]
  errors: dict[int, Exception]
  times: dict[int, Times]
  halved: int | None
  said: tuple[str, ...]


@functools.lru_cache(maxsize=4)  # parts of one experiment mostly follow each other
def _clients(settings: ClientsSettings) -> Clients:
  return Clients(settings)


@contextlib.contextmanager
def _somewhere(settings: Mapping[int, ExperimentSettings]) -> Iterator[pathlib.Path]:
  """Gives a folder that is dropped, and the precision of experiments that share a program."""
  first = next(iter(settings.values()))
  with (
    tempfile.TemporaryDirectory(prefix="jaxdia-", ignore_cleanup_errors=True) as name,
    jax.enable_x64(first.precision == "float64"),
  ):
    yield pathlib.Path(name)


def _open(part: Part, number: int, folder: pathlib.Path) -> Experiment:
  """Takes up one experiment of a part in a folder of its own."""
  settings = part.settings[number]
  clients, there = _clients(settings.clients), part.digests[number]
  if clients.digests != there:  # files may have changed since they were read
    _clients.cache_clear()
    clients = _clients(settings.clients)
  if (here := clients.digests) != there:
    what = next(name for name in there if here[name] != there[name])
    raise InputError(
      f"another process read another {what} (config.{what}) than this one. Give all the same files"
      " at the same path."
    )
  name, workdir = part.attack, folder / str(number)
  experiment = Experiment(
    dataclasses.replace(
      settings,
      attacks={name: settings.attacks[name]},
      engine=dataclasses.replace(settings.engine, lanes=part.lanes or None),
    ),
    workdir,
    clients,
    gradients=part.gradients[number],
    session=part.sessions[number],
  )
  for gradient, file in part.kept[number].items():
    path = experiment.runs[name].outcome_path(gradient)
    write_atomically(path, lambda f, file=file: f.write(file), durable=False)
  experiment.begin()
  return experiment


def run_part(part: Part, tell: Callable[[float], None]) -> Done:
  """Does a part.

  Args:
    part: what to do.
    tell: called with the share that is done, once a second or so.

  Returns:
    What came of it, with the errors of experiments; none is raised.
  """
  errors: dict[int, Exception] = {}
  experiments: dict[int, Experiment] = {}
  said: list[str] = []
  trials, notes = 0, 0

  def on_progress(now: engine.Progress) -> None:
    # Those that are no part of this one count as finished.
    tell(share_done(now._replace(total=trials, finished=now.finished - now.total + trials)))

  def on_note(text: str) -> None:
    nonlocal notes
    notes += 1
    if not part.lanes:
      tell(min(1.0, notes / part.count))

  with _somewhere(part.settings) as folder:
    try:
      for number in part.settings:
        try:
          experiments[number] = _open(part, number, folder)
        except Exception as error:  # of this one alone
          errors[number] = error
      runs = {number: one.runs[part.attack] for number, one in experiments.items()}
      trials = sum(one.trials for one in runs.values())
      if experiments:
        errors |= run_attack(
          part.attack,
          experiments,
          checkpoint_path=None,
          on_progress=on_progress,
          note=on_note,
          say=said.append,
        )
    finally:
      for one in experiments.values():
        one.close()
    halved = [one.store.halved(part.attack) for one in experiments.values()]
    return Done(
      {number: run.give() for number, run in runs.items()},
      {number: _plain(error) for number, error in errors.items()},
      {number: run.times for number, run in runs.items()},
      min((lanes for lanes in halved if lanes is not None), default=None),
      tuple(said),
    )


def _plain(error: Exception) -> Exception:
  """Returns an error that can be sent, whatever it was."""
  if isinstance(error, InputError):
    return InputError(str(error))
  return RuntimeError(f"{type(error).__name__}: {first_line(error)}")


def lanes_of(attack: str, settings: Mapping[int, ExperimentSettings], workers: int) -> int:
  """Returns in how many lanes a device an attack begins, where there are several such processes.

  Args:
    attack: its name.
    settings: of the experiments that share its program.
    workers: processes like this one.
  """
  with _somewhere(settings) as folder:
    devices = Devices.of_this_process()
    experiments = {
      number: Experiment(one, folder / str(number), _clients(one.clients), devices=devices)
      for number, one in settings.items()
    }
    asked = next(iter(settings.values())).engine.lanes
    return plan(attack, experiments, asked, workers).lanes
