"""Several local steps: what clients send, and attacks that simulate it."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdia import attacks, closed_form, data, engine, models
from jaxdia.attacks.objective import objective
from jaxdia.client import (
  LocalUpdate,
  Observation,
  client_gradient,
  defences,
  draw_masks,
  mask_shapes,
  observe,
  shuffled,
)
from jaxdia.closed_form import Verdict
from jaxdia.core.errors import InputError
from jaxdia.engine.jobs import trial_key
from jaxdia.evaluation import assign, mask_diagnostics
from jaxdia.gradients import choose_layers, prepare

KEY = jax.random.key(7)


def _model(kind="mlp", **options):
  if kind == "mlp":
    return models.create("mlp", (6, 6, 1), 4, 0.5, hidden_sizes=(24, 16), **options)
  return models.create("lenet", (6, 6, 2), 4, 0.5, channels=3, hidden_size=8, **options)


def _batch(model, size, dtype=jnp.float64):
  images = jax.random.uniform(jax.random.key(1), (size, *model.image_shape), dtype)
  return images, jnp.arange(size, dtype=jnp.int32) % model.num_classes


def _params(model, dtype=jnp.float64):
  return jax.tree.map(lambda x: x.astype(dtype), model.init(KEY))


_gradient = jax.jit(client_gradient)


def _by_hand(model, params, masks, images, labels, local, optimizer):
  """Trains each client by optax, step after step, and averages how far the weights went."""
  steps = local.epochs * local.steps
  ways = []
  for client in range(local.clients):
    now, state = params, optimizer.init(params)
    for t in range(client * steps, (client + 1) * steps):
      chosen = np.asarray(local.indices(len(images))[t])
      of_step = {site: mask[t] for site, mask in masks.items()}
      gradient = _gradient(model, now, of_step, images[chosen], labels[chosen])
      updates, state = optimizer.update(gradient, state)
      now = optax.apply_updates(now, updates)
    ways.append(jax.tree.map(lambda a, b: (a - b) / (local.learning_rate * steps), params, now))
  return jax.tree.map(lambda *leaves: sum(leaves) / local.clients, *ways)


CASES = {
  "epochs": LocalUpdate(epochs=3, learning_rate=0.3),
  "steps": LocalUpdate(epochs=2, steps=2, learning_rate=0.2, momentum=0.9),
  "clients": LocalUpdate(epochs=2, steps=2, clients=2, learning_rate=0.2, momentum=0.5),
  "one step of each": LocalUpdate(clients=4),
}


@pytest.mark.parametrize(
  "kind, case, order",
  [
    ("mlp", "epochs", False),
    ("mlp", "steps", True),
    ("mlp", "clients", True),
    ("mlp", "one step of each", False),
    ("lenet", "clients", True),
  ],
)
def test_a_client_sends_how_far_its_weights_went(kind, case, order):
  with jax.enable_x64(True):
    model, local = _model(kind), CASES[case]
    if order:
      local = shuffled(jax.random.key(3), local, 4)
    params, (images, labels) = _params(model), _batch(model, 4)
    seen, secret = observe(KEY, model, params, images, labels, local=local)
    optimizer = optax.sgd(local.learning_rate, local.momentum)
    expected = _by_hand(model, params, secret.masks, images, labels, local, optimizer)
    for found, right in zip(*map(jax.tree.leaves, (seen.gradient, expected)), strict=True):
      np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-13)


def test_adam_is_followed():
  with jax.enable_x64(True):
    model, local = _model(), LocalUpdate(epochs=3, optimizer="adam", learning_rate=1e-3)
    params, (images, labels) = _params(model), _batch(model, 4)
    seen, secret = observe(KEY, model, params, images, labels, local=local)
    expected = _by_hand(model, params, secret.masks, images, labels, local, optax.adam(1e-3))
    for found, right in zip(*map(jax.tree.leaves, (seen.gradient, expected)), strict=True):
      np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_one_step_of_sgd_is_a_gradient_whatever_its_rate():
  model = _model()
  params, batch = _params(model, jnp.float32), _batch(model, 2, jnp.float32)
  seen, _ = observe(KEY, model, params, *batch)
  same, _ = observe(KEY, model, params, *batch, local=LocalUpdate(learning_rate=3.0))
  assert same.local is None
  assert jax.tree.structure(same) == jax.tree.structure(seen)
  jax.tree.map(np.testing.assert_array_equal, same.gradient, seen.gradient)


@pytest.mark.parametrize("kind, case", [("mlp", "steps"), ("mlp", "clients"), ("lenet", "steps")])
def test_thin_factors_give_the_objective_of_formed_kernels_and_its_derivatives(kind, case):
  with jax.enable_x64(True):
    model, local = _model(kind), shuffled(jax.random.key(3), CASES[case], 4)
    params, (images, labels) = _params(model), _batch(model, 4)
    seen, _ = observe(KEY, model, params, images, labels, local=local)
    assert not choose_layers(model, 4, "formed", seen.local)
    if kind == "lenet":
      model = dataclasses.replace(model, convolve="product")
    attack = attacks.dia(model)
    state = attack.init(jax.random.key(5), seen)

    @jax.jit
    @jax.value_and_grad
    def measure(candidate, prepared):
      return objective(model, attack.settings, prepared, candidate, state.known)[0]

    found = []
    for method in ("formed", "factored"):
      prepared = prepare(model, seen, method)
      assert bool(prepared.target.kernels) == (method == "factored")
      found.append(measure(state.candidate, prepared))

    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-11)


def test_the_truth_has_no_distance_and_the_number_of_steps_matters():
  with jax.enable_x64(True):
    model, local = _model(), LocalUpdate(epochs=2, steps=2, learning_rate=0.5, momentum=0.9)
    params, (images, labels) = _params(model), _batch(model, 4)
    seen, secret = observe(KEY, model, params, images, labels, local=local)

    def distance(observation, masks):
      attack = attacks.wiig(model)
      state = attack.init(KEY, observation, attacks.Told(masks))
      candidate = state.candidate._replace(images=images)
      return objective(model, attack.settings, observation, candidate, state.known)[1].distance

    assert distance(seen, secret.masks) < 1e-7  # the 1e-8 of the authors' cosine
    other = dataclasses.replace(seen, local=dataclasses.replace(local, learning_rate=0.05))
    assert distance(other, secret.masks) > 1e-4


def test_an_attack_that_simulates_the_steps_sees_what_one_that_does_not_misses():
  digits = data.load("samples:mnist", 2)
  images = data.normalize(digits.images, digits.statistics)
  model = models.create("mlp", (28, 28, 1), 10, 0.5, hidden_sizes=(128, 128))
  local = LocalUpdate(epochs=4, learning_rate=0.01)
  given = (_params(model, jnp.float32), images, digits.labels)
  seen, secret = observe(KEY, model, *given, statistics=digits.statistics, local=local)
  settings = {"max_iterations": 600, "schedule": "cosine"}

  def error(attack, observation, masks=None):
    state = attacks.solve(KEY, attack, observation, masks=masks)
    found = np.asarray(state.best.candidate.images)
    return np.mean((found[assign(found, images)] - images) ** 2)

  blind = error(attacks.dia(model, **settings), dataclasses.replace(seen, local=None))
  assert error(attacks.dia(model, **settings), seen) < blind / 10
  assert error(attacks.wiig(model, **settings), seen, secret.masks) < blind / 100


def test_lanes_give_what_a_single_trial_gives_and_go_on_from_a_checkpoint(tmp_path):
  model = _model()
  params, batch = _params(model, jnp.float32), _batch(model, 4, jnp.float32)
  # The numbers of the steps may differ between observations of one run.
  locals_ = [LocalUpdate(epochs=2, steps=2, learning_rate=rate) for rate in (0.1, 0.3)]
  seen = [observe(KEY, model, params, *batch, local=local)[0] for local in locals_]
  attack = attacks.dia(model, max_iterations=30)

  def run(**options):
    return engine.run([engine.Task(KEY, attack, seen)], chunk=5, **options)

  whole = {trial.job: trial for trial in run(lanes=2, devices=jax.devices()[:1])}
  assert len(whole) == 2
  for job, trial in whole.items():
    state = attacks.solve(trial_key(KEY, job), attack, seen[job.observation])
    np.testing.assert_allclose(trial.objective, state.best.objective, rtol=1e-3)
  saving = {"checkpoint_path": tmp_path / "lanes.npz", "checkpoint_seconds": 0.0}

  def stop(progress):
    if progress.iteration >= 15:
      raise KeyboardInterrupt

  where = {"lanes": 2, "devices": jax.devices()[:1]}
  with pytest.raises(KeyboardInterrupt):
    list(run(**where, **saving, on_progress=stop))
  resumed = {trial.job: trial for trial in run(**where, **saving)}
  for job, trial in whole.items():
    np.testing.assert_array_equal(trial.candidate.images, resumed[job].candidate.images)


def test_masks_are_compared_image_by_image_over_all_steps():
  model = _model()
  local = shuffled(jax.random.key(4), LocalUpdate(epochs=3, steps=2), 4)
  true = draw_masks(KEY, model, local, 4)
  assert {site: mask.shape for site, mask in true.items()} == mask_shapes(model, local, 4)
  site = next(iter(true))
  wrong = {name: np.array(mask) for name, mask in true.items()}
  # Of image 2, the mask of one step is turned.
  step, place = np.argwhere(np.asarray(local.indices(4)) == 2)[1]
  wrong[site][step, place] = 1 - wrong[site][step, place]
  found = mask_diagnostics(model, wrong, true, np.arange(4), local=local)
  np.testing.assert_allclose(found[site]["accuracy"], [1, 1, 2 / 3, 1])


def test_each_epoch_takes_each_image_of_a_client_once():
  local = shuffled(jax.random.key(0), LocalUpdate(epochs=5, steps=3, clients=2), 12)
  epochs = np.asarray(local.indices(12)).reshape(2, 5, 6)
  for client in range(2):
    assert (np.sort(epochs[client]) == np.arange(6) + 6 * client).all()
    assert len(set(map(tuple, epochs[client].tolist()))) > 1


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"epochs": 0}, "epochs of a local update is 0; expected an integer of at least 1"),
    ({"optimizer": "sdg"}, "Unknown optimizer of a local update: 'sdg'. Did you mean 'sgd'"),
    ({"learning_rate": 0.0}, "learning_rate of a local update is 0.0; expected a number above 0"),
    ({"momentum": 1.0}, r"momentum of a local update is 1.0; expected a number in \[0, 1\)"),
    ({"optimizer": "adam", "momentum": 0.9}, "with optimizer=adam, which has its own"),
  ],
)
def test_local_updates_that_cannot_be_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    LocalUpdate(**fields)


def test_a_batch_that_cannot_be_shared_out_is_refused():
  model = _model()
  params, batch = _params(model, jnp.float32), _batch(model, 3, jnp.float32)
  local = LocalUpdate(steps=2)
  message = "3 images cannot be shared out evenly among clients=1 with steps=2"
  with pytest.raises(InputError, match=message):
    observe(KEY, model, params, *batch, local=local)
  with pytest.raises(InputError, match=message):
    Observation(params, params, None, (0.0,), (1.0,), 3, local=local)


def test_defences_of_a_whole_update_act_on_it_and_those_of_a_single_step_are_refused():
  model = _model()
  params, batch = _params(model, jnp.float32), _batch(model, 2, jnp.float32)
  local = LocalUpdate(epochs=2, learning_rate=0.1)
  seen, _ = observe(KEY, model, params, *batch, local=local)
  pruned = defences.create("top_k", share=0.25)
  sent, _ = observe(KEY, model, params, *batch, local=local, defence=pruned)
  whole, kept = (jax.flatten_util.ravel_pytree(one.gradient)[0] for one in (seen, sent))
  assert abs(np.mean(kept != 0) - 0.25) < 0.01
  np.testing.assert_array_equal(kept[kept != 0], whole[kept != 0])
  attack = attacks.dia(model, max_iterations=2)
  assert np.isfinite(attacks.solve(KEY, attack, sent).best.objective)
  for name in ("dp_sgd", "soteria", "adaptive_dropout"):
    with pytest.raises(InputError, match="local steps"):
      observe(KEY, model, params, *batch, local=local, defence=defences.create(name))


@pytest.mark.parametrize("local", [LocalUpdate(steps=2), LocalUpdate(clients=2, epochs=2)])
def test_of_local_steps_the_closed_form_tells_the_first_and_hybrid_goes_on_from_there(local):
  digits = data.load("samples:mnist", 2)
  images = data.normalize(digits.images, digits.statistics)
  model = models.create("mlp", (28, 28, 1), 10, 0.5, hidden_sizes=(128, 128), use_bias=False)
  given = (_params(model, jnp.float32), images, digits.labels)
  seen, secret = observe(KEY, model, *given, statistics=digits.statistics, local=local)
  recovery = closed_form.recover(KEY, model, seen)
  exact = np.flatnonzero(recovery.parts.verdict == Verdict.EXACT)
  # One epoch: the image of the first step. Two: masks of both steps blur the zeros.
  assert exact.tolist() == ([0] if local.epochs == 1 else [])
  for i in exact:
    np.testing.assert_allclose(recovery.parts.images[i], images[i], atol=1e-4)
    for site, known in recovery.parts.known_masks.items():
      assert known[0].mean() > 0.9 and not known[1].any()
      np.testing.assert_array_equal(
        recovery.parts.masks[site][known], secret.masks[site][known.astype(bool)]
      )
  attack = attacks.hybrid(model, max_iterations=300, schedule="cosine")
  state = attacks.solve(KEY, attack, seen, recovery=recovery)
  found = np.asarray(state.best.candidate.images)
  for i in exact:  # held, in its place
    np.testing.assert_allclose(found[i], recovery.parts.images[i], atol=1e-6)
  alone = attacks.solve(KEY, attacks.dia(model, max_iterations=300, schedule="cosine"), seen)
  assert np.isfinite(state.best.objective)
  if exact.size:
    assert state.best.objective < alone.best.objective
