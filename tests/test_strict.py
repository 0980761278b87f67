"""All that is computed obeys JAX's strict modes: no implicit promotion of types or ranks."""

import jax
import numpy as np
import pytest
from conftest import make_victims

from jaxdia import attacks, engine, models
from jaxdia.client import defences, observe
from jaxdia.closed_form import Parts
from jaxdia.core.types import Statistics
from jaxdia.gradients import prepare

SHAPE = (8, 8, 3)
STATISTICS = Statistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
NETWORKS = {
  "mlp": {"hidden_sizes": (24, 24), "use_bias": True},
  "lenet": {},
  "resnet18": {"width": 32},
  "vit": {"width": 16, "depth": 1, "num_heads": 2, "mlp_size": 16},
}


@pytest.fixture(autouse=True)
def _strict():
  # What is compiled is known by the modes, so nothing is taken up that was traced without them.
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def test_the_strict_modes_are_on():
  with pytest.raises(Exception, match="promotion path"):
    np.float32(1) * jax.numpy.arange(3)
  with pytest.raises(ValueError, match="rank_promotion"):
    jax.numpy.ones((2, 3)) + jax.numpy.ones(3)


def _check(attack, defence):
  """Traces a trial from the client on: the modes speak where a program is traced."""
  model = attack.model

  def trial(key, images, labels):
    params = model.init(key)
    options = {"statistics": STATISTICS, "defence": defence}
    observation, secret = observe(key, model, params, images, labels, **options)
    state = attack.init(key, observation, attacks.Told(secret.masks, _parts(images, secret)))
    return attack.step(prepare(model, observation, "formed"), state)

  images = jax.ShapeDtypeStruct((2, *SHAPE), np.float32)
  labels = jax.ShapeDtypeStruct((2,), np.int32)
  state, _ = jax.eval_shape(trial, jax.random.key(0), images, labels)
  assert state.candidate.images.shape == images.shape


def _parts(images, secret):
  """What a closed form may have told, of its types."""
  masks = secret.masks or {}
  known = {site: mask > 0 for site, mask in masks.items()}
  verdict = np.zeros(2, np.int32)
  return Parts(images, verdict, masks, known, secret.labels, verdict > 0, {}, {})


@pytest.mark.parametrize("attack", ["dia", "ig"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_trained_and_attacked(name, attack):
  model = models.create(name, SHAPE, 5, 0.25, **NETWORKS[name])
  noise = defences.create("gaussian_noise", std=1e-3)
  _check(attacks.create(attack, model, labels="free", max_iterations=2), noise)


@pytest.mark.parametrize("name", defences.DEFENCES)
def test_every_defence_is_applied_and_attacked(name):
  model = models.create("mlp", SHAPE, 5, 0.25, **NETWORKS["mlp"])
  for distance in ("cosine", "squared_l2"):
    _check(attacks.dia(model, distance=distance, max_iterations=2), defences.create(name))


@pytest.mark.parametrize("name", attacks.CATALOGUE)
def test_every_attack_starts_and_takes_a_step(name):
  model = models.create("mlp", SHAPE, 5, 0.25, **NETWORKS["mlp"])
  _check(attacks.create(name, model, max_iterations=2), defences.identity)


@pytest.mark.parametrize("name", ["dia", "ig", "hybrid"])
def test_attacks_run_to_their_end(model, name):
  _, (observation,), _ = make_victims(model, 1, statistics=Statistics((0.1,), (0.9,)))
  attack = attacks.create(name, model, max_iterations=3)
  state = attacks.solve(jax.random.key(2), attack, observation)
  assert np.isfinite(state.best.objective) and state.iteration <= 3


@pytest.mark.parametrize("matching", ["formed", "factored"])
def test_the_engine_runs(model, matching, tmp_path):
  _, observations, _ = make_victims(model, 3, batch_size=2)
  tasks = [
    engine.Task(
      jax.random.key(0), attacks.dia(model, max_iterations=4, mask_weight=w), observations
    )
    for w in (0.0, 1.0)
  ]
  trials = engine.run(
    tasks,
    lanes=2,
    devices=jax.local_devices()[:2],
    matching=matching,
    record=(1, 3),
    checkpoint_path=tmp_path / "trials.npz",
    checkpoint_seconds=0.0,
  )
  assert all(np.isfinite(trial.objective) for trial in trials)
