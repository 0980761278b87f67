"""Runs an experiment, in this process or on a cluster."""

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from jaxdia.experiment.cluster import Cluster
from jaxdia.experiment.config import validate
from jaxdia.experiment.description import describe
from jaxdia.experiment.experiment import Experiment
from jaxdia.experiment.progress import ProgressReport
from jaxdia.experiment.shared_lanes import lanes_of, plan, run_attack
from jaxdia.experiment.spread import Tally, Work, cut, fix_lanes, take


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  cluster: Any = None,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Attacks the configured images, and writes and returns what came of it.

  In the work directory are afterwards `config.json`, `manifest.json` of the first session and
  `sessions.jsonl` of all, `results.jsonl` (one object an image), `summary.json`,
  `reconstructions.npz`, `recordings.npz` if there was a search, and `grid.png`; `trials/` keeps
  finished trials, and `checkpoint/` running ones while they run. The same call goes on where
  it was interrupted, and ends with the same numbers (see `jaxdia.experiment.store`).

  Args:
    config: as made by the files in `configs/`.
    workdir: made if needed; refused if it belongs to another experiment, or if another process
      is in it.
    cluster: whose processes run the attacks, slices of the clients in each; this process if None.
      See `jaxdia.experiment.cluster.Cluster`.
    say: called with what a person should read.

  Returns:
    The summary: by attack, counts and statistics of each metric.

  Raises:
    InputError: something about the input; nothing has been written then, but
      for what was finished before a checkpoint turned out to be damaged.
  """
  settings, workdir = validate(config), pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(settings.precision == "float64"))
    workers = None if cluster is None else stack.enter_context(Cluster(cluster, say))
    experiment = Experiment(settings, workdir, devices=workers and workers.devices)
    experiment.begin()
    stack.enter_context(contextlib.closing(experiment))
    if workers is None:
      _run_here(experiment, say)
    else:
      _run_there(experiment, workers, say)
    return experiment.finish(say)


def _describe(
  experiment: Experiment, lanes: dict[str, int], where: str, say: Callable[[str], None]
) -> None:
  """Says what is about to be done, and what was done before."""
  attacks = {name: one.attack for name, one in experiment.runs.items()}
  say(describe(experiment.settings, experiment.clients, attacks, lanes, where))
  for name, one in experiment.runs.items():
    if finished := len(one.finished):
      say(f"{name}: {finished} of {one.trials} trials were finished before")


def _run_here(experiment: Experiment, say: Callable[[str], None]) -> None:
  """Runs what is left of each attack in this process."""
  alone, devices = {0: experiment}, experiment.store.devices
  lanes = {name: lanes_of(name, alone)[0] for name in experiment.runs}
  plans = {name: plan(name, alone, n or None) for name, n in lanes.items()}
  most = max(plans.values(), key=lambda one: one.lanes)
  kind = f"{devices[0].platform} device(s) ({devices[0].device_kind})"
  lanes = {name: one.lanes for name, one in plans.items()}
  _describe(experiment, lanes, f"{len(most.devices)} {kind}", say)
  for name in experiment.runs:
    progress = ProgressReport([name], [1.0])
    try:
      errors = run_attack(
        name,
        alone,
        checkpoint_path=experiment.store.path("checkpoint", f"{name}.npz"),
        on_progress=progress.update,
        note=progress.note,
        say=say,
      )
    finally:
      progress.close()
    for error in errors.values():
      raise error


def _run_there(experiment: Experiment, cluster: Cluster, say: Callable[[str], None]) -> None:
  """Lets a cluster run what is left of each attack."""
  alone = {0: experiment}
  settings, kind = {0: experiment.settings}, cluster.devices
  left = {name: one for name, one in experiment.runs.items() if not one.is_finished}
  lanes = dict.fromkeys(experiment.runs, 0)
  for name in left:
    lanes[name], errors = fix_lanes(name, alone, settings, cluster, say)
    for error in errors.values():
      raise error
  where = f"{kind.count} {kind.name} device(s) of {len(cluster.workers)} worker(s)"
  _describe(experiment, lanes, where, say)
  count = experiment.settings.data.gradients
  work = {
    (0, name): Work(count, count - len(one.unfinished), one.attack.max_iterations + 1.0)
    for name, one in experiment.runs.items()
  }
  parts = (part for name in left for part in cut(name, alone, lanes[name], cluster))
  tally = Tally(work, lambda: len(cluster.workers))
  with contextlib.closing(tally):
    for part, done in cluster.run(parts, tally.show):
      for error in take(alone, part, done, tally.say).values():
        raise error
      tally.add(part)
