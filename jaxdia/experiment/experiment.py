"""A configured experiment: its clients, the runs of its attacks, and its work directory."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from jaxdia import evaluation
from jaxdia.attacks.settings import told
from jaxdia.client import defences
from jaxdia.core.files import write_json, write_npz
from jaxdia.experiment.attack_run import SHOWN, AttackRun, Times
from jaxdia.experiment.clients import Clients, epsilon, trained_accuracy
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.grid import write_grid
from jaxdia.experiment.progress import duration
from jaxdia.experiment.schema import Row, Summary
from jaxdia.experiment.store import Devices, Store
from jaxdia.experiment.summary import summarize
from jaxdia.experiment.table import table


class Experiment:
  """The clients of an experiment, what each attack found of them, and where it is written.

  Attributes:
    settings: of the experiment.
    clients: that are attacked.
    store: the work directory.
    runs: of each attack, by its name.
  """

  def __init__(
    self,
    settings: ExperimentSettings,
    workdir: pathlib.Path,
    clients: Clients | None = None,
    *,
    devices: Devices | None = None,
    gradients: Sequence[int] | None = None,
    session: int | None = None,
  ):
    """Loads the images and creates network and attacks; nothing is written.

    Args:
      settings: of the experiment.
      workdir: which need not exist.
      clients: of an experiment with the same `settings.clients`, if they are there already.
      devices: that each process computes on which runs a part of it; None if this one runs all.
      gradients: numbers of those that this process attacks, for another; all if None.
      session: of that other process.

    Raises:
      InputError: about the images, the network, or a work directory of another experiment.
    """
    self.settings = settings
    self.clients = clients or Clients(settings.clients)
    if devices is None:
      _ = self.clients.params  # trains them, which may be refused, before anything is written
    config = settings.to_json()
    del config["engine"]
    for group, facts in self.clients.digests.items():
      config[group] |= facts
    self.store = Store(workdir, config, settings.engine, devices, session)
    self.runs = {
      name: AttackRun(name, settings, self.clients, self.store, gradients)
      for name in settings.attacks
    }

  def begin(self) -> None:
    """Takes the work directory for this process, and takes up what was finished before.

    Raises:
      InputError: another process has the directory, it cannot be written, or what is there is
        damaged.
    """
    try:
      self.store.open()
      kept = self.store.read_results()
      for run in self.runs.values():
        run.load(kept)
      self.store.write_results(self.rows)
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Gives the work directory back to others."""
    self.store.close()

  @property
  def complete(self) -> bool:
    """Whether all attacks are finished."""
    return all(run.is_finished for run in self.runs.values())

  @property
  def seconds(self) -> float:
    """Seconds that all attacks took, those of earlier sessions included."""
    return sum(run.times.seconds for run in self.runs.values())

  @property
  def rows(self) -> list[dict[str, Any]]:
    """All rows of results.jsonl, attack after attack."""
    return [row.to_json() for run in self.runs.values() for row in run.rows]

  def finish(self, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes what is made of all results, and shows the table.

    Args:
      say: called with what a person should read.

    Returns:
      The summary.
    """
    clients, path = self.clients, self.store.path
    self.store.write_results(self.rows)
    originals = np.concatenate([clients.data.images] * self.settings.data.mask_seeds)
    attacks = {
      name: summarize(
        run.rows,
        len(originals),
        told=told(run.attack.masks, run.attack.labels),
        defence=defences.describe(self.settings.defence),
        pool=len(clients.pool),
        accuracy=trained_accuracy(clients.settings),
        epsilon=epsilon(clients.settings),
        **msgspec.structs.asdict(run.times),
      )
      for name, run in self.runs.items()
    }
    floors = evaluation.floors(clients.data.images, clients.pool, clients.data.statistics)
    summary = Summary(attacks=attacks, floors=floors).to_json()
    write_json(path("summary.json"), summary)
    labels = np.concatenate([clients.data.labels] * self.settings.data.mask_seeds)
    images = {name: run.images for name, run in self.runs.items()}
    write_npz(path("reconstructions.npz"), {"originals": originals, "labels": labels} | images)
    self._write_recordings()
    captions = {name: [_caption(row) for row in run.rows] for name, run in self.runs.items()}
    write_grid(path("grid.png"), originals, images, captions)
    say("\n" + table(attacks))
    say(f"\npictures: {path('grid.png')}")
    say(f"numbers:  {path('results.jsonl')}, {path('summary.json')}")
    times = sum((run.times for run in self.runs.values()), Times())
    say(
      f"time:     {duration(times.run_seconds)} run + {duration(times.compile_seconds)} compile"
      f" + {duration(times.scoring_seconds)} scoring"
    )
    return {name: summary[name] for name in attacks}

  def _write_recordings(self) -> None:
    """Writes how the first images formed; a trial that ended keeps its last picture."""
    kept = {}
    recorded = {
      name: [recording for _, recording in sorted(run.recordings.items())]
      for name, run in self.runs.items()
    }
    iterations = sorted({n for recordings in recorded.values() for r in recordings for n in r})
    for name, recordings in recorded.items():
      if not iterations or not all(recordings):
        continue
      frames = []
      for n in iterations:
        shown = [r[max((k for k in r if k <= n), default=min(r))] for r in recordings]
        frames.append(np.concatenate(shown)[:SHOWN])
      pixels = np.clip(np.stack(frames, axis=1), 0, 1)
      kept[name] = np.round(np.nan_to_num(pixels) * 255).astype(np.uint8)
    if kept:
      write_npz(self.store.path("recordings.npz"), {"iterations": np.asarray(iterations)} | kept)


def _caption(row: Row) -> str:
  if row.status in ("failed", "not_applicable"):
    return row.status.replace("_", " ")
  return f"MSE {row.scores['mse_normalized']:.1e}\nSSIM {row.scores['ssim']:.2f}"
