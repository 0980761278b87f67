"""What callers of the library get wrong is refused in a line, where they call it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims
from flax import linen as nn

import jaxdia
from jaxdia import attacks, engine, models
from jaxdia.client import LocalUpdate, Observation, check_fit, observe
from jaxdia.closed_form import recover, recover_labels
from jaxdia.core.errors import InputError, check_count, check_number
from jaxdia.core.types import check_key
from jaxdia.gradients import prepare

ONE_DEVICE = jax.local_devices()[:1]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def seen(model):
  return make_victims(model, 1, batch_size=2)[1][0]


def test_all_rooms_and_the_error_are_found_by_their_names():
  for room in ("updates", "audit", "core", "attacks"):
    assert getattr(jaxdia, room).__name__ == f"jaxdia.{room}"
  assert jaxdia.InputError is InputError


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t._replace(observations=t.observations[0]), r"of type Observation; .* Use \[obs"),
    (lambda t: t._replace(observations=iter(t.observations)), "of type list_iterator; expected a"),
    (lambda t: t._replace(observations={"a": t.observations[0]}), "of type dict; expected a seq"),
    (lambda t: t._replace(observations=None), "observations of task 0 is of type NoneType"),
    (lambda t: t._replace(observations=[(t.observations[0], 0)]), "is of type tuple; .* observe"),
    (lambda t: t._replace(restarts=2.5), "restarts of task 0 is 2.5; expected an integer"),
    (lambda t: t._replace(restarts="2"), "restarts of task 0 is '2'"),
    (lambda t: t._replace(restarts=None), "restarts of task 0 is None"),
    (lambda t: t._replace(attack="dia"), r"attack is 'dia'; expected .*attacks.create\(name, mo"),
    (lambda t: t._replace(attack=attacks.dia), "attack is of type function"),
    (lambda t: t._replace(key=0), r"key of task 0 is int; .* Use jax.random.key\(0\)"),
    (lambda t: t._replace(masks={"dropout_0": 1}), r"masks of task 0 is dict; .* Use \[masks\]"),
    (lambda t: t._replace(parts=[3]), "recovery is of type int; expected what attack.recover"),
    (lambda t: t._replace(finished=[0]), r"finished of task 0 is \[0\]; expected pairs"),
    (lambda t: t._replace(finished=None), "finished of task 0 is None"),
    (lambda t: [t._replace(number=1)] * 2, r"have the numbers \[1, 1\]; expected"),
    (lambda t: t.observations, "task 0 is of type Observation; expected an engine.Task"),
    (lambda t: None, "task 0 is of type NoneType"),
    (lambda t: [], "got no tasks"),
  ],
)
def test_tasks_that_are_none(model, seen, change, message):
  task = change(engine.Task(KEY, attacks.dia(model), [seen]))
  with pytest.raises(InputError, match=message):
    engine.run(task)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"lanes": 0}, "lanes of a run is 0; expected an integer of at least 1"),
    ({"lanes": 2.5}, "lanes of a run is 2.5"),
    ({"chunk": 0}, "chunk of a run is 0"),
    ({"devices": "cpu"}, "devices is 'cpu'; expected those of JAX"),
    ({"devices": 1}, "devices is 1; expected those of JAX"),
    ({"matching": "factord"}, "Did you mean 'factored'"),
    ({"record": [-1]}, "a recorded iteration is -1"),
    ({"checkpoint_seconds": "1"}, "checkpoint_seconds is '1'"),
  ],
)
def test_options_of_a_run_that_are_none(model, seen, options, message):
  with pytest.raises(InputError, match=message):
    engine.run(engine.Task(KEY, attacks.dia(model), [seen]), **options)


def test_a_device_and_a_path_as_text_are_taken(model, seen, tmp_path):
  task = engine.Task(KEY, attacks.dia(model, max_iterations=2), [seen])
  options = {"devices": ONE_DEVICE[0], "checkpoint_path": str(tmp_path / "checkpoint.npz")}
  assert len(list(engine.run(task, lanes=np.int64(1), chunk=jnp.asarray(1), **options))) == 1


@pytest.mark.parametrize("key", [0, np.int64(0), None, "0", jnp.zeros(2), jax.random.split(KEY)])
def test_keys_that_are_none(model, seen, key):
  attack = attacks.dia(model)
  for call in (
    lambda: model.init(key),
    lambda: models.sample_masks(key, model, 1),
    lambda: attacks.solve(key, attack, seen),
    lambda: attack.init(key, seen),
    lambda: observe(key, model, seen.params, np.zeros((1, 6, 6, 1), np.float32), [0]),
  ):
    with pytest.raises(InputError, match="expected one random key. Use jax.random.key"):
      call()


def test_keys_of_both_kinds_are_taken():
  keys = KEY, jax.random.PRNGKey(0), np.zeros(2, np.uint32), jax.random.key(0, impl="rbg")
  assert all(check_key(key) is key for key in keys)
  assert jax.eval_shape(check_key, KEY).shape == ()
  assert jax.vmap(check_key)(jax.random.split(KEY)).shape == (2,)


def test_what_is_handed_to_solve_and_to_a_step(model, seen):
  attack = attacks.dia(model, max_iterations=2)
  for call, message in (
    (lambda: attacks.solve(KEY, "dia", seen), "the attack is 'dia'"),
    (lambda: attacks.solve(KEY, seen, attack), "the attack is of type Observation"),
    (lambda: attacks.solve(KEY, attack, (seen, None)), "observation is of type tuple"),
    (lambda: attacks.solve(KEY, attack, seen, seconds="1"), "seconds is '1'"),
    (lambda: attacks.solve(KEY, attack, seen, seconds=math.nan), "seconds is nan"),
    (lambda: attacks.solve(KEY, attack, seen, recovery=3), "recovery is of type int"),
    (lambda: attack.init(seen, KEY), "key is Observation; expected one random key"),
    (lambda: attack.step(attack.init(KEY, seen), seen), r"expected step\(observation, state\)"),
    (lambda: jax.jit(lambda k: attacks.solve(k, attack, seen))(KEY), "traced.* Use attack.init"),
    (lambda: jax.jit(lambda o: attacks.solve(KEY, attack, o))(seen), "traced.* use attack.init"),
  ):
    with pytest.raises(InputError, match=message):
      call()
  hybrid = attacks.hybrid(model, max_iterations=2)
  recovery = hybrid.recover(KEY, seen)
  for given in (recovery, recovery.parts):
    assert attacks.solve(KEY, hybrid, seen, recovery=given).iteration > 0


def test_what_is_handed_to_the_closed_forms(model, seen):
  for wrong, kind in (
    (prepare(model, seen), "of type Prepared"),
    ((seen, None), "of type tuple"),
    ("observation", "'observation'"),
    (3, "of type int"),
    (None, "of type NoneType"),
  ):
    expected = rf"observation is {kind}; expected a jaxdia.client.Observation, .* observe returns"
    for call in (
      lambda w=wrong: recover(KEY, model, w),
      lambda w=wrong: recover_labels(model, w),
      lambda w=wrong: check_fit(model, w),
    ):
      with pytest.raises(InputError, match=expected):
        call()
  # Of another network the labels cannot be read either.
  other = models.create("mlp", (6, 6, 1), 4, hidden_sizes=(24, 24))
  with pytest.raises(InputError, match="leaf 'classifier/kernel' of the params has shape"):
    recover_labels(other, seen)


def test_what_is_handed_over_as_a_model(model, seen):
  images = np.zeros((1, 6, 6, 1), np.float32)
  for wrong, kind in (("mlp", "'mlp'"), (None, "of type NoneType"), (seen, "of type Observation")):
    for call in (
      lambda w=wrong: recover(KEY, w, seen),
      lambda w=wrong: recover_labels(w, seen),
      lambda w=wrong: check_fit(w, seen),
      lambda w=wrong: observe(KEY, w, seen.params, images, [0]),
      lambda w=wrong: attacks.create("dia", w),
    ):
      with pytest.raises(InputError, match=rf"model is {kind}; expected .* models.create\("):
        call()


def test_params_of_another_network(model, seen):
  images, params = np.zeros((2, 6, 6, 1), np.float32), seen.params
  narrow = models.create("mlp", (6, 6, 1), 5, hidden_sizes=(8, 24)).init(KEY)
  with_bias = models.create("mlp", (6, 6, 1), 5, hidden_sizes=(24, 24), use_bias=True).init(KEY)
  for wrong, message in (
    ({"params": params}, r"lack the leaf .*Pass params\['params'\]"),
    (jax.tree.leaves(params), "the params lack the leaf 'classifier/kernel', which MLP has"),
    (narrow, r"leaf 'hidden_0/kernel' of the params has shape \(36, 8\); expected \(36, 24\)"),
    (with_bias, "have the leaf 'classifier/bias', which MLP lacks; .* of another network"),
  ):
    for call in (
      lambda w=wrong: model.apply(w, None, images),
      lambda w=wrong: observe(KEY, model, w, images, [1, 2]),
      lambda w=wrong: attacks.dia(model).init(KEY, Observation(w, w, [1, 2], [0], [1], 2)),
    ):
      with pytest.raises(InputError, match=message):
        call()


def test_labels_and_statistics_of_another_model(model, seen):
  for changes, message in (
    ({"labels": [1, 5]}, "observation has the label 5; expected classes from 0 to 4, as MLP has"),
    ({"labels": [-1, 0]}, "has the label -1"),
    ({"mean": [0.5] * 3, "std": [0.5] * 3}, "mean and std for 3 channels; .* of the 1 of the im"),
  ):
    wrong = dataclasses.replace(seen, **changes)
    for call in (
      lambda w=wrong: check_fit(model, w),
      lambda w=wrong: attacks.solve(KEY, attacks.dia(model, max_iterations=1), w),
      lambda w=wrong: attacks.dia(model).init(KEY, w),
    ):
      with pytest.raises(InputError, match=message):
        call()


def test_masks_that_are_no_dict_of_sites(model, seen):
  masks = models.sample_masks(KEY, model, 2)
  for wrong in (list(masks.values()), tuple(masks.values()), "masks"):
    with pytest.raises(InputError, match=r"expected a dict of the mask of each site, \['dropout"):
      # As `apply` does, of which the types are checked in tests alone.
      model._call(seen.params, wrong, np.zeros((2, 6, 6, 1), np.float32), None)


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32, np.array, jnp.bfloat16])
def test_scalars_of_jax_and_numpy_are_numbers(model, kind):
  assert check_number("rate", kind(0.25), lambda v: v < 1, "a number") == 0.25
  attack = attacks.dia(model, learning_rate=kind(0.25))
  assert attack == attacks.dia(model, learning_rate=0.25)
  rates = dict.fromkeys(model.rates, kind(0.5))
  changed = dataclasses.replace(model, rates=rates)
  assert {changed} == {dataclasses.replace(model, rates=dict.fromkeys(model.rates, 0.5))}
  assert models.create("mlp", (6, 6, 1), 5, kind(0.25), hidden_sizes=(24, 24)) == model
  with pytest.raises(InputError, match="rate of site 'dropout_0' is"):
    dataclasses.replace(model, rates=dict.fromkeys(model.rates, kind(2.0)))
  with pytest.raises(InputError, match="learning_rate of a local update is"):
    LocalUpdate(learning_rate=kind(-1.0))


def test_counts_of_jax_and_numpy_are_counts():
  for kind in (np.int64, np.uint8, np.array, jnp.asarray):
    assert check_count("count", kind(3), 1) == 3
  for wrong in (3.0, jnp.float32(3), np.array([3]), True, np.bool_(True), jnp.asarray(True), "3"):
    with pytest.raises(InputError, match="count is .*; expected an integer of at least 1"):
      check_count("count", wrong, 1)
  with pytest.raises(InputError, match="image_shape is"):
    models.create("mlp", (6.5, 6, 1), 5)


def test_what_a_model_is_made_of_and_called_with(model, seen):
  for call, message in (
    (
      lambda: models.DropoutModel(None, {}),
      "network is of type NoneType; expected a jaxdia",
    ),
    (lambda: models.from_module(nn.Dense(3), (6, 6, 1), varables={}), "Did you mean 'variables'"),
    (lambda: model.apply(seen.params, None, jnp.zeros((2, 7, 6, 1))), r"expected \(B, 6, 6, 1\)"),
  ):
    with pytest.raises(InputError, match=message):
      call()


def test_a_rate_of_numpy_in_a_module_of_equinox_is_no_parameter():
  eqx = pytest.importorskip("equinox")
  layers = [eqx.nn.Lambda(jnp.ravel), eqx.nn.Dropout(np.float32(0.25))]
  module = eqx.nn.Sequential([*layers, eqx.nn.Linear(36, 5, key=KEY)])
  found = models.from_equinox(module, (6, 6, 1))
  assert [site.rate for site in found.sites] == [0.25] and len(found.network.entries()) == 2
