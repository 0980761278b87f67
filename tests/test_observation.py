"""What does not fit together is refused where an observation is made, with the mend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims

from jaxdia import attacks, engine, models
from jaxdia.client import Observation, defences, observe
from jaxdia.closed_form import recover
from jaxdia.core.errors import InputError


@pytest.fixture
def seen(model):
  return make_victims(model, 1, batch_size=2)[1][0]


def _with(seen, **changes):
  return dataclasses.replace(seen, **changes)


def _leaf(gradient, leaf):
  return gradient | {"hidden_0": {"kernel": leaf}}


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda g: {"params": g}, r"Pass gradient\['params'\]"),
    (lambda g: jax.tree.leaves(g), "put them there by jax.tree.unflatten"),
    (lambda g: _leaf(g, g["hidden_0"]["kernel"].T), r"shape \(24, 36\).*Transpose it"),
    (lambda g: _leaf(g, np.ones((36, 9), np.float32)), "may be of another network"),
    (lambda g: _leaf(g, 3), "'hidden_0/kernel' of the gradient is int"),
    (lambda g: _leaf(g, np.ones((36, 24), np.int32)), "is int32; expected floats"),
    (lambda g: g | {"hiden_0": g["hidden_0"]}, "'hiden_0/kernel', which the params lack"),
    (lambda g: jax.tree.map(lambda x: None, g), "has no leaf at all"),
  ],
)
def test_gradients_that_do_not_fit_the_params(seen, change, message):
  with pytest.raises(InputError, match=message):
    _with(seen, gradient=change(seen.gradient))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 3}, "batch_size=3 images"),
    ({"batch_size": 0}, "batch_size of the observation is 0"),
    ({"labels": [1, 2, 3]}, r"expected integers of shape \(2,\)"),
    ({"labels": [0.5, 1.0]}, "labels are float64"),
    ({"std": (0.0,)}, "expected values above 0"),
    ({"mean": (0.5, 0.5)}, "2 means and 1 standard deviations"),
    ({"mean": [33.0], "std": [78.0]}, "Divide mean and std by 255"),
    ({"mean": [np.nan]}, "one finite number a channel"),
    ({"mean": None}, "mean is None; expected one finite number"),
  ],
)
def test_facts_that_do_not_fit_the_batch(seen, changes, message):
  with pytest.raises(InputError, match=message):
    _with(seen, **changes)


def test_lists_and_half_precision_are_converted(seen):
  half = jax.tree.map(lambda x: np.asarray(x, np.float16), seen.gradient)
  made = Observation(seen.params, half, [1, 2], (0.5,), [0.25], np.int64(2))
  assert {leaf.dtype for leaf in jax.tree.leaves(made.gradient)} == {jnp.dtype("float32")}
  assert made.labels.dtype == jnp.int32 and made.mean.shape == (1,)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), seen.params)
  with pytest.raises(InputError, match="the params are bfloat16.*astype"):
    _with(seen, params=low)


def test_frozen_layers_are_left_out_and_said():
  model = models.create("mlp", (6, 6, 1), 5, 0.25, hidden_sizes=(24, 24))
  _, (seen,), _ = make_victims(model, 1)
  frozen = _with(seen, gradient=seen.gradient | {"hidden_0": None})
  state = attacks.solve(jax.random.key(0), attacks.dia(model, max_iterations=3), frozen)
  assert np.isfinite(state.best.objective)
  recovery = recover(jax.random.key(0), model, frozen)
  assert not recovery.parts.verdict.any() and "hidden_0 is frozen" in recovery.reason


def test_a_gradient_of_the_opposite_sign_is_refused():
  model = models.create("mlp", (6, 6, 1), 9, 0.25, hidden_sizes=(24,), use_bias=True)
  _, observations, _ = make_victims(model, 3, batch_size=2)
  attack = attacks.dia(model, max_iterations=2)
  for seen in observations:
    turned = _with(seen, gradient=jax.tree.map(jnp.negative, seen.gradient))
    for refuse in (
      lambda t=turned: attacks.solve(jax.random.key(0), attack, t),
      lambda t=turned: list(engine.run(engine.Task(jax.random.key(0), attack, [t]))),
      lambda t=turned: recover(jax.random.key(0), model, t),
    ):
      with pytest.raises(InputError, match="opposite sign"):
        refuse()
    assert attacks.solve(jax.random.key(0), attack, seen).iteration == 2


def test_pixels_out_of_range_are_refused(model):
  params = model.init(jax.random.key(0))
  images = 255 * np.random.default_rng(0).uniform(size=(1, 6, 6, 1)).astype(np.float32)
  with pytest.raises(InputError, match="expected 0 to 1, which is all that an attack looks for"):
    observe(jax.random.key(0), model, params, images, np.array([1]))


def test_a_checkpoint_of_another_attack_or_client_is_refused(model, tmp_path):
  _, observations, _ = make_victims(model, 2)
  path = tmp_path / "checkpoint.npz"
  options = {"checkpoint_path": path, "checkpoint_seconds": 0.0, "chunk": 2, "lanes": 1}
  options["devices"] = jax.local_devices()[:1]

  def start(attack, observation, key=0):
    return engine.run(engine.Task(jax.random.key(key), attack, [observation]), **options)

  attack = attacks.dia(model, max_iterations=30)

  class Enough(Exception):
    pass

  def stop(progress):
    if path.exists():
      raise Enough

  with pytest.raises(Enough):
    list(
      engine.run(
        engine.Task(jax.random.key(0), attack, observations[:1]), on_progress=stop, **options
      )
    )
  for other in (
    (attacks.dia(model, max_iterations=30, learning_rate=0.2), observations[0]),
    (attack, observations[1]),
    (attack, observations[0], 1),
  ):
    with pytest.raises(InputError, match="is of another run"):
      list(start(*other))
  (trial,) = start(attack, observations[0])
  path.unlink(missing_ok=True)
  (alone,) = start(attack, observations[0])
  np.testing.assert_array_equal(trial.candidate.images, alone.candidate.images)


def test_defences_change_what_is_sent_and_nothing_else(model):
  params = model.init(jax.random.key(0))
  images, labels = np.full((1, 6, 6, 1), 0.5, np.float32), np.array([1])
  plain, secret = observe(jax.random.key(3), model, params, images, labels)
  noise = defences.create("gaussian_noise", std=1e-2)
  sent, same = observe(jax.random.key(3), model, params, images, labels, defence=noise)
  jax.tree.map(np.testing.assert_array_equal, secret, same)
  added = np.concatenate(
    [
      np.ravel(a - b)
      for a, b in zip(jax.tree.leaves(sent.gradient), jax.tree.leaves(plain.gradient), strict=True)
    ]
  )
  assert abs(added.std() / 1e-2 - 1) < 0.1 and abs(added.mean()) < 2e-3
  assert defences.create("none") == defences.identity and noise == defences.create(
    "gaussian_noise", std=0.01
  )
  for name, settings, message in (
    ("gausian_noise", {}, "Did you mean 'gaussian_noise'"),
    ("gaussian_noise", {"sigma": 1}, "setting of the defence gaussian_noise: 'sigma'"),
    ("gaussian_noise", {"std": -1}, "std of the noise is -1"),
  ):
    with pytest.raises(InputError, match=message):
      defences.create(name, **settings)
