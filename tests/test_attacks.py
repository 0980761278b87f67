"""One suite that every preset passes, then what is special to one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims

from jaxdia import attacks, data, engine, models
from jaxdia.attacks import CATALOGUE, AttackSettings, Status, Told
from jaxdia.client import observe
from jaxdia.closed_form import recover_labels
from jaxdia.core.errors import InputError

STEPS = 60


@functools.cache
def _compiled(name, model, **overrides):
  attack = attacks.create(name, model, **overrides)

  def run(key, observation, masks):
    def body(state, _):
      state, info = attack.step(observation, state)
      return state, (info.objective, state.candidate)

    return jax.lax.scan(body, attack.init(key, observation, Told(masks)), length=STEPS)

  return attack, jax.jit(run)


@pytest.fixture(scope="module")
def victims(model):
  return make_victims(model, 2)


def _run(name, model, victims, key=0, victim=0, **overrides):
  _, observations, secrets = victims
  _, run = _compiled(name, model, **overrides)
  masks = secrets[victim].masks if CATALOGUE[name].settings.masks == "known" else None
  return run(jax.random.key(key), observations[victim], masks)


# Those that start from a closed form are in test_closed_form.py.
@pytest.fixture(params=["dlg", "idlg", "ig", "wiig", "dia", "dia_tv"])
def name(request):
  return request.param


def test_decreases_its_objective(name, model, victims):
  state, (objectives, _) = _run(name, model, victims)
  assert float(state.best.objective) < 0.7 * float(objectives[0])
  assert float(state.best.objective) == float(jnp.min(objectives))


def test_keeps_the_bounds(name, model, victims):
  _, (_, candidates) = _run(name, model, victims)
  assert float(jnp.min(candidates.images)) >= 0 and float(jnp.max(candidates.images)) <= 1
  for mask in jax.tree.leaves(candidates.masks):
    assert float(jnp.min(mask)) >= 0 and float(jnp.max(mask)) <= 1


def test_best_is_the_very_point_that_was_measured(name, model, victims):
  state, _ = _run(name, model, victims)
  attack, _ = _compiled(name, model)
  value, terms = attacks.objective(
    model, attack.settings, victims[1][0], state.best.candidate, state.known
  )
  np.testing.assert_allclose(value, state.best.objective, rtol=1e-3, atol=2e-6)
  np.testing.assert_allclose(terms.distance, state.best.distance, rtol=1e-3, atol=2e-6)


def test_is_deterministic_in_its_key(name, model, victims):
  _, (first, _) = _run(name, model, victims, key=1)
  _, (again, _) = _run(name, model, victims, key=1)
  _, (other, _) = _run(name, model, victims, key=2)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_does_not_compile_again(name, model, victims):
  _run(name, model, victims, key=3, victim=0)
  _, run = _compiled(name, model)
  before = run._cache_size()
  _run(name, model, victims, key=4, victim=1)
  assert run._cache_size() == before == 1


def test_survives_nan_without_harm_to_its_neighbour(name, model, victims):
  _, observations, secrets = victims
  attack, _ = _compiled(name, model)
  sick = dataclasses.replace(
    observations[0],
    gradient=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), observations[0].gradient),
  )
  pair = jax.tree.map(lambda *x: jnp.stack(x), sick, observations[0])
  masks = secrets[0].masks if CATALOGUE[name].settings.masks == "known" else None
  keys = jnp.stack([jax.random.key(0)] * 2)
  state = jax.vmap(lambda k, o: attack.init(k, o, Told(masks)))(keys, pair)
  step = jax.jit(jax.vmap(lambda o, s: attack.step(o, s)[0]))
  for _ in range(5):
    state = step(pair, state)
  assert state.status.tolist() == [Status.DIVERGED, Status.RUNNING]
  assert state.iteration.tolist() == [1, 5]
  assert np.isfinite(state.best.candidate.images).all()
  _, (alone, _) = _run(name, model, victims, key=0)
  np.testing.assert_allclose(state.best.objective[1], np.min(alone[:5]), rtol=1e-3)


def test_true_images_and_masks_have_zero_distance(model, victims):
  _, observations, secrets = victims
  candidate = attacks.Candidate(secrets[0].images, secrets[0].masks, None)
  known = attacks.Known(None, secrets[0].labels)
  for distance in ("cosine", "squared_l2"):
    settings = AttackSettings(distance=distance)
    _, terms = attacks.objective(model, settings, observations[0], candidate, known)
    assert abs(float(terms.distance)) < 1e-6


@pytest.mark.parametrize("factor", [4.0, 0.1])
@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_the_squared_distance_finds_the_image_whatever_the_factor(name, factor):
  model = models.create("mlp", (8, 8, 1), 10, 0.0, hidden_sizes=(64, 64))
  image = np.random.default_rng(0).uniform(size=(1, 8, 8, 1)).astype(np.float32)
  seen, _ = observe(jax.random.key(1), model, model.init(jax.random.key(0)), image, [3])
  gradient = jax.tree.map(lambda x: factor * x, seen.gradient)
  attack = attacks.create(name, model, max_iterations=100)
  state = attacks.solve(jax.random.key(0), attack, dataclasses.replace(seen, gradient=gradient))
  assert state.status == Status.CONVERGED
  assert np.mean((state.best.candidate.images - image) ** 2) < 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("size", [10, 250, 1000])
def test_masks_that_meet_a_traced_rate_have_no_prior_and_no_slope(rate, size):
  model = models.create("mlp", (2, 2, 1), 2, 0.5, hidden_sizes=(size,))
  kept = round(size * (1 - rate))
  mask = np.concatenate([np.ones(kept), np.zeros(size - kept)]).astype(np.float32)

  @jax.jit
  @jax.vmap
  def prior(rate, mask):
    at_rate = dataclasses.replace(model, rates={"dropout_0": rate})
    return jax.value_and_grad(lambda m: attacks.mask_prior(at_rate, {"dropout_0": m}))(mask)

  masks = np.stack([mask, np.concatenate([[0], mask[1:]])])[:, None]
  values, slopes = prior(np.full(2, rate, np.float32), masks.astype(np.float32))
  assert values[0] == 0 and not np.any(slopes[0])
  np.testing.assert_allclose(values[1], 1 / size, rtol=1e-4)
  np.testing.assert_allclose(slopes[1], -1 / size, rtol=1e-6)


def test_without_dropout_dia_is_ig():
  model = models.create("mlp", (6, 6, 1), 5, 0.0, hidden_sizes=(8,))
  victims = make_victims(model, 1)
  _, (dia, _) = _run("dia", model, victims)
  _, (ig, _) = _run("ig", model, victims)
  np.testing.assert_array_equal(dia, ig)


def test_dia_sees_through_dropout_and_ig_does_not(model):
  _, observations, secrets = make_victims(model, 1, seed=5)
  errors = {}
  for name in ("ig", "dia"):
    attack = attacks.create(name, model, max_iterations=3000)
    images = attacks.solve(jax.random.key(0), attack, observations[0]).best.candidate.images
    errors[name] = float(jnp.mean(jnp.square(images - secrets[0].images)))
  assert errors["dia"] < 1e-3 < errors["ig"]


def test_dia_tv_is_dia_with_another_prior_and_schedule(model):
  attack = attacks.dia_tv(model)
  assert attack.settings.tv_weight > attacks.dia(model).settings.tv_weight
  assert attack == attacks.dia(model, tv_weight=attack.settings.tv_weight, schedule="cosine")


@pytest.mark.slow
def test_dia_tv_is_better_than_dia_behind_convolutions():
  victims = data.load("samples:cifar10", 4, offset=16)
  images = data.normalize(victims.images, victims.statistics)
  model = models.create("lenet", images.shape[1:], victims.num_classes, 0.5)
  params = model.init(jax.random.key(0))
  seen = [
    observe(
      jax.random.key(i),
      model,
      params,
      images[i, None],
      victims.labels[i, None],
      statistics=victims.statistics,
    )[0]
    for i in range(4)
  ]
  errors = {}
  for name in ("dia", "dia_tv"):
    attack = attacks.create(name, model, max_iterations=3000)
    trials = engine.run(engine.Task(jax.random.key(1), attack, seen))
    found = {trial.job.observation: trial.candidate.images[0] for trial in trials}
    errors[name] = [np.mean(np.square(found[i] - images[i])) for i in range(4)]
  assert np.median(errors["dia_tv"]) < 0.5 * np.median(errors["dia"])


@pytest.mark.parametrize("use_bias", [True, False])
def test_labels_are_recovered(use_bias):
  model = models.create("mlp", (6, 6, 1), 7, 0.5, hidden_sizes=(16,), use_bias=use_bias)
  _, observations, secrets = make_victims(model, 20, reveal_labels=False)
  attack = attacks.idlg(model)
  init = jax.jit(attack.init)
  for observation, secret in zip(observations, secrets, strict=True):
    state = init(jax.random.key(0), observation)
    np.testing.assert_array_equal(state.known.labels, secret.labels)


def test_free_labels_are_found(model):
  _, observations, secrets = make_victims(model, 1, reveal_labels=False)
  attack = attacks.ig(model, labels="free")
  step = jax.jit(attack.step)
  state = attack.init(jax.random.key(0), observations[0])
  for _ in range(200):
    state, _ = step(observations[0], state)
  label = jnp.argmax(state.best.candidate.labels, axis=-1)
  np.testing.assert_array_equal(label, secrets[0].labels)


@pytest.mark.parametrize(
  "schedule, expected",
  [
    ("constant", [0.1] * 8),
    ("step", [1e-1, 1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4]),  # at 3, 5 and 7 of 8
    ("cosine", 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8))),
  ],
)
def test_schedules(schedule, expected, model, victims):
  attack = attacks.ig(model, schedule=schedule, max_iterations=8)
  state, rates = attack.init(jax.random.key(0), victims[1][0]), []
  step = jax.jit(attack.step)
  for _ in range(8):
    state, info = step(victims[1][0], state)
    rates.append(float(info.learning_rate))
  assert int(state.status) == Status.MAX_ITERATIONS
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_trial_that_does_not_improve_stalls(model, victims):
  attack = attacks.ig(model, patience=3, learning_rate=1e-20)
  step = jax.jit(attack.step)
  state = attack.init(jax.random.key(0), victims[1][0])
  state = attack.start(attacks.project(victims[1][0], state.candidate), state.known)
  for _ in range(10):
    state, _ = step(victims[1][0], state)
  assert int(state.status) == Status.STALLED
  assert int(state.iteration) == 4  # the first improves on nothing, then three do not


def test_masks_are_kept_as_drawn_or_rounded_in_time(model, victims):
  start = attacks.dia(model).init(jax.random.key(0), victims[1][0]).candidate.masks
  state, (_, candidates) = _run("dia", model, victims, round_masks_after=0)
  for site, mask in start.items():
    np.testing.assert_array_equal(state.candidate.masks[site], mask)
  state, (objectives, candidates) = _run("dia", model, victims, round_masks_after=40)
  for masks in candidates.masks.values():
    assert np.isin(masks[40:], (0, 1)).all() and not np.isin(masks[20:40], (0, 1)).all()
  assert int(state.best.iteration) >= 40
  assert float(state.best.objective) == float(jnp.min(objectives[40:]))


def test_solve_takes_the_steps_of_the_attack_to_its_end(model, victims):
  attack = attacks.dia(model, max_iterations=STEPS)
  solved = attacks.solve(jax.random.key(0), attack, victims[1][0])
  state, _ = _run("dia", model, victims)
  assert int(solved.status) == Status.MAX_ITERATIONS and int(solved.iteration) == STEPS
  np.testing.assert_allclose(solved.best.objective, state.best.objective, rtol=1e-2)
  short = attacks.solve(jax.random.key(0), attacks.ig(model, max_iterations=1), victims[1][0])
  assert float(short.best.candidate.images.min()) >= 0  # though drawn N(0, 1)
  informed = attacks.wiig(model, max_iterations=300)
  state = attacks.solve(jax.random.key(0), informed, victims[1][0], masks=victims[2][0].masks)
  assert float(jnp.mean((state.best.candidate.images - victims[2][0].images) ** 2)) < 0.02


def test_all_products_are_at_full_precision(model, victims):
  """Those of features and of labels too: on a GPU float32 would lose bits else."""
  observation = dataclasses.replace(victims[1][0], labels=None)
  attack = attacks.hybrid(model, feature_weight=1.0, labels="recovered")
  parts = attack.recover(jax.random.key(0), observation).parts
  features = {("hidden_1",): jnp.ones((1, 24))}
  parts = parts._replace(features=features, known_features={("hidden_1",): jnp.ones(1, bool)})
  state = attack.init(jax.random.key(0), observation, Told(parts=parts))
  pair = dataclasses.replace(observation, batch_size=2)
  programs = [
    jax.make_jaxpr(attack.step)(observation, state),
    jax.make_jaxpr(lambda o: recover_labels(model, o))(pair),
    jax.make_jaxpr(model.apply)(observation.params, None, victims[2][0].images),
  ]
  for program in programs:
    text = str(program)
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 1


def test_a_search_may_start_near_0(model):
  _, observations, _ = make_victims(model, 1)
  noise, near = (
    attacks.dia(model, **settings).init(jax.random.key(3), observations[0]).candidate
    for settings in ({}, {"image_std": 0.25})
  )
  np.testing.assert_array_equal(near.images, noise.images / 4)
  jax.tree.map(np.testing.assert_array_equal, near.masks, noise.masks)


def test_total_variation():
  images = jnp.array([[0.0, 1.0], [0.0, 4.0]]).reshape(1, 2, 2, 1)
  assert float(attacks.total_variation(images)) == (1 + 4) / 2 + (0 + 3) / 2
  assert float(attacks.total_variation(jnp.ones((1, 1, 1, 3)))) == 0  # a single pixel


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"learing_rate": 1.0}, "'learing_rate'. Did you mean 'learning_rate'"),
    ({"distance": "l3"}, "attack.distance: 'l3'"),
    ({"max_iterations": 0}, "max_iterations is 0"),
    ({"max_iterations": 1.5}, "max_iterations is 1.5"),
    ({"tv_weight": -1.0}, "tv_weight is -1.0"),
    ({"mask_weight": float("nan")}, "mask_weight is nan"),
    ({"image_std": -0.1}, "image_std is -0.1"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"plateau_factor": 1.0}, "plateau_factor is 1.0"),
    ({"optimizer": "lbfgs"}, "schedule=constant"),
  ],
)
def test_settings_refuse(settings, message, model):
  with pytest.raises(InputError, match=message):
    attacks.dia(model, **settings)


def test_what_an_attack_needs_it_asks_for(model):
  _, observations, _ = make_victims(model, 1, reveal_labels=False)
  with pytest.raises(InputError, match="grants no labels"):
    attacks.dia(model).init(jax.random.key(0), observations[0])
  _, observations, _ = make_victims(model, 1)
  with pytest.raises(InputError, match="client's masks"):
    attacks.wiig(model).init(jax.random.key(0), observations[0])
  for name in ("closed_form", "hybrid"):
    with pytest.raises(InputError, match="starts from what linear algebra recovers"):
      attacks.create(name, model).init(jax.random.key(0), observations[0])
    with pytest.raises(InputError, match="it recovers both"):
      attacks.create(name, model, masks="known")
  with pytest.raises(InputError, match="recovers no features"):
    attacks.dia(model, feature_weight=1.0)
  with pytest.raises(InputError, match="Unknown attack 'dai'. Did you mean 'dia'"):
    attacks.create("dai", model)
