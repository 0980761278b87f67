"""Attackers who know the defence of a client, and what it is worth to them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import compilations, make_victims
from experiment_cases import launch, rows_of, silent, small

from jaxdia import attacks, audit, data, engine, evaluation, models, study
from jaxdia.attacks import Status, objective, prepare_for
from jaxdia.attacks.protocol import Candidate, Known
from jaxdia.audit.proof import prove
from jaxdia.audit.settings import validate
from jaxdia.client import defences, observe
from jaxdia.gradients import noise_distance

# A defence, a distance, and how far the true gradient may be from what was sent.
EXACT = (
  ("top_k", {"share": 0.1}, "cosine"),
  ("top_k,clipping", {"share": 0.3, "max_norm": 1e-3}, "squared_l2"),
  ("soteria", {"pruned": 0.5}, "cosine"),
  ("soteria,top_k", {"pruned": 0.5, "share": 0.2}, "cosine"),
  ("dp_sgd", {"max_norm": 0.5, "noise_multiplier": 0.0}, "cosine"),
)


def _distance_of_the_truth(model, observation, secret, distance, defence):
  attack = attacks.create("wiig", model, distance=distance, defence=defence)
  candidate = Candidate(secret.images, None, None)
  known = Known(secret.masks, secret.labels)
  _, terms = jax.jit(objective)(model, attack.settings, observation, candidate, known)
  return float(terms.distance)


@pytest.mark.parametrize("name, settings, distance", EXACT)
def test_what_was_sent_is_at_no_distance_for_who_knows_the_defence(name, settings, distance):
  model = models.create("mlp", (6, 6, 1), 5, 0.5, hidden_sizes=(24, 24))
  defence = defences.create(name, **settings)
  _, observations, secrets = make_victims(model, 3, 2, defence=defence)
  for pair in zip(observations, secrets, strict=True):
    ignored = _distance_of_the_truth(model, *pair, distance, "ignored")
    assert _distance_of_the_truth(model, *pair, distance, "known") < 1e-3 * ignored


def test_noise_is_expected_at_its_own_distance(model):
  """As a mean over 20 gradients, of each at two kinds of noise."""
  for settings in ({"std": 0.003}, {"std": 0.4, "relative": True}):
    defence = defences.create("gaussian_noise", **settings)
    _, observations, secrets = make_victims(model, 20, defence=defence)
    for distance in ("cosine", "squared_l2"):
      ratios = []
      for observation, secret in zip(observations, secrets, strict=True):
        attack = attacks.create("wiig", model, distance=distance)
        target = prepare_for(model, attack.settings, observation).target
        expected = float(noise_distance(distance, target.noise, target.squared_norm))
        ratios.append(
          _distance_of_the_truth(model, observation, secret, distance, "known") / expected
        )
      # 1,500 entries: of each ratio the standard deviation is 4 %, of their mean 1 %.
      assert abs(np.mean(ratios) - 1) < 0.04 and np.std(ratios) < 0.1


def test_noise_as_large_as_the_gradient_ends_no_search(model):
  defence = defences.create("gaussian_noise", std=100.0)
  _, (observation,), _ = make_victims(model, 1, defence=defence)
  attack = attacks.create("dia", model, max_iterations=5)
  assert attacks.solve(jax.random.key(0), attack, observation).status == Status.MAX_ITERATIONS


@pytest.fixture(scope="module")
def digits():
  victims = data.load("samples:mnist", count=4)
  images = data.normalize(victims.images, victims.statistics)[:, ::2, ::2]
  return images, victims


def _attack(digits, name, settings, **overrides):
  """Returns MSEs of four digits and the iterations that they took, for known and ignored."""
  images, victims = digits
  model = models.create("mlp", images.shape[1:], 10, 0.5, hidden_sizes=(64, 64))
  params = model.init(jax.random.key(0))
  facts = {"statistics": victims.statistics, "defence": defences.create(name, **settings)}
  pairs = [
    observe(jax.random.key(10 + i), model, params, *one, **facts)
    for i, one in enumerate(zip(images[:, None], victims.labels[:, None], strict=True))
  ]
  results = []
  for known in ("known", "ignored"):
    attack = attacks.create("dia", model, defence=known, **overrides)
    task = engine.Task(jax.random.key(3), attack, [seen for seen, _ in pairs])
    trials = sorted(engine.run(task, say=silent), key=lambda trial: trial.job)
    scores = [
      evaluation.evaluate(model, secret, trial.candidate, victims.statistics).scores[0]
      for (_, secret), trial in zip(pairs, trials, strict=True)
    ]
    mse = np.array([score["mse_normalized"] for score in scores])
    results.append((mse, np.array([trial.iterations for trial in trials]), trials))
  return results


@pytest.mark.parametrize(
  "name, settings, factor",
  [
    ("top_k", {"share": 0.1}, 3),
    ("soteria", {"pruned": 0.5}, 30),
    ("percentile", {"percentile": 50.0, "gamma": 0.05}, 10),
  ],
)
def test_images_are_nearer_for_who_knows_what_was_pruned(digits, name, settings, factor):
  (known, _, _), (ignored, _, _) = _attack(digits, name, settings, max_iterations=1000)
  assert np.all(known < ignored)
  assert np.median(known) * factor < np.median(ignored)


def test_a_search_that_knows_the_noise_ends_there_with_images_as_good(digits):
  settings = {"std": 0.3, "relative": True}
  known, ignored = _attack(digits, "gaussian_noise", settings, max_iterations=1000)
  assert {trial.status for trial in known[2]} == {Status.CONVERGED}
  assert np.all(known[1] < 200) and np.all(ignored[1] == 1000)
  assert np.mean(known[0]) < 1.2 * np.mean(ignored[0]) and np.all(known[0] < 0.02)


def test_an_attack_that_ignores_a_defence_sees_the_gradient_alone(model):
  _, (observation,), _ = make_victims(model, 1, defence=defences.create("top_k"))
  plain = dataclasses.replace(observation, defence=defences.identity)
  key = jax.random.key(0)
  one, other = (
    attacks.solve(key, attacks.create("dia", model, max_iterations=20, **more), seen)
    for seen, more in ((observation, {"defence": "ignored"}), (plain, {}))
  )
  jax.tree.map(np.testing.assert_array_equal, one.best, other.best)


def test_noises_of_several_sizes_and_bounds_are_compiled_once():
  base = small(name="dia", max_iterations=3)
  base.data.count = 1
  for name, field, values in (
    ("gaussian_noise", "std", (0.01, 0.02, 0.03)),
    ("percentile", "gamma", (0.01, 0.02, 0.03)),
  ):
    base.defence = {"name": name}
    cells = study.plan(study.study_config("", "", base, grid=[(f"defence.{field}", values)]))
    assert [one.cells for one in study.group(cells)] == [(0, 1, 2)]
    model = models.create("mlp", (6, 6, 1), 5, 0.25, hidden_sizes=(23, 24))
    made = [defences.create(name, **{field: value}) for value in values]
    tasks = [
      engine.Task(
        jax.random.key(1),
        attacks.create("dia", model, max_iterations=3),
        make_victims(model, 1, defence=defence)[1],
      )
      for defence in made
    ]
    with compilations() as compiled:
      trials = list(engine.run(tasks, say=silent))
    assert len(trials) == 3
    assert sum("(init_trial)" in str(program) for program in compiled) == 1
  cells = study.plan(study.study_config("", "", base, grid=[("defence.name", ("none", "top_k"))]))
  assert [one.cells for one in study.group(cells)] == [(0,), (1,)]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_audit_is_told_the_defence(model, is_frozen):
  """By its config; and what it proves is held against what the defence left."""
  config = audit.default_config()
  config.before, config.gradient = "before.npz", "gradient.npz"
  config.defence.name, config.defence.share = "top_k", 0.2
  defence = validate(config).defence
  assert defence == defences.create("top_k", share=0.2)
  assert validate(config).to_json()["defence"] == {"name": "top_k", "share": 0.2}
  _, (seen,), (secret,) = make_victims(model, 1, defence=defence)
  if is_frozen:
    seen = dataclasses.replace(seen, gradient=seen.gradient | {"classifier": {"kernel": None}})
  truth = (secret.masks, secret.images, secret.labels)
  untold = dataclasses.replace(seen, defence=defences.identity)
  told = prove(model, seen, *truth).residual
  assert told < 1e-4 < 0.05 < prove(model, untold, *truth).residual


def test_a_chain_from_the_command_line(tmp_path):
  done = launch(
    f"--workdir={tmp_path}",
    "--config.data.count=1",
    "--config.model.hidden_sizes=(32,)",
    "--config.attack.max_iterations=20",
    "--config.defence.name=top_k,quantisation",
    "--config.defence.share=0.5",
    "--config.defence.bits=16",
  )
  assert done.returncode == 0, done.stderr
  assert b"  defence  top_k(share=0.5), then quantisation(bits=16)" in done.stdout.encode()
  (row,) = rows_of(tmp_path)
  assert row["defence"] == "top_k(share=0.5), then quantisation(bits=16)"
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["defence"] == {"name": "top_k,quantisation", "share": 0.5, "bits": 16}
