"""Attacks of another shape, from outside of the library: one shot, or steps of its own.

What is said of them is what they say themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims
from experiment_cases import rows_of, silent, small

from jaxdia import attacks, closed_form, engine, experiment
from jaxdia.attacks import (
  Attack,
  AttackSettings,
  Best,
  Candidate,
  Info,
  Known,
  State,
  Status,
  Terms,
  settings,
)
from jaxdia.attacks.analytic import ClosedForm
from jaxdia.attacks.protocol import NOT_TOLD
from jaxdia.core.trees import value_tree
from jaxdia.core.types import Statistics
from jaxdia.models import DropoutModel

STEPS = 12


def _start(attack, observation, images, objective, status):
  shape = (observation.batch_size, *attack.model.image_shape)
  candidate = Candidate(jnp.broadcast_to(images, shape).astype(observation.dtype), None, None)
  zero, value = jnp.zeros((), jnp.int32), jnp.asarray(objective, observation.dtype)
  best = Best(candidate, value, value, zero)
  known = Known(None, observation.labels)
  return State(candidate, known, (), (), best, zero, jnp.asarray(int(status), jnp.int32))


def _grey(observation):
  """Pixels of a half, normalised."""
  return (0.5 - observation.mean) / observation.std


@value_tree
class Grey(Attack):
  """Answers with a grey image, whatever the gradient is; a trial has ended after `init`."""

  model: DropoutModel
  settings: AttackSettings

  @property
  def max_iterations(self):
    return 0

  def init(self, key, observation, told=NOT_TOLD):
    del key, told
    return _start(self, observation, _grey(observation), 0.0, Status.NO_SEARCH)

  def step(self, observation, state):
    raise AssertionError("a trial that has ended takes no step")


@value_tree
class Fading(Attack):
  """Goes half of the way from white to grey in each step; its objective is what is left."""

  model: DropoutModel
  settings: AttackSettings

  def init(self, key, observation, told=NOT_TOLD):
    del key, told
    white = (1 - observation.mean) / observation.std
    return _start(self, observation, white, jnp.inf, Status.RUNNING)

  def step(self, observation, state):
    images = (state.candidate.images + _grey(observation)) / 2
    left = jnp.max(jnp.abs(images - _grey(observation)))
    candidate, iteration = state.candidate._replace(images=images), state.iteration + 1
    ended = jnp.asarray(int(Status.MAX_ITERATIONS), jnp.int32)
    after = state._replace(
      candidate=candidate,
      best=Best(candidate, left, left, state.iteration),
      iteration=iteration,
      status=jnp.where(iteration >= self.max_iterations, ended, state.status),
    )
    is_running = state.status == int(Status.RUNNING)
    none = jnp.zeros((), left.dtype)
    info = Info(left, Terms(*[none] * len(Terms._fields)), none)
    return jax.tree.map(lambda new, old: jnp.where(is_running, new, old), after, state), info


@value_tree
class Helped(Grey):
  """One that begins with linear algebra, which has no verdict on its answer."""

  def recover(self, key, observation):
    return closed_form.recover(key, self.model, observation)


SETTINGS = AttackSettings(masks="expected", max_iterations=STEPS)
# Of the pixels, how far they are from a half at the end.
LEFT = {"grey": 0, "fading": 0.5 ** (STEPS + 1)}
STATUS = {"grey": Status.NO_SEARCH, "fading": Status.MAX_ITERATIONS}
OWN = {"grey": Grey, "fading": Fading}


@pytest.mark.parametrize("name", OWN)
def test_the_engine_runs_it(model, name):
  _, observations, _ = make_victims(model, 2, batch_size=2, statistics=Statistics(0.2, 0.5))
  task = engine.Task(jax.random.key(0), OWN[name](model, SETTINGS), observations, restarts=2)
  options = {"lanes": 3, "chunk": 5, "record": (1, STEPS), "devices": jax.local_devices()[:1]}
  trials = {trial.job: trial for trial in engine.run(task, **options)}
  assert set(trials) == {engine.Job(i, restart) for i in range(2) for restart in range(2)}
  for trial in trials.values():
    assert trial.status == STATUS[name]
    assert trial.iterations == (0 if name == "grey" else STEPS)
    pixels = trial.candidate.images * 0.5 + 0.2
    np.testing.assert_allclose(pixels, 0.5 + LEFT[name], atol=1e-6)
    assert pixels.shape == (2, *model.image_shape) and trial.candidate.masks is None
    if name == "fading":
      np.testing.assert_allclose(trial.recording[1] * 0.5 + 0.2, 0.75, atol=1e-6)


def test_an_experiment_runs_it_beside_others(tmp_path, monkeypatch):
  for name, kind in OWN.items():
    monkeypatch.setitem(attacks.CATALOGUE, name, attacks.Preset(SETTINGS, kind))
  config = small(name="grey,fading,ig", max_iterations=STEPS, restarts=2)
  summary = experiment.run(config, tmp_path, say=silent)
  assert set(summary) == {"grey", "fading", "ig"}
  rows = rows_of(tmp_path)
  assert len(rows) == 9
  with np.load(tmp_path / "reconstructions.npz") as file:
    originals = file["originals"]
    for name in OWN:
      np.testing.assert_allclose(file[name], 0.5 + LEFT[name], atol=1e-6)
  for row in rows:
    if row["attack"] in OWN:
      found = 0.5 + LEFT[row["attack"]]
      expected = np.mean((originals[row["image"]] - found) ** 2)
      np.testing.assert_allclose(row["mse"], expected, rtol=1e-4)
      assert row["status"] == STATUS[row["attack"]].name.lower()
      assert row["mask_accuracy"] is None and row["label_accuracy"] is None
  # The same call takes all of it as it is.
  lines = []
  experiment.run(config, tmp_path, say=lines.append)
  assert rows_of(tmp_path) == rows
  assert "fading: 6 of 6 trials were finished before" in lines


@pytest.mark.parametrize("kind", [Grey, Helped])
def test_an_attack_without_steps_is_not_taken_for_linear_algebra(kind, tmp_path, monkeypatch):
  monkeypatch.setitem(attacks.CATALOGUE, "one_shot", attacks.Preset(AttackSettings(), kind))
  said = []
  summary = experiment.run(small(name="one_shot"), tmp_path, say=said.append)["one_shot"]
  assert "linear algebra" not in "".join(said)
  assert "(masks searched, labels given)" in "".join(said)
  assert summary["finished"] == 3 and not summary["not_applicable"]
  rows = rows_of(tmp_path)
  assert [row["status"] for row in rows] == ["no_search"] * 3
  assert [row["objective"] for row in rows] == [None] * 3  # nothing was measured
  assert (rows[0]["closed_form"] is None) == (kind is Grey)
  with np.load(tmp_path / "reconstructions.npz") as file:
    assert np.isfinite(file["one_shot"]).all()


def test_a_closed_form_has_verdicts_and_says_what_it_is(tmp_path):
  said = []
  experiment.run(small(name="closed_form"), tmp_path, say=said.append)
  assert "(linear algebra alone, nothing searched)" in "".join(said)
  assert {row["status"] for row in rows_of(tmp_path)} <= {"exact", "approximate", "not_applicable"}
  experiment.run(small(name="hybrid", max_iterations=2), tmp_path / "hybrid", say=said.append)
  assert "(what linear algebra gives is fixed, the rest searched)" in "".join(said)


def test_a_choice_brings_its_words(monkeypatch):
  """A new value of `masks` or `labels` is described by its entry in settings.py alone."""
  words = settings.Words("masks guessed", "told a guess of the masks")
  for choices in (settings.MASKS, settings.LABELS):
    monkeypatch.setitem(choices, "guessed", words)
  names = {name: (*known, "guessed") for name, known in settings.CHOICES.items()}
  monkeypatch.setattr(settings, "CHOICES", names)
  chosen = AttackSettings(masks="guessed", labels="guessed")
  assert Grey(None, chosen).assumptions == "masks guessed, masks guessed"
  assert settings.told(chosen.masks, chosen.labels) == f"{words.told}; {words.told}"
  assert not Grey(None, chosen).has_verdicts and ClosedForm(None, chosen).has_verdicts


def test_the_terms_of_the_objective_stand_where_it_is_put_together():
  """So that a new one touches settings, objective and catalogue."""
  assert Terms.__module__ == attacks.objective.__module__ == "jaxdia.attacks.objective"
