"""Cells of a study that share a compiled program and fill the lanes together."""

import json
import sys

import numpy as np
import pytest
from conftest import compilations

from jaxdia import engine, experiment, study
from jaxdia.core.errors import InputError
from jaxdia.core.machine import forget_programs
from jaxdia.experiment import Experiment
from jaxdia.experiment.clients import KEPT
from jaxdia.experiment.config import config_for
from jaxdia.study import Group, group

RATES_AND_WEIGHTS = [
  ("model.dropout_rate", (0.3, 0.6)),
  ("attack.mask_weight", (0.0, 1e-4, 1e-2)),
]


def _base(**attack):
  base = config_for("mlp", "mnist", hidden_sizes=(32, 32))
  base.data.count, base.engine.lanes = 2, 2
  base.attack.max_iterations = 30
  base.attack.update(attack)
  return base


def _study(*, base=None, **fields):
  return study.study_config("T", "Q?", base or _base(), **fields)


def _silent(text):
  del text


def _rows(workdir):
  rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
  return [
    {k: v for k, v in row.items() if not k.startswith(("seconds", "session"))} for row in rows
  ]


def _groups(config):
  return group(study.plan(config))


def test_cells_that_differ_in_numbers_rates_seeds_and_images_are_one_group():
  grid = [
    ("model.dropout_rate", (0.1, 0.75)),
    ("attack.learning_rate", (0.1, 0.01)),
    ("seed", (0, 1)),
    ("data.source", ("samples:mnist", "samples:fashion_mnist")),
    ("data.mask_seeds", (1, 2)),
    ("attack.restarts", (1, 3)),
  ]
  (one,) = _groups(_study(grid=grid))
  assert one == Group("dia", tuple(range(64)))
  assert study.describe(_study(grid=grid)).endswith("\n\nin the same lanes: dia in 64 cells")


@pytest.mark.parametrize(
  ("field", "values"),
  [
    ("model.dropout_rate", (0.0, 0.5)),
    ("model.hidden_sizes", ((16,), (16, 16))),
    ("data.batch_size", (1, 2)),
    ("data.source", ("samples:mnist", "samples:cifar10")),
    ("attack.max_iterations", (5, 6)),
    ("attack.labels", ("given", "free")),
    ("attack.round_masks_after", (None, 3)),
    ("precision", ("float32", "float64")),
    ("engine.matching", ("formed", "auto")),
    ("data.statistics", ("mnist", "cifar10")),
  ],
)
def test_cells_of_other_programs_are_apart(field, values):
  assert _groups(_study(grid=[(field, values)])) == [Group("dia", (0,)), Group("dia", (1,))]


def test_groups_are_what_the_engine_runs_together(tmp_path):
  """Neighbours in a study are of one group if the engine takes their tasks at once, and only then.

  Where only a program is another one; the engine's own settings are not the tasks'.
  """
  base = _base(name="ig,dia", max_iterations=5)
  base.data.batch_size = base.data.count = 2
  grid = [
    ("model.dropout_rate", (0.0, 0.2, 0.6)),
    ("attack.labels", ("given", "free")),
    ("data.source", ("samples:mnist", "samples:fashion_mnist", "samples:cifar10")),
    ("data.source,data.statistics", (("samples:cifar10", "mnist"),)),
    ("data.batch_size", (1,)),
    ("defence.name", ("clipping", "top_k")),
    ("defence.name,defence.std", (("gaussian_noise", 0.1), ("gaussian_noise", 0.2))),
    ("local.steps,local.learning_rate", ((2, 0.1), (2, 0.2))),
    ("local.epochs", (2,)),
    ("local.shuffle", (True,)),
    ("local.shuffle,local.epochs", ((True, 2),)),
    ("local.momentum", (0.5,)),
  ]
  cells = [
    cell
    for fields, values in grid
    for value in values
    for cell in study.plan(_study(base=_with(base, fields, value)))
  ]
  groups = {
    (one.attack, number): place for place, one in enumerate(group(cells)) for number in one.cells
  }
  together = 0
  for name in ("ig", "dia"):
    tasks = [_task(cell, name, tmp_path) for cell in cells]
    for first in range(len(cells)):
      engine.checks.check_tasks(tasks[first])
      for second in range(first):
        pair = [tasks[first], tasks[second]]
        if groups[name, first] == groups[name, second]:
          together += engine.checks.check_tasks(pair) != []
        else:
          with pytest.raises(InputError, match="of its own"):
            engine.checks.check_tasks(pair)
  assert together > 20


def _with(base, fields, value):
  config = base.copy_and_resolve_references()
  pairs = zip(fields.split(","), value if "," in fields else (value,), strict=True)
  for field, one in pairs:
    part, name = field.split(".")
    config[part][name] = one
  return config


def _task(cell, name, folder):
  task = Experiment(cell.settings, folder / "none").runs[name].plan()
  return task._replace(observations=[task.observations[0]], finished=[(0, 0)])


def test_a_cell_whose_clients_cannot_be_is_alone_and_does_no_harm_to_others():
  base = _base()
  base.local.epochs = 2  # Soteria is of a single step
  config = _study(base=base, grid=[("defence.name", ("none", "soteria", "clipping"))])
  assert _groups(config) == [Group("dia", (n,)) for n in range(3)]


def test_each_attack_is_a_group_and_closed_forms_are_alone():
  base = _base(name="ig,wiig,closed_form")
  config = _study(base=base, grid=[("model.dropout_rate", (0.2, 0.4, "high"))])
  assert _groups(config) == [
    Group("ig", (0, 1)),
    Group("wiig", (0, 1)),
    Group("closed_form", (0,)),
    Group("closed_form", (1,)),
  ]


def test_clients_that_do_not_fit_into_the_memory_together_are_apart(monkeypatch):
  base = _base(name="ig,dia")
  config = _study(base=base, grid=[("model.dropout_rate", (0.2, 0.4, 0.6))])
  assert len(_groups(config)) == 2
  entries = 784 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
  # A quarter of it holds the weights and the gradients that are kept of two cells.
  total = 4 * (1 + KEPT) * (entries * 4) * 2
  monkeypatch.setattr("jaxdia.study.groups.memory_of", lambda device: total)
  assert _groups(config) == [
    *(Group("ig", (0, 1)), Group("dia", (0, 1))),
    *(Group("ig", (2,)), Group("dia", (2,))),
  ]
  # Cells with the same clients have them in common.
  config = _study(grid=[("attack.mask_weight", tuple(range(9)))])
  assert _groups(config) == [Group("dia", tuple(range(9)))]


def test_six_cells_are_compiled_as_one(tmp_path):
  """A cell of twelve trials, and six of two each, of networks that nobody compiled before."""
  forget_programs(most_maps=0)  # else programs may be dropped in between, if there are many by now
  study.run(_study(), tmp_path / "first", say=_silent)  # what is compiled once a process
  whole, parts = _base(), _base()
  whole.model.hidden_sizes, parts.model.hidden_sizes = (31, 32), (30, 32)
  whole.data.count = 12
  with compilations() as one:
    study.run(_study(base=whole), tmp_path / "one", say=_silent)
  with compilations() as six:
    study.run(_study(base=parts, grid=RATES_AND_WEIGHTS), tmp_path / "six", say=_silent)
  assert len(_rows(tmp_path / "one")) == len(_rows(tmp_path / "six")) == 12

  # Single operations on arrays may have been compiled by whatever ran before in the process.
  def count(compiled):
    names = ("init_trial", "client_gradient", "_with_device_axis", "_fun")  # the last: by pmap
    return {name: sum(f"({name})" in str(program) for program in compiled) for name in names}

  assert count(six) == count(one) and count(one)["init_trial"] == 1


def test_cells_fill_the_lanes_together_and_end_as_each_does_alone(tmp_path, monkeypatch):
  reports = []
  run = engine.run

  def spy(tasks, *, on_progress, **options):
    def report(progress):
      reports.append((len(tasks), progress.total))
      on_progress(progress)

    return run(tasks, on_progress=report, **options)

  monkeypatch.setattr(engine, "run", spy)
  config = _study(grid=[*RATES_AND_WEIGHTS, ("seed", (0, 5))])
  assert study.run(config, tmp_path / "study", say=_silent) == {}
  assert set(reports) == {(12, 24)}
  monkeypatch.undo()
  cells = study.plan(config)
  rows = _rows(tmp_path / "study")
  for cell in (cells[0], cells[5], cells[10]):
    experiment.run(cell.config, tmp_path / cell.name, say=_silent)
    alone = _rows(tmp_path / cell.name)
    together = [row for row in rows if row["cell"] == cell.name]
    assert len(alone) == len(together) == 2
    for a, b in zip(alone, together, strict=True):
      assert a["iterations"] == b["iterations"] and a["dropout_rate"] == b["dropout_rate"]
      for name in ("mse_normalized", "objective", "mask_accuracy"):
        np.testing.assert_allclose(a[name], b[name], rtol=0.02)
    times = json.loads((tmp_path / "study" / "cells" / cell.name / "summary.json").read_text())
    assert times["dia"]["run_seconds"] > 0 and times["dia"]["compile_seconds"] > 0


def test_a_cell_that_fails_does_not_take_those_with_it_that_share_its_lanes(tmp_path, monkeypatch):
  """One at its start, because its folder is another's; and one when it is scored."""
  config = _study(grid=[("attack.tv_weight", (0.0, 1e-6, 1e-5, 1e-4))])
  cells = study.plan(config)
  folder = tmp_path / "cells" / cells[1].name
  folder.mkdir(parents=True)
  (folder / "config.json").write_text('{"seed": 77}')
  scoring = sys.modules["jaxdia.experiment.attack_run"]
  score = scoring.score

  def fail(settings, *arguments):
    if settings.attacks["dia"].tv_weight == 1e-5:
      raise ValueError("too ugly\nto look at")
    return score(settings, *arguments)

  monkeypatch.setattr(scoring, "score", fail)
  failures = study.run(config, tmp_path, say=_silent)
  assert set(failures) == {cells[1].name, cells[2].name}
  assert "another experiment" in failures[cells[1].name]
  assert failures[cells[2].name] == "ValueError: too ugly"
  assert {row["cell"] for row in _rows(tmp_path)} == {cells[0].name, cells[3].name}
  # Once the reasons are gone, the same call ends the study, and repeats nothing: the trials of
  # the cell that could not be scored are there too.
  monkeypatch.undo()
  (folder / "config.json").unlink()
  before = _stamps(tmp_path)
  assert len(before) == 6
  assert study.run(config, tmp_path, say=_silent) == {}
  assert len(_rows(tmp_path)) == 8 and before.items() <= _stamps(tmp_path).items()


def _stamps(workdir):
  return {path: path.stat().st_mtime_ns for path in workdir.glob("cells/*/trials/*/*.npz")}


def test_an_error_of_the_engine_takes_no_finished_cell_with_it(tmp_path, monkeypatch):
  """It ends the first run of the group after two trials; then each cell is run by itself."""
  calls = []

  def broken(tasks, **options):
    calls.append([task.number for task in tasks])
    trials = run(tasks, **options)
    if calls == [[0, 1, 2]]:
      yield from (next(trials) for _ in range(2))
      raise RuntimeError("something of the engine")
    if tasks[0].number == 2:
      raise ValueError("only this one")
    yield from trials

  run = engine.run
  monkeypatch.setattr(engine, "run", broken)
  config = _study(grid=[("attack.tv_weight", (0.0, 1e-6, 1e-5))])
  config.base.engine.lanes, config.base.engine.chunk = 1, 5
  config.base.data.count = 1
  cells = study.plan(config)
  failures = study.run(config, tmp_path, say=_silent)
  assert calls[0] == [0, 1, 2] and [2] in calls
  assert failures.get(cells[2].name, "ValueError: only this one") == "ValueError: only this one"
  assert {row["cell"] for row in _rows(tmp_path)} >= {cells[0].name, cells[1].name}


@pytest.mark.slow
def test_a_group_that_is_interrupted_again_and_again_ends_like_one_left_alone(
  tmp_path, monkeypatch
):
  def interrupted(tasks, *, on_progress, **options):
    turns = iter(range(2))

    def report(progress):
      on_progress(progress)
      if next(turns, None) is None:
        raise KeyboardInterrupt

    return run(tasks, on_progress=report, **options)

  base = _base(name="ig,dia")
  base.engine.chunk, base.engine.checkpoint_seconds = 5, 0
  config = _study(base=base, grid=[*RATES_AND_WEIGHTS, ("precision", ("float32", "half"))])
  scoring = sys.modules["jaxdia.experiment.attack_run"]
  score = scoring.score

  def fail(settings, *arguments):
    if settings.model.dropout_rate == 0.6 and settings.attacks["dia"].mask_weight == 1e-2:
      raise ValueError("this cell fails each time")
    return score(settings, *arguments)

  monkeypatch.setattr(scoring, "score", fail)
  alone = study.run(config, tmp_path / "alone", say=_silent)
  assert len(alone) == 7  # six that cannot be run, and the one above
  run, calls, stamps = engine.run, 0, {}
  monkeypatch.setattr(engine, "run", interrupted)
  while True:
    calls += 1
    try:
      assert study.run(config, tmp_path / "killed", say=_silent) == alone
      break
    except KeyboardInterrupt:
      assert calls < 50
      assert stamps.items() <= _stamps(tmp_path / "killed").items()  # no trial was run again
      stamps = _stamps(tmp_path / "killed")
  assert calls > 3 and len(stamps) > 5
  assert _rows(tmp_path / "killed") == _rows(tmp_path / "alone")
