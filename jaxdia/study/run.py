"""Runs a study, in this process or on a cluster."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from jaxdia import evaluation
from jaxdia.core.machine import forget_programs
from jaxdia.experiment.cluster import Cluster
from jaxdia.experiment.progress import ProgressReport
from jaxdia.experiment.spread import Tally
from jaxdia.study.cost import estimate
from jaxdia.study.groups import group
from jaxdia.study.plan import Cell, plan
from jaxdia.study.study import Study


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  cluster: Any = None,
  say: Callable[[str], None] = print,
) -> dict[str, str]:
  """Runs what is left of a study.

  In the work directory are afterwards `study.json`, `sessions.jsonl`, `results.jsonl` and
  `results.csv` with all rows, `table.md` and `table.csv` with a line for each cell and attack,
  and `cells/`, a work directory of each experiment. The same call goes on where it was
  interrupted, and tries again what failed.

  Args:
    config: of `study_config`.
    workdir: made if needed; refused if it belongs to another study, or if another process is
      in it.
    cluster: whose processes run the cells, slices of the clients in each; this process if None.
      See `jaxdia.experiment.cluster.Cluster`.
    say: called with what a person should read.

  Returns:
    {cell name: reason} of those that failed.

  Raises:
    InputError: see `plan`; or the work directory cannot be used.
  """
  cells, workdir = plan(config), pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    workers = None if cluster is None else stack.enter_context(Cluster(cluster, say))
    study = stack.enter_context(contextlib.closing(Study(config, cells, workdir, workers)))
    study.begin()
    if workers is None:
      _run_here(study, cells)
    else:
      _run_there(study, cells, workers)
    return _end(study, say)


def _run_here(study: Study, cells: Sequence[Cell]) -> None:
  """Runs what is left in this process, group after group."""
  groups = group(cells)
  costs = [sum(estimate(cells[n], one.attack) for n in one.cells) for one in groups]
  progress = ProgressReport([one.describe(cells) for one in groups], costs)
  with contextlib.closing(progress):
    study.refuse(progress.say)
    for number, one in enumerate(groups):
      progress.start(number)
      progress.finish(number, study.run_group(one, progress))
      forget_programs()


def _run_there(study: Study, cells: Sequence[Cell], cluster: Cluster) -> None:
  """Lets a cluster run what is left, parts of all groups side by side."""
  groups = group(cells)
  work = {
    (n, one.attack): study.work_of(n, one.attack, estimate(cells[n], one.attack))
    for one in groups
    for n in one.cells
  }
  tally = Tally(work, lambda: len(cluster.workers))
  with contextlib.closing(tally):
    study.refuse(tally.say)
    parts = (part for one in groups for part in study.cut_group(one, tally))
    for part, done in cluster.run(parts, tally.show):
      study.take(part, done, tally.say)
      tally.add(part)


def _end(study: Study, say: Callable[[str], None]) -> dict[str, str]:
  if not study.failures():
    shutil.rmtree(study.workdir / "checkpoint", ignore_errors=True)
  table = study.write()
  names = ["cell", "attack", *(column.key for _, column in evaluation.columns("study"))]
  shown = table[[name for name in names if name in table]].dropna(axis="columns", how="all")
  say("\n" + shown.to_string(index=False, float_format="{:.3g}".format, na_rep="-"))
  say(f"\nnumbers: {study.workdir / 'table.csv'}, {study.workdir / 'results.csv'}")
  return study.failures()
