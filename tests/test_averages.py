"""Running averages that a client sends tell of its batch, and a search may use them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxdia import attacks, data, engine, evaluation, models, updates
from jaxdia.audit.attempts import choose_attack
from jaxdia.client import Observation, observe
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_name
from jaxdia.models import Averages


class Net(nn.Module):
  """Two convolutions with BatchNorm and dropout."""

  momentum: float = 0.99

  @nn.compact
  def __call__(self, x, train=True):
    for channels in (8, 16):
      x = nn.Conv(channels, (3, 3), strides=2)(x)
      x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
      x = nn.Dropout(0.1)(nn.gelu(x), deterministic=not train)
    return nn.Dense(10)(x.reshape(len(x), -1))


class NNXNet(nnx.Module):
  """A dense layer with BatchNorm and dropout."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.hidden, self.norm = nnx.Linear(144, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    self.dropout, self.out = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)

  def __call__(self, x):
    return self.out(self.dropout(self.norm(self.hidden(x.reshape(len(x), -1)))))


def _observe(model, size=2, side=28):
  """Returns what a client shows that sends its averages too, and what it does not."""
  victims = data.load("samples:mnist", size, image_size=side)
  images = data.normalize(victims.images, victims.statistics)
  params = model.init(jax.random.key(0))
  key = jax.random.key(5)
  seen, secret = observe(key, model, params, images, victims.labels, statistics=victims.statistics)
  before = leaves_by_name(model.network.collections.tree)
  after = models.averages_after(model, params, secret.masks, secret.images, {})
  averages = {name: Averages(before[name], after[name]) for name in before}
  return dataclasses.replace(seen, averages=averages), secret, victims.statistics


def _given_averages(momentum=0.99):
  stats = Net().init(jax.random.key(0), jnp.ones((1, 12, 12, 1)), train=False)["batch_stats"]
  rng = np.random.default_rng(0)
  return {
    "batch_stats": jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32), stats)
  }


def test_they_are_those_of_the_plain_module():
  module, variables = Net(0.9), _given_averages()
  model = models.from_flax(module, (12, 12, 1))
  params = model.init(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (3, 12, 12, 1))
  rngs = {"dropout": jax.random.key(2)}
  _, new = module.apply({"params": params, **variables}, images, rngs=rngs, mutable="batch_stats")
  masks = models.read_masks(model, params, images, rngs)
  given = {name: jnp.asarray(x) for name, x in leaves_by_name(variables).items()}
  found = models.averages_after(model, params, masks, images, given)
  expected = leaves_by_name(new)
  assert set(found) == set(expected) == set(model.network.constants())
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_those_of_nnx_are_those_of_the_plain_module():
  module = NNXNet()
  module.train()
  model = models.from_nnx(module, (12, 12, 1))
  assert models.follows_averages(model)
  params, names = model.init(jax.random.key(0)), ("norm.mean", "norm.var")
  images = jax.random.uniform(jax.random.key(1), (3, 12, 12, 1))
  own = {name: jax.random.uniform(jax.random.key(i), (8,)) for i, name in enumerate(names)}
  for before in ({}, own):
    found = models.averages_after(model, params, None, images, before)
    other = nnx.clone(module)
    for name, value in before.items():
      getattr(other.norm, name.partition(".")[2])[...] = value
    other(images)
    assert set(found) == set(names)
    for name, value in zip(names, (other.norm.mean, other.norm.var), strict=True):
      np.testing.assert_allclose(found[name], value[...], rtol=1e-5, atol=1e-6)
  assert not np.any(module.norm.mean[...])  # untouched
  # And a search is held to them.
  seen, secret = observe(jax.random.key(5), model, params, images, [0, 1, 2])
  after = models.averages_after(model, params, secret.masks, secret.images, own)
  seen = dataclasses.replace(seen, averages={n: Averages(own[n], after[n]) for n in names})
  assert attacks.average_distance(model, seen, secret.masks, secret.images) < 1e-8
  state = attacks.solve(jax.random.key(0), _weighted(model), seen)
  assert np.isfinite(state.best.objective) and state.best.objective > state.best.distance


def _weighted(model):
  return attacks.dia(model, average_weight=1.0, max_iterations=2)


def test_nothing_is_left_at_the_truth_and_the_momentum_has_no_part_in_it():
  elsewhere = []
  for momentum in (0.9, 0.99):
    model = models.from_flax(Net(momentum), (12, 12, 1))
    seen, secret, _ = _observe(model, side=12)
    assert attacks.average_distance(model, seen, secret.masks, secret.images) < 1e-8
    other = secret.images[:, ::-1] * 0.5
    elsewhere.append(attacks.average_distance(model, seen, secret.masks, other))
  assert elsewhere[0] > 0.01
  np.testing.assert_allclose(elsewhere[0], elsewhere[1], rtol=1e-3)


@pytest.mark.slow
def test_a_search_that_uses_them_is_nearer():
  model = models.from_flax(Net(), (28, 28, 1))
  seen, secret, statistics = _observe(model)
  errors = {}
  for weight in (None, 0.1):
    attack = attacks.dia(model, average_weight=weight, max_iterations=800, schedule="cosine")
    state = attacks.solve(jax.random.key(1), attack, seen)
    scored = evaluation.evaluate(model, secret, state.best.candidate, statistics)
    errors[weight] = np.mean([score["mse_normalized"] for score in scored.scores])
  assert errors[0.1] < 0.5 * errors[None], errors


def test_lanes_give_each_trial_the_averages_of_its_client():
  model = models.from_flax(Net(), (12, 12, 1))
  seen, _, _ = _observe(model, side=12)
  twice = {n: Averages(p.before, p.after + 1) for n, p in seen.averages.items()}
  clients = [seen, dataclasses.replace(seen, averages=twice)]
  attack = attacks.dia(model, average_weight=1.0, max_iterations=3)
  ends = {}
  key = jax.random.key(0)
  devices = jax.local_devices()[:1]
  for trial in engine.run(engine.Task(key, attack, clients), lanes=2, devices=devices):
    ends[trial.job.observation] = trial.objective
  for number, client in enumerate(clients):
    trial_key = jax.random.fold_in(jax.random.fold_in(key, number), 0)
    alone = attacks.solve(trial_key, attack, client)
    np.testing.assert_allclose(ends[number], alone.best.objective, rtol=1e-3)
  assert abs(ends[0] - ends[1]) > 1e-2 * ends[0]


def _changed(seen, change):
  return dataclasses.replace(seen, averages=change(dict(seen.averages)))


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda a: None, "average_weight is 1.0, but the observation has no running averages"),
    (
      lambda a: {"norm.mean": next(iter(a.values()))},
      "Unknown running averages of Net: 'norm.mean'",
    ),
    (
      lambda a: {n: Averages(p.before[:3], p.after[:3]) for n, p in a.items()},
      r"have shape \(3,\); expected \(8,\) as in Net",
    ),
  ],
)
def test_averages_that_are_missing_or_of_another_network_are_refused(change, message):
  model = models.from_flax(Net(), (12, 12, 1))
  seen, _, _ = _observe(model, side=12)
  attack = attacks.dia(model, average_weight=1.0)
  with pytest.raises(InputError, match=message):
    attack.init(jax.random.key(0), _changed(seen, change))


def test_a_network_without_them_is_named():
  model = models.create("mlp", (4, 4, 1), 3)
  params = model.init(jax.random.key(0))
  seen = Observation(params, params, [0], [0.0], [1.0], 1)
  with pytest.raises(InputError, match="MLP has no running averages that can be followed"):
    attacks.dia(model, average_weight=1.0).init(jax.random.key(0), seen)


@pytest.mark.parametrize(
  "pair, message",
  [
    (Averages(np.zeros(2), np.zeros(3)), r"shape \(2,\) before the step and \(3,\) after"),
    (Averages(np.zeros(2), np.array([0, np.nan])), "are not finite"),
  ],
)
def test_averages_that_do_not_fit_together_are_refused(pair, message):
  params = models.create("mlp", (4, 4, 1), 3).init(jax.random.key(0))
  with pytest.raises(InputError, match=message):
    Observation(params, params, [0], [0.0], [1.0], 1, averages={"norm.mean": pair})


def _files(model):
  seen, _, _ = _observe(model, side=12)
  before = {n.replace(".", "/"): np.asarray(p.before) for n, p in seen.averages.items()}
  after = {n.replace(".", "/"): np.asarray(p.after) for n, p in seen.averages.items()}
  return seen, before, after


def test_an_update_tells_them_by_name():
  model = models.from_flax(Net(), (12, 12, 1))
  seen, before, after = _files(model)
  found = updates.find_averages(model, before, after | {"other": np.ones(3)})
  assert found.notes == () and set(found.averages) == set(seen.averages)
  change = {name: after[name] - before[name] for name in after}
  again = updates.find_averages(model, before, change, is_difference=True).averages
  for name, pair in seen.averages.items():
    np.testing.assert_allclose(found.averages[name].after, pair.after, rtol=1e-6)
    np.testing.assert_allclose(again[name].after, pair.after, rtol=1e-5, atol=1e-7)


def test_averages_that_tell_nothing_are_left_out_with_a_line():
  model = models.from_flax(Net(), (12, 12, 1))
  _, before, after = _files(model)
  assert updates.find_averages(model, before, before) == (None, ())
  assert updates.find_averages(model, before, {}) == (None, ())
  (several,) = updates.find_averages(model, before, after, local_steps=3).notes
  assert "after 3 steps" in several
  (none_before,) = updates.find_averages(model, {}, after).notes
  assert "none of this shape before the step" in none_before
  nan = {name: array * np.nan for name, array in after.items()}
  for pair in ((before, nan), (nan, after)):
    found, (broken,) = updates.find_averages(model, *pair)
    assert found is None and "NaN or infinite" in broken
  half = {name: array.astype(np.float16) for name, array in after.items()}
  halved = {name: array.astype(np.float16) for name, array in before.items()}
  # Those near 1 are lost in their rounding, those near 0 are not.
  for pair in ((halved, half), (halved, after), (before, half)):
    rounded = updates.find_averages(model, *pair)
    assert all(name.endswith("mean") for name in rounded.averages) and len(rounded.averages) == 2
    assert "BatchNorm_0.var" in rounded.notes[0] and "left out" in rounded.notes[0]


def test_an_audit_compares_them_in_its_search():
  model = models.from_flax(Net(), (12, 12, 1))
  seen, _, _ = _observe(model, side=12)
  for averages, weight in ((seen.averages, 0.1), (None, None)):
    told = dataclasses.replace(seen, averages=averages)
    _, attack = choose_attack(model, told, None)
    assert attack.settings.average_weight == weight
