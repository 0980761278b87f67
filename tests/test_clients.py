"""Clients of an experiment: gradients that are computed when they are asked for."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_cases import silent, small

from jaxdia import closed_form, engine, experiment
from jaxdia.experiment import Clients, Experiment, attack_run, clients
from jaxdia.experiment.clients import KEPT
from jaxdia.experiment.config import validate


def _many(tmp_path, count, **attack):
  """A config of many tiny images."""
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(count, 4, 4, 1)).astype(np.float32)
  np.savez(tmp_path / "images.npz", images=images, labels=np.arange(count) % 3)
  config = small(**attack)
  config.data.source, config.data.count = f"npz:{tmp_path}/images.npz", count
  config.model.hidden_sizes = (4,)
  return config


@pytest.fixture
def alive(monkeypatch):
  """Lists how many gradients were alive each time that one was computed."""
  gradients, counts = [], []
  observe = clients.observe

  def spy(*arguments, **options):
    observation, secret = observe(*arguments, **options)
    gradients.append(weakref.ref(jax.tree.leaves(observation.gradient)[0]))
    counts.append(sum(gradient() is not None for gradient in gradients))
    return observation, secret

  monkeypatch.setattr(clients, "observe", spy)
  return counts


def test_no_gradient_of_ten_thousand_images_is_computed_before_it_is_needed(tmp_path, alive):
  of_many = Clients(validate(_many(tmp_path, 10_000)).clients)
  assert not alive
  assert len(of_many.observations) == len(of_many.secrets) == 10_000
  for number in (9_999, 0, 9_999, 17, 17):
    expected = np.asarray(of_many.data.labels[number])
    assert of_many.observations[number].labels == expected == of_many.secrets[number].labels
    assert of_many.unlabelled[number].labels is None
  assert len(alive) == 3
  with pytest.raises(IndexError):
    of_many.observations[10_000]


def test_few_gradients_are_alive_while_many_are_attacked(tmp_path, alive):
  experiment.run(_many(tmp_path, 60, name="ig", max_iterations=1), tmp_path / "run", say=silent)
  devices, lanes = 8, 1
  assert len(alive) >= 60 and max(alive) <= 2 * devices * lanes + KEPT


def test_a_gradient_is_the_same_whenever_it_is_asked_for():
  config = small()
  config.data.mask_seeds, config.data.batch_size = 2, 3
  one, other = (Clients(validate(config).clients) for _ in range(2))
  first = [one.observations[i].gradient for i in range(2)]
  again = [other.observations[i].gradient for i in (1, 0)][::-1]
  jax.tree.map(np.testing.assert_array_equal, first, again)
  # The second mask seed is of the same client, under other masks.
  np.testing.assert_array_equal(one.secrets[0].images, one.secrets[1].images)
  assert any(np.any(one.masks[0][site] != one.masks[1][site]) for site in one.masks[0])


def test_a_closed_form_draws_from_a_key_of_no_trial(tmp_path, monkeypatch):
  keys = []
  recover = closed_form.recover

  def spy(key, *arguments):
    keys.append(key)
    return recover(key, *arguments)

  monkeypatch.setattr(closed_form, "recover", spy)
  config = small(name="hybrid", restarts=3, max_iterations=2)
  experiment.run(config, tmp_path, say=silent)
  assert len(keys) == 3
  task = Experiment(validate(config), tmp_path).runs["hybrid"].plan()
  jobs = [engine.Job(number, restart) for number in range(3) for restart in range(3)]
  trials = {_numbers(engine.trial_key(task.key, job)) for job in jobs}
  # A closed form draws from its key, once a round from what that is folded into.
  drawn = {_numbers(jax.random.fold_in(key, n)) for key in keys for n in range(len(jobs))}
  drawn |= set(map(_numbers, keys))
  assert len(trials) == 9 and len(drawn) == 3 * 10 and not trials & drawn


def _numbers(key):
  return tuple(jax.random.key_data(key).tolist())


def test_a_closed_form_has_one_trial_whatever_the_restarts(tmp_path):
  config = small(name="closed_form", restarts=4)
  lines = []
  experiment.run(config, tmp_path, say=lines.append)
  assert lines[0].endswith("run      3 gradients, each once")
  lines.clear()
  experiment.run(config, tmp_path, say=lines.append)
  assert "closed_form: 3 of 3 trials were finished before" in lines


def test_the_lanes_that_are_told_are_those_of_the_engine(tmp_path, monkeypatch):
  config = small(name="dia,closed_form", restarts=4, max_iterations=2)
  config.data.mask_seeds, config.engine.lanes = 2, 50
  lines, shapes = [], []
  create = engine.lanes.create_program

  def spy(*arguments):
    program = create(*arguments)
    shapes.append(program.shape)
    return program

  monkeypatch.setattr("jaxdia.engine.loop.create_program", spy)
  experiment.run(config, tmp_path, say=lines.append)
  assert shapes == [(8, 3)]
  assert "6 gradients x 4 trials, 3 lanes on each of 8 cpu device(s)" in lines[0]


def test_jax_still_tells_what_compiling_took():
  """Else the times of compiling would silently be counted as those of running."""
  events = []

  def listen(event, seconds, **kwargs):
    events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with attack_run.compilation() as durations:
      jax.jit(lambda x: jnp.sin(x) * 0.123456789)(np.arange(7.0)).block_until_ready()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  for kind in attack_run.COMPILING:
    assert f"/jax/core/compile/{kind}_duration" in events
  assert len(durations) >= 2 and min(durations) > 0
