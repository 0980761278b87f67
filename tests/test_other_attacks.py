"""Attacks that are not of the catalogue: what is said of them is what they say themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_cases import rows_of, small

from jaxdia import attacks, closed_form, experiment
from jaxdia.attacks import settings
from jaxdia.attacks.analytic import ClosedForm
from jaxdia.attacks.catalogue import Preset
from jaxdia.attacks.protocol import NOT_TOLD, Attack, Best, Candidate, Known, State, Status
from jaxdia.core.trees import value_tree
from jaxdia.models import DropoutModel


@value_tree
class OneShot(Attack):
  """Draws an image, as a network that was trained for it would: no search, no linear algebra."""

  model: DropoutModel
  settings: attacks.AttackSettings

  @property
  def max_iterations(self):
    return 0

  def init(self, key, observation, told=NOT_TOLD):
    shape = (observation.batch_size, *self.model.image_shape)
    candidate = Candidate(jax.random.normal(key, shape), None, None)
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(())
    best = Best(candidate, none, none, zero)
    known = Known(None, observation.labels, told.parts)
    return State(candidate, known, (), (), best, zero, jnp.asarray(int(Status.NO_SEARCH)))

  def step(self, observation, state):
    raise AssertionError("it takes no step")


@value_tree
class Helped(OneShot):
  """One that begins with linear algebra, which has no verdict on what it draws."""

  def recover(self, key, observation):
    return closed_form.recover(key, self.model, observation)


@pytest.mark.parametrize("kind", [OneShot, Helped])
def test_an_attack_without_steps_is_not_taken_for_linear_algebra(kind, tmp_path, monkeypatch):
  monkeypatch.setitem(attacks.CATALOGUE, "one_shot", Preset(attacks.AttackSettings(), kind))
  said = []
  summary = experiment.run(small(name="one_shot"), tmp_path, say=said.append)["one_shot"]
  assert "linear algebra" not in "".join(said)
  assert "(masks searched, labels given)" in "".join(said)
  assert summary["finished"] == 3 and not summary["not_applicable"]
  rows = rows_of(tmp_path)
  assert [row["status"] for row in rows] == ["no_search"] * 3
  assert [row["objective"] for row in rows] == [None] * 3  # nothing was measured
  assert (rows[0]["closed_form"] is None) == (kind is OneShot)
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
  chosen = attacks.AttackSettings(masks="guessed", labels="guessed")
  assert OneShot(None, chosen).assumptions == "masks guessed, masks guessed"
  assert settings.told(chosen.masks, chosen.labels) == f"{words.told}; {words.told}"
  assert not OneShot(None, chosen).has_verdicts and ClosedForm(None, chosen).has_verdicts


def test_the_terms_of_the_objective_stand_where_it_is_put_together():
  """So that a new one touches settings, objective and catalogue."""
  assert attacks.Terms.__module__ == attacks.objective.__module__ == "jaxdia.attacks.objective"
