import dataclasses
import os
import pathlib
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations, make_victims

from jaxdia import attacks, engine, gradients, models
from jaxdia.attacks import Status
from jaxdia.core.errors import InputError
from jaxdia.core.machine import forget_programs
from jaxdia.engine import Job

ONE_DEVICE = jax.local_devices()[:1]


@pytest.fixture(scope="module")
def victims(model):
  return make_victims(model, 3)


def _run(attack, victims, restarts=2, **options):
  masks = [s.masks for s in victims[2]] if attack.settings.masks == "known" else None
  task = engine.Task(jax.random.key(7), attack, victims[1], restarts, masks)
  return list(engine.run([task], **{"devices": ONE_DEVICE} | options))


def _by_job(trials):
  jobs = {trial.job: trial for trial in trials}
  assert len(jobs) == len(trials)
  return jobs


def test_each_trial_is_what_it_is_alone(model, victims):
  attack = attacks.dia(model, max_iterations=25)
  trials = _by_job(_run(attack, victims, lanes=4))
  assert set(trials) == {Job(v, r) for v in range(3) for r in range(2)}
  for job, trial in trials.items():
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), job.observation), job.restart)
    state = attacks.solve(key, attack, victims[1][job.observation])
    np.testing.assert_allclose(trial.objective, state.best.objective, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
      trial.candidate.images, state.best.candidate.images, rtol=1e-2, atol=1e-2
    )
    assert trial.iterations == 25 and trial.status == Status.MAX_ITERATIONS
    assert trial.best_iteration == int(state.best.iteration)


def test_recorded_images_are_the_best_ones_after_so_many_iterations(model, victims):
  attack = attacks.dia(model, max_iterations=25)
  recorded = (1, 4, 25, 400)
  plain = _by_job(_run(attack, victims, lanes=2))
  trials = _by_job(_run(attack, victims, lanes=2, chunk=3, record=recorded))
  step = jax.jit(attack.step)
  for job, trial in trials.items():
    np.testing.assert_array_equal(trial.candidate.images, plain[job].candidate.images)
    assert list(trial.recording) == [1, 4, 25] and not plain[job].recording
    np.testing.assert_array_equal(trial.recording[25], trial.candidate.images)
    observation = victims[1][job.observation]
    state = attack.init(engine.trial_key(jax.random.key(7), job), observation)
    for _ in range(4):
      state, _ = step(observation, state)
    best = attacks.project(observation, state.best.candidate).images
    np.testing.assert_allclose(trial.recording[4], best, atol=1e-3)
    assert not np.allclose(trial.recording[1], trial.recording[25], atol=1e-2)


def test_recorded_iterations_lie_closer_at_the_start():
  iterations = engine.recorded_iterations(20_000)
  assert iterations[0] == 1 and iterations[-1] == 20_000 and 24 <= len(iterations) <= 36
  assert list(iterations) == sorted(set(iterations))
  assert engine.recorded_iterations(2) == (1, 2) and engine.recorded_iterations(0) == ()


def test_one_device_and_eight_give_the_same(model):
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(0)))
    _, observations, secrets = make_victims(model, 3)
    observations = [
      dataclasses.replace(
        o, params=params, gradient=jax.tree.map(lambda x: x.astype(jnp.float64), o.gradient)
      )
      for o in observations
    ]
    attack = attacks.dia(model, max_iterations=40)
    cases = [
      {"devices": ONE_DEVICE, "lanes": 1},
      {"devices": ONE_DEVICE, "lanes": 6},
      {"devices": jax.local_devices(), "lanes": 1},
      {"devices": jax.local_devices()[:2], "lanes": 2, "chunk": 7},
    ]
    results = [_by_job(_run(attack, (params, observations, secrets), **case)) for case in cases]
  assert len(jax.local_devices()) == 8
  for other in results[1:]:
    for job, trial in results[0].items():
      assert trial.candidate.images.dtype == np.float64
      np.testing.assert_allclose(other[job].objective, trial.objective, rtol=1e-9)
      jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, 1e-7, 1e-9),
        other[job].candidate,
        trial.candidate,
      )


def test_the_well_informed_attacker_gets_the_masks_of_its_victim(model, victims):
  attack = attacks.wiig(model, max_iterations=300)
  for trial in _run(attack, victims, lanes=2, restarts=1):
    images = victims[2][trial.job.observation].images
    assert np.mean(np.square(trial.candidate.images - images)) < 0.02


def test_a_lane_that_is_done_gets_the_next_job(model, victims):
  """One lane runs three victims of which the second diverges at once."""
  _, observations, secrets = victims
  sick = dataclasses.replace(
    observations[1], gradient=jax.tree.map(lambda x: x * jnp.nan, observations[1].gradient)
  )
  attack = attacks.dia(model, max_iterations=20)
  reports = []
  trials = _run(
    attack,
    (None, [observations[0], sick, observations[2]], secrets),
    lanes=1,
    restarts=1,
    on_progress=reports.append,
  )
  assert [t.status for t in trials] == [
    Status.MAX_ITERATIONS,
    Status.DIVERGED,
    Status.MAX_ITERATIONS,
  ]
  assert trials[1].iterations == 1 and not np.isfinite(trials[1].objective)
  assert reports[-1].finished == reports[-1].total == 3
  assert reports[-1].steps == 41


def test_nothing_is_compiled_after_the_first_chunk_of_a_run(model, victims):
  """Though trials end, victims come and go, and lanes run out of jobs."""
  at_each_chunk = []
  with compilations() as compiled:
    trials = _run(
      attacks.dia(model, max_iterations=23),
      victims,
      lanes=2,
      restarts=3,
      chunk=5,
      on_progress=lambda progress: at_each_chunk.append(len(compiled)),
    )
  assert len(trials) == 9 and at_each_chunk[0] > 0
  assert set(at_each_chunk) == {at_each_chunk[0]} and len(compiled) == at_each_chunk[0]


def test_the_listener_above_would_notice():
  with compilations() as compiled:
    jax.jit(lambda x: x * 3.25)(jnp.ones(17))
  assert compiled


def test_an_interrupted_run_ends_like_one_left_alone(model, victims, tmp_path):
  attack = attacks.dia(model, max_iterations=400)
  alone = _by_job(_run(attack, victims, restarts=1, lanes=2))
  path = tmp_path / "checkpoint.npz"
  done = {}
  for _ in range(20):  # interrupted after each trial but the last
    finished = [(job.observation, job.restart) for job in done]
    task = engine.Task(jax.random.key(7), attack, victims[1], finished=finished)
    options = {"checkpoint_path": path, "checkpoint_seconds": 0.0}
    trials = engine.run([task], lanes=2, devices=ONE_DEVICE, **options)
    trial = next(trials, None)
    trials.close()
    if trial is None:
      break
    done[trial.job] = trial
  assert set(done) == set(alone)
  for job, trial in alone.items():
    assert done[job].iterations == trial.iterations
    np.testing.assert_array_equal(done[job].candidate.images, trial.candidate.images)
  assert not path.exists()


def test_resuming_with_other_lanes_keeps_what_finds_a_place(model, victims, tmp_path):
  attack = attacks.dia(model, max_iterations=3000)
  path = tmp_path / "checkpoint.npz"
  options = {"checkpoint_path": path, "checkpoint_seconds": 0.0, "restarts": 1}

  class Enough(Exception):
    pass

  def stop(progress):
    if progress.iteration > 100 and path.exists():
      raise Enough

  with pytest.raises(Enough):
    _run(attack, victims, lanes=3, on_progress=stop, **options)
  reports = []
  attack = attacks.dia(model, max_iterations=3000)
  trials = _by_job(_run(attack, victims, lanes=2, on_progress=reports.append, **options))
  assert len(trials) == 3
  total = sum(trial.iterations for trial in trials.values())
  assert reports[-1].steps < total - 100  # two of the three were taken up
  alone = _by_job(_run(attack, victims, lanes=2, restarts=1))
  for job, trial in alone.items():
    np.testing.assert_allclose(trials[job].objective, trial.objective, rtol=0.5)


def test_even_a_start_that_is_the_best_has_valid_pixels(model, victims):
  attack = attacks.ig(model, max_iterations=1)
  for trial in _run(attack, victims, lanes=2):
    assert trial.candidate.images.min() >= 0 and trial.candidate.images.max() <= 1


def test_results_do_not_depend_on_chunks(model, victims):
  attack = attacks.dia(model, max_iterations=30)
  results = [_by_job(_run(attack, victims, lanes=2, chunk=chunk)) for chunk in (1, 7, 1000)]
  for other in results[1:]:
    for job, trial in results[0].items():
      np.testing.assert_array_equal(other[job].candidate.images, trial.candidate.images)


def test_lanes_that_attack_one_victim_share_its_target(model, victims):
  """Two victims, and one, on four lanes: as many targets as victims, and the same results."""
  attack = attacks.dia(model, max_iterations=25)
  alone = _by_job(_run(attack, victims, lanes=1, restarts=3))
  for count in (2, 1):
    observations = victims[1][:count]
    prepared = gradients.prepare(model, observations[0], "formed")
    state = attack.init(jax.random.key(0), observations[0])
    program = engine.lanes.create_program(attack, prepared, state, 4, count, ONE_DEVICE)
    kernel = program.empty().slots.target.formed[("hidden_0", "kernel")]
    assert kernel.shape == (1, count, 36, 24)
    trials = _by_job(_run(attack, (None, observations, victims[2]), lanes=4, restarts=3))
    assert len(trials) == 3 * count
    for job, trial in trials.items():
      np.testing.assert_allclose(trial.objective, alone[job].objective, rtol=1e-3, atol=1e-6)


def test_victims_come_and_go_while_restarts_of_others_run(model, victims):
  """Six victims with trials of very different lengths, on three lanes with three slots."""
  _, observations, _ = make_victims(model, 6)
  sick = jax.tree.map(lambda x: x * jnp.nan, observations[0].gradient)
  for i in (1, 2, 4):
    observations[i] = dataclasses.replace(observations[i], gradient=sick)
  attack = attacks.dia(model, max_iterations=30)
  trials = _by_job(_run(attack, (None, observations, None), lanes=3, chunk=7))
  for job, trial in trials.items():
    assert (trial.status == Status.DIVERGED) == (job.observation in (1, 2, 4))
    if trial.status != Status.DIVERGED:
      alone = _by_job(_run(attack, (None, observations[:6], None), lanes=1, chunk=50))[job]
      np.testing.assert_allclose(trial.objective, alone.objective, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("when", [1, 3])
def test_out_of_memory_halves_the_lanes_and_goes_on(model, victims, monkeypatch, tmp_path, when):
  """Memory for two lanes only; it runs out in the given chunk."""
  create, asked = engine.lanes.create_program, []

  def create_in_little_memory(attack, observation, state, lanes, *args):
    asked.append(lanes)
    program = create(attack, observation, state, lanes, *args)
    chunks = iter(range(1000))

    def advance(state, steps):
      if lanes > 2 and steps and next(chunks) >= when:
        jax.tree.map(lambda x: x.delete(), state.lanes)  # as donated buffers are
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
      return program.advance(state, steps)

    return program._replace(advance=advance)

  monkeypatch.setattr(sys.modules["jaxdia.engine.loop"], "create_program", create_in_little_memory)
  said = []
  attack = attacks.dia(model, max_iterations=200)
  options = {"chunk": 20, "checkpoint_path": tmp_path / "c.npz", "checkpoint_seconds": 0.0}
  trials = _by_job(_run(attack, victims, lanes=6, say=said.append, **options))
  assert asked == [6, 3, 1]
  assert said == [
    "out of memory with 6 lanes a device; going on with 3",
    "out of memory with 3 lanes a device; going on with 1",
  ]
  monkeypatch.undo()
  alone = _by_job(_run(attack, victims, lanes=6))
  assert set(trials) == set(alone)
  for job, trial in alone.items():
    assert trials[job].iterations == trial.iterations
    np.testing.assert_allclose(trials[job].objective, trial.objective, rtol=0.5)


def test_out_of_memory_while_loading_loses_no_job(model, victims, monkeypatch):
  create = engine.lanes.create_program

  def create_in_little_memory(attack, observation, state, lanes, *args):
    program = create(attack, observation, state, lanes, *args)
    puts = iter(range(1000))

    def put(*args):
      if lanes > 2 and next(puts) == 2:  # after the first, which compiles, and a real one
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
      return program.put(*args)

    return program._replace(put=put)

  monkeypatch.setattr(sys.modules["jaxdia.engine.loop"], "create_program", create_in_little_memory)
  said, reports = [], []
  attack = attacks.dia(model, max_iterations=20)
  options = {"say": said.append, "on_progress": reports.append}
  trials = _by_job(_run(attack, victims, lanes=4, **options))
  assert set(trials) == {Job(v, r) for v in range(3) for r in range(2)}
  assert said == ["out of memory with 4 lanes a device; going on with 2"]
  assert reports[-1].finished == reports[-1].total == 6 and reports[-1].steps == 120


def test_what_does_not_fit_at_all_is_refused():
  """A real allocation that no machine can make: a batch of 10^13 images."""
  model = models.create("mlp", (8, 8, 1), 2, 0.5, hidden_sizes=(2,))
  _, observations, _ = make_victims(model, 1)
  said = []
  huge = dataclasses.replace(observations[0], batch_size=10**13, labels=None)
  attack = attacks.ig(model, labels="free")
  with pytest.raises(InputError, match="not even one trial fits into the memory"):
    list(
      engine.run(
        [engine.Task(jax.random.key(0), attack, [huge], restarts=2)],
        lanes=2,
        say=said.append,
        devices=ONE_DEVICE,
        matching="formed",
      )
    )
  assert said == ["out of memory with 2 lanes a device; going on with 1"]


def test_other_errors_of_the_runtime_are_not_swallowed(model, victims, monkeypatch):
  def fail(*args):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")

  monkeypatch.setattr(sys.modules["jaxdia.engine.loop"], "create_program", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    _run(attacks.dia(model), victims)


def test_a_checkpoint_is_removed_at_the_end(model, victims, tmp_path):
  path = tmp_path / "checkpoint.npz"
  attack = attacks.ig(model, max_iterations=5)
  _run(attack, victims, lanes=2, checkpoint_path=path, checkpoint_seconds=0.0)
  assert not path.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_compiled_programs_are_dropped_when_they_are_too_many():
  double = jax.jit(lambda x: 2 * x)
  double(1.0)
  forget_programs()
  assert double._cache_size() == 1
  forget_programs(most_maps=10)
  assert double._cache_size() == 0 and double(1.5) == 3


def _resident_bytes():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give back by themselves")
def test_memory_of_what_was_dropped_is_given_back():
  """As programs do, small pieces lie between others that stay."""
  size, count = 2**14, 2**14
  pieces = [b"x" * size for _ in range(count)]
  pieces = pieces[::64]
  before = _resident_bytes()
  forget_programs(most_maps=0)
  assert before - _resident_bytes() > 0.8 * size * count


def test_lanes_are_chosen_from_jobs_and_memory(model, victims):
  observation = victims[1][0]
  eight = jax.local_devices()
  assert engine.choose_lanes(model, observation, 3, ONE_DEVICE) == 3
  assert engine.choose_lanes(model, observation, 1000, ONE_DEVICE) == 32
  assert engine.choose_lanes(model, observation, 10, ONE_DEVICE) == 4
  assert engine.choose_lanes(model, observation, 64, eight[:2]) == 8
  for name, lanes in [("vit", 2), ("resnet18", 1)]:
    large = models.create(name, (32, 32, 3), 10)
    params = jax.eval_shape(large.init, jax.random.key(0))
    seen = dataclasses.replace(observation, params=params, gradient=params)
    assert engine.choose_lanes(large, seen, 1000, ONE_DEVICE) == lanes
