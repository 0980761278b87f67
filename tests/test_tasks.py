"""Attacks that share a compiled program fill the lanes together."""

import collections.abc
import dataclasses
import weakref

import jax
import numpy as np
import pytest
from conftest import compilations, make_victims

from jaxdia import attacks, engine, models
from jaxdia.core.errors import InputError

DEVICES = jax.local_devices()[:2]


def _task(attack, victims, seed=7, **fields):
  masks = [s.masks for s in victims[2]] if attack.settings.masks == "known" else None
  return engine.Task(jax.random.key(seed), attack, victims[1], masks=masks, **fields)


def _at_rates(model, rates):
  return dataclasses.replace(model, rates=rates)


def _alone(task, **options):
  return {trial.job[:2]: trial for trial in engine.run([task], devices=DEVICES, **options)}


def _together(tasks, **options):
  trials = list(engine.run(tasks, devices=DEVICES, **options))
  found = [{} for _ in tasks]
  for trial in trials:
    found[trial.job.task][trial.job[:2]] = trial
  assert sum(map(len, found)) == len(trials)
  return found


def _assert_equal(found, expected):
  assert set(found) == set(expected)
  for job, trial in expected.items():
    assert found[job].iterations == trial.iterations and found[job].status == trial.status
    np.testing.assert_allclose(found[job].objective, trial.objective, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
      found[job].candidate.images, trial.candidate.images, rtol=1e-2, atol=1e-2
    )


def test_tasks_of_other_numbers_rates_and_weights_end_as_each_does_alone(model):
  """A narrow MLP at two rates and two draws of its weights, attacked with other settings."""
  steep = _at_rates(model, dict.fromkeys(model.rates, 0.6))
  victims = [make_victims(model, 3), make_victims(steep, 2), make_victims(model, 2, seed=1)]
  tasks = [
    _task(attacks.dia(model, max_iterations=40), victims[0]),
    _task(attacks.dia(model, max_iterations=40, learning_rate=0.02, patience=9), victims[0], 8),
    _task(attacks.dia(steep, max_iterations=40, mask_weight=0.1, tv_weight=0), victims[1]),
    _task(attacks.dia(model, max_iterations=40, plateau_patience=3), victims[2], restarts=2),
  ]
  found = _together(tasks, lanes=2)
  for task, trials in zip(tasks, found, strict=True):
    _assert_equal(trials, _alone(task, lanes=2))


def test_one_program_is_compiled_for_all_of_them(model):
  steep = _at_rates(model, dict.fromkeys(model.rates, 0.6))
  shallow = _at_rates(model, {"dropout_0": 0.1, "dropout_1": 0.2})
  victims = [make_victims(m, 2, seed=i) for i, m in enumerate((model, steep, shallow))]
  attack = attacks.wiig(model, max_iterations=7)
  with compilations() as one:
    _together([_task(attack, victims[0])], lanes=1)
  weights = enumerate((0.0, 1e-3, 1e-5))
  tasks = [
    _task(attacks.wiig(m, max_iterations=7, tv_weight=w), victims[i])
    for (i, w), m in zip(weights, (model, steep, shallow), strict=True)
  ]
  with compilations() as three:
    assert [len(found) for found in _together(tasks, lanes=1)] == [2, 2, 2]
  assert len(one) > 0 and not three


def test_lanes_are_filled_by_several_tasks(model):
  """Two tasks of two trials each on four lanes: all run from the first chunk on."""
  victims = make_victims(model, 2)
  tasks = [
    _task(attacks.dia(model, max_iterations=12), victims),
    _task(attacks.dia(model, max_iterations=12, learning_rate=0.01), victims),
  ]
  reports = []
  _together(tasks, lanes=2, chunk=4, on_progress=reports.append)
  assert [report.running_steps for report in reports] == [16, 32, 0]
  np.testing.assert_allclose(sum(reports[-1].task_seconds.values()), reports[-1].run_seconds)
  assert min(reports[-1].task_seconds.values()) > 0


def test_devices_share_out_the_params_so_that_all_lanes_are_filled(model):
  """Three params with four trials each on two devices; a third of them waits."""
  victims = [make_victims(model, 4, seed=seed) for seed in range(3)]
  attack = attacks.dia(model, max_iterations=8)
  reports = []
  _together([_task(attack, v) for v in victims], lanes=9, chunk=4, on_progress=reports.append)
  assert [report.running_steps for report in reports] == [8 * 4, 0, 4 * 4, 0]


def test_victims_with_the_same_gradient_but_other_labels_are_apart(model):
  params, (observation,), secrets = make_victims(model, 1)
  other = dataclasses.replace(observation, labels=(observation.labels + 1) % model.num_classes)
  attack = attacks.dia(model, max_iterations=20)
  pair = list(engine.run([engine.Task(jax.random.key(7), attack, [observation, other])], lanes=2))
  alone = _alone(_task(attack, (params, [other], secrets)), lanes=1)[0, 0]
  swapped = [engine.Task(jax.random.key(7), attack, [other, observation])]
  (first, _) = sorted(engine.run(swapped, lanes=2), key=lambda trial: trial.job)
  np.testing.assert_allclose(first.objective, alone.objective, rtol=1e-3)
  assert abs(sorted(pair, key=lambda t: t.job)[0].objective - first.objective) > 1e-3


def test_tasks_that_attack_the_same_victims_share_their_slots(model, monkeypatch):
  created = []
  create = engine.lanes.create_program

  def spy(attack, observation, state, lanes, slots, *rest):
    created.append(slots)
    return create(attack, observation, state, lanes, slots, *rest)

  monkeypatch.setattr("jaxdia.engine.loop.create_program", spy)
  victims = make_victims(model, 1)
  tasks = [_task(attacks.dia(model, max_iterations=3, mask_weight=w), victims) for w in (0, 1, 2)]
  _together(tasks, lanes=3)
  assert created == [1]


def test_an_interrupted_run_of_tasks_ends_like_one_left_alone(model, tmp_path):
  victims = [make_victims(model, 2), make_victims(model, 2, seed=1)]
  path = tmp_path / "checkpoint.npz"

  def tasks(done):
    return [
      _task(
        attacks.dia(model, max_iterations=60, learning_rate=0.1 / (1 + number)),
        victims[number],
        finished=[job[:2] for job in done if job.task == number],
      )
      for number in range(2)
    ]

  alone = {trial.job: trial for trial in engine.run(tasks([]), devices=DEVICES[:1], lanes=2)}
  done = {}
  for _ in range(9):  # interrupted after each trial but the last
    options = {"chunk": 7, "checkpoint_path": path, "checkpoint_seconds": 0.0}
    trials = engine.run(tasks(done), devices=DEVICES[:1], lanes=2, **options)
    trial = next(trials, None)
    trials.close()
    if trial is None:
      break
    done[trial.job] = trial
  assert set(done) == set(alone) and len(alone) == 4
  for job, trial in alone.items():
    assert done[job].iterations == trial.iterations
    np.testing.assert_array_equal(done[job].candidate.images, trial.candidate.images)


@pytest.mark.parametrize(
  "other",
  [
    {"masks": "known"},
    {"labels": "recovered"},
    {"distance": "squared_l2"},
    {"optimizer": "adam"},
    {"schedule": "constant"},
    {"max_iterations": 21},
    {"plateau_factor": 0.2},
    {"round_masks_after": 3},
  ],
)
def test_what_is_another_program_is_refused(model, other):
  victims = make_victims(model, 1)
  tasks = [_task(attacks.dia(model, **{"max_iterations": 20} | o), victims) for o in ({}, other)]
  with pytest.raises(InputError, match="task 1 needs another program"):
    list(engine.run(tasks))


def test_another_network_is_another_program(model):
  twin = models.create("mlp", (6, 6, 1), 4, 0.4, hidden_sizes=(24, 24))
  victims = make_victims(model, 1)
  with pytest.raises(InputError, match="task 1 needs another program"):
    list(engine.run([_task(attacks.dia(m), victims) for m in (model, twin)]))


def test_observations_of_other_forms_are_refused(model):
  victims = make_victims(model, 2)
  larger = dataclasses.replace(victims[1][1], batch_size=2, labels=[0, 1])
  without = dataclasses.replace(victims[1][1], labels=None)
  for other in (larger, without):
    task = engine.Task(jax.random.key(0), attacks.dia(model), [victims[1][0], other])
    with pytest.raises(InputError, match="observation 1 of task 0 has another batch size"):
      list(engine.run([task]))


def test_nothing_to_attack_is_refused(model):
  task = engine.Task(jax.random.key(0), attacks.dia(model), [])
  with pytest.raises(InputError, match="0 observations and 1 restarts"):
    list(engine.run([task]))
  with pytest.raises(InputError, match="no tasks"):
    list(engine.run([]))


class _Lazy(collections.abc.Sequence):
  """Observations that are computed when they are asked for, and counts them."""

  def __init__(self, observations):
    self._observations = observations
    self.asked, self._made = [], []

  def __len__(self):
    return len(self._observations)

  def __getitem__(self, number):
    self.asked.append(number)
    kept = self._observations[number]
    new = dataclasses.replace(kept, gradient=jax.tree.map(lambda x: x + 0, kept.gradient))
    self._made.append(weakref.ref(new.gradient["hidden_0"]["kernel"]))
    return new

  def count_alive(self):
    return sum(made() is not None for made in self._made)


def test_observations_are_asked_for_when_they_are_attacked_and_not_kept(model):
  victims = make_victims(model, 12)
  lazy = _Lazy(victims[1])
  attack = attacks.dia(model, max_iterations=6)
  alive = []
  task = engine.Task(jax.random.key(7), attack, lazy, restarts=2)
  trials = engine.run(
    task, lanes=2, devices=DEVICES[:1], on_progress=lambda _: alive.append(lazy.count_alive())
  )
  found = {trial.job[:2]: trial for trial in trials}
  _assert_equal(found, _alone(_task(attack, victims, restarts=2), lanes=2))
  assert len(found) == 24 and max(alive) <= 4
  assert len(lazy.asked) <= 12 + 6  # each once, but for the first, at which forms are looked up


def test_tasks_on_one_sequence_share_its_slots(model, monkeypatch):
  lazy = _Lazy(make_victims(model, 2)[1])
  tasks = [
    engine.Task(jax.random.key(7), attacks.dia(model, max_iterations=4, mask_weight=w), lazy)
    for w in (0.0, 1.0)
  ]
  assert len(list(engine.run(tasks, lanes=4, devices=DEVICES[:1]))) == 4
  assert lazy.asked.count(1) == 1


def test_a_gradient_of_another_form_gets_a_program_of_its_own(model):
  """Noise leaves no kernel of low rank, which all others are kept as factors of."""
  wide = models.create("mlp", (6, 6, 1), 5, 0.25, hidden_sizes=(64, 64))
  _, observations, _ = make_victims(wide, 3)
  noisy = jax.tree.map(lambda x: x + 1e-2 * np.sin(np.arange(x.size)).reshape(x.shape).astype("f"),
                       observations[1].gradient)  # fmt: skip
  observations[1] = dataclasses.replace(observations[1], gradient=noisy)
  attack = attacks.dia(wide, max_iterations=20)
  task = engine.Task(jax.random.key(7), attack, observations)
  together = {t.job.observation: t for t in engine.run(task, lanes=2, devices=DEVICES[:1])}
  assert list(together) == [0, 2, 1]
  for number, trial in together.items():
    key = engine.trial_key(task.key, engine.Job(number, 0))
    state = attacks.solve(key, attack, observations[number])
    np.testing.assert_allclose(trial.objective, state.best.objective, rtol=1e-2)


def test_other_params_within_a_task_are_refused(model):
  (first, _), (_, other) = (make_victims(model, 2, seed=seed)[1] for seed in range(2))
  task = engine.Task(jax.random.key(0), attacks.dia(model, max_iterations=3), [first, other])
  with pytest.raises(InputError, match="observation 1 of task 0 was made at other params"):
    list(engine.run(task))


def test_attacks_without_steps_take_no_lane(model):
  victims = make_victims(model, 2)
  attack = attacks.closed_form(model)
  parts = [attack.recover(jax.random.key(i), o) for i, o in enumerate(victims[1])]
  task = engine.Task(jax.random.key(7), attack, victims[1], parts=parts)
  assert engine.plan([task]).lanes == 0
  trials = list(engine.run(task))
  assert [t.job for t in trials] == [engine.Job(0, 0), engine.Job(1, 0)]
  for trial, recovery, secret in zip(trials, parts, victims[2], strict=True):
    assert trial.iterations == 0 and trial.status == attacks.Status.NO_SEARCH
    np.testing.assert_array_equal(trial.candidate.images, recovery.parts.images)
    np.testing.assert_allclose(trial.candidate.images, secret.images, atol=1e-4)


def test_what_a_task_lacks_is_said_before_anything_runs(model):
  observations = make_victims(model, 2)[1]

  def refuse(match, attack, **fields):
    with pytest.raises(InputError, match=match):
      engine.run(engine.Task(jax.random.key(0), attack, observations, **fields))

  refuse(r"engine.Task\(..., masks=\[...\]\)", attacks.wiig(model))
  refuse(r"engine.Task\(..., parts=\[parts, ...\]\)", attacks.hybrid(model))
  refuse("has 1 masks for 2 observations", attacks.wiig(model), masks=[{}])


def test_lanes_that_have_ended_are_recorded_no_more(model, monkeypatch):
  """The third trial runs beside the second, which ended at a recorded iteration and stays there."""
  records, cond = [], jax.lax.cond

  def spy(is_due, record, keep, *operands):
    def told(*operands):
      jax.debug.callback(lambda: records.append(1))
      return record(*operands)

    # Recorded images alone have so many axes: lane, iteration, and those of a batch.
    is_recording = any(getattr(x, "ndim", 0) == 6 for x in operands)
    return cond(is_due, told if is_recording else record, keep, *operands)

  monkeypatch.setattr(jax.lax, "cond", spy)
  attack = attacks.ig(model, max_iterations=11)
  task = _task(attack, make_victims(model, 3))
  trials = list(engine.run(task, devices=DEVICES[:1], lanes=2, chunk=4, record=(3, 11)))
  assert [trial.iterations for trial in trials] == [11] * 3
  assert len(records) == 4  # at 3 and at 11, for the first two at once and for the third
