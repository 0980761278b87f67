"""What a gradient gives away without a search, against the truth and against what spoils it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import STATISTICS, compute_scores, make_lenet, make_model, observe_victims
from conftest import compilations
from flax import linen as nn

from jaxdia import attacks, engine, experiment, models
from jaxdia.client import observe
from jaxdia.closed_form import Verdict, recover, recover_labels
from jaxdia.closed_form.batch import solve
from jaxdia.closed_form.patches import find_patching
from jaxdia.closed_form.sparse import search, split_zeros
from jaxdia.closed_form.structure import find_chain
from jaxdia.experiment import config


@pytest.mark.parametrize(
  ("size", "use_bias"),
  [
    (1, True),
    (6, False),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in [(1, False), (6, True)]),
  ],
)
def test_an_mlp_gives_everything_away(size, use_bias):
  model = make_model(hidden_sizes=(128, 96, 112), use_bias=use_bias)
  observation, secret = observe_victims(model, size)
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), recovery.summary()
  assert recovery.reason == "" and np.all(recovery.residual < 1e-4)
  for score in compute_scores(model, secret, recovery):
    assert score["mse_normalized"] < 1e-8
    assert score["label_accuracy"] == 1
    assert set(score["mask_accuracy_by_site"]) == {"dropout_0", "dropout_1", "dropout_2"}
    assert score["mask_accuracy"] > 0.99
    assert score["mask_accuracy_by_site"]["dropout_0"] == 1


def test_the_recovered_batch_has_the_clients_gradient():
  model = make_model()
  observation, _ = observe_victims(model, 4)
  parts = recover(jax.random.key(0), model, observation).parts
  from jaxdia.client import client_gradient

  gradient = client_gradient(model, observation.params, parts.masks, parts.images, parts.labels)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(observation.gradient), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_without_dropout_one_image_is_exact_and_a_batch_is_refused():
  model = make_model(rate=0.0)
  observation, secret = observe_victims(model, 1)
  recovery = recover(jax.random.key(0), model, observation)
  assert compute_scores(model, secret, recovery)[0]["mse_normalized"] < 1e-8
  observation, _ = observe_victims(model, 3)
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.NOT_APPLICABLE).all()
  assert "without dropout" in recovery.reason
  assert not np.any(recovery.parts.images)


class ConvEmbedding(nn.Module):
  """A small transformer-like network whose patches are embedded by a convolution."""

  use_bias: bool

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Conv(48, (7, 7), (7, 7), padding="VALID", use_bias=self.use_bias)(x)
    x = x.reshape(x.shape[0], -1, 48)
    x = x + self.param("positions", nn.initializers.normal(1.0), (1, 16, 48))
    x = nn.Dropout(0.4)(x, deterministic=not train)
    x = x + nn.Dense(48)(nn.gelu(nn.LayerNorm()(x)))
    return nn.Dense(10)(x.mean(axis=1))


@pytest.mark.parametrize("kind", ["vit", "conv", "conv without bias"])
def test_patches_of_one_image(kind):
  if kind == "vit":
    model = make_model("vit", width=64, depth=1, num_heads=4, mlp_size=32)
  else:
    model = models.from_flax(ConvEmbedding(kind == "conv"), (28, 28, 1))
  observation, secret = observe_victims(model, 1)
  recovery = recover(jax.random.key(0), model, observation)
  score = compute_scores(model, secret, recovery)[0]
  assert recovery.parts.verdict[0] == Verdict.EXACT
  assert score["mse_normalized"] < 1e-8
  (site,) = score["mask_accuracy_by_site"]
  assert site == find_patching(model.network).site == model.sites[0].name
  assert score["mask_accuracy_by_site"][site] == 1 and score["label_accuracy"] == 1
  observation, _ = observe_victims(model, 2)
  recovery = recover(jax.random.key(0), model, observation)
  assert not recovery.parts.verdict.any() and "fill the width" in recovery.reason


def test_dropout_before_the_position_embedding_is_no_patch_embedding():
  class Early(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = nn.Conv(48, (7, 7), (7, 7))(x).reshape(x.shape[0], -1, 48)
      x = nn.Dropout(0.4)(x, deterministic=not train)
      x = x + self.param("positions", nn.initializers.normal(1.0), (1, 16, 48))
      return nn.Dense(10)(nn.gelu(x).mean(axis=1))

  assert find_patching(models.from_flax(Early(), (28, 28, 1)).network) is None


def _spoiled(observation, how):
  rng = np.random.default_rng(0)

  def leaf(x):
    x = np.asarray(x)
    if how == "noised":
      return x + 0.02 * x.std() * rng.standard_normal(x.shape).astype(x.dtype)
    if how == "pruned":
      return np.where(np.abs(x) < np.quantile(np.abs(x), 0.7), 0, x)
    if how == "quantised":
      step = np.abs(x).max() / 127
      return np.round(x / step).astype(x.dtype) * step
    return x * np.nan

  return dataclasses.replace(observation, gradient=jax.tree.map(leaf, observation.gradient))


@pytest.mark.parametrize("how", ["noised", "pruned", "quantised", "nan"])
@pytest.mark.parametrize(
  ("name", "size"),
  [
    *(("mlp", 1), ("mlp", 4)),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("vit", "lenet")),
  ],
)
def test_it_never_claims_more_than_the_gradient_supports(name, size, how):
  model = make_lenet() if name == "lenet" else make_model(name)
  observation, secret = observe_victims(model, size)
  recovery = recover(jax.random.key(0), model, _spoiled(observation, how))
  assert not (recovery.parts.verdict == Verdict.EXACT).any()
  assert recovery.reason
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(recovery.parts))
  # Masks are called known where they stand out from the noise, and then they are right.
  for score in compute_scores(model, secret, recovery):
    assert score["mask_accuracy"] is None or score["mask_accuracy"] > 0.97


@pytest.mark.parametrize("size", [1, 4])
def test_several_local_steps_are_not_mistaken_for_one(size):
  model = make_model()
  observation, secret = observe_victims(model, size)
  params = jax.tree.map(lambda p, g: p - 0.5 * g, observation.params, observation.gradient)
  later, _ = observe(
    jax.random.key(7),
    model,
    params,
    secret.images,
    secret.labels,
    statistics=STATISTICS,
    reveal_labels=False,
  )
  total = jax.tree.map(jnp.add, observation.gradient, later.gradient)
  recovery = recover(jax.random.key(0), model, dataclasses.replace(observation, gradient=total))
  assert not (recovery.parts.verdict == Verdict.EXACT).any(), recovery.summary()


@pytest.mark.slow
def test_a_little_noise_is_told_from_none():
  model = make_model("vit")
  observation, secret = observe_victims(model, 1)
  rng = np.random.default_rng(0)
  noisy = dataclasses.replace(
    observation,
    gradient=jax.tree.map(
      lambda x: x + 0.005 * x.std() * rng.standard_normal(x.shape).astype(np.float32),
      observation.gradient,
    ),
  )
  recovery = recover(jax.random.key(0), model, noisy)
  assert recovery.parts.verdict[0] == Verdict.APPROXIMATE
  assert compute_scores(model, secret, recovery)[0]["mse_normalized"] < 0.1


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_labels_of_batches_as_counts(name):
  model = models.create(name, (28, 28, 1), 10, 0.25)
  right = []
  for seed in range(3):
    observation, secret = observe_victims(model, 6, seed)
    labels = np.asarray(jax.jit(recover_labels)(model, observation))
    assert labels.shape == (6,) and np.all(np.diff(labels) >= 0)
    counts = [np.bincount(x, minlength=10) for x in (labels, secret.labels)]
    right.append(np.minimum(*counts).sum() / 6)
  assert np.mean(right) > (0.9 if name == "lenet" else 0.7)  # without a bias it is an estimate


@pytest.mark.slow
def test_more_images_than_dropout_can_tell_apart_are_said_to_be_missing():
  model = make_model(rate=0.1, hidden_sizes=(32, 32))
  observation, _ = observe_victims(model, 12)
  recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict != Verdict.EXACT).any() and "12 samples" in recovery.reason


def test_search_finds_planted_planes_and_zeros_are_split_at_the_gap():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    codes = rng.standard_normal((6, 200)) * (rng.uniform(size=(6, 200)) < 0.5)
    points = np.linalg.svd(codes, full_matrices=False)[2].T
    points = points[np.linalg.norm(points, axis=1) > 0]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    starts = rng.standard_normal((64, 6))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    normals = search(points, np.ones(len(points)), np.zeros(6), starts)
    zeros = np.sum(np.abs(points @ np.asarray(normals).T) < 1e-4, axis=0)
    assert np.mean(zeros > 60) > 0.5  # any five points have a plane; these have about 100
    values = jnp.asarray([1e-9, -3.0, 2e-9, 0.5, 0.0])
    split = split_zeros(values, jnp.ones(5), 1, 4)
    assert split.zero.tolist() == [True, False, True, False, True] and split.gap > 1e6


def test_a_chain_is_found_by_calling_the_network():
  class Skip(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = nn.Dense(20, name="first")(x.reshape(x.shape[0], -1))
      x = x + nn.Dense(20, name="second")(nn.gelu(x))
      x = nn.Dropout(0.5, name="drop")(nn.tanh(x), deterministic=not train)
      return nn.Dense(10, name="last")(x)

  chain = find_chain(models.from_flax(Skip(), (4, 4, 1)).network)
  assert [layer.path for layer in chain.layers] == [("last",)]  # the others are skipped over
  assert chain.inputs[0].site == "drop" and chain.pixels is None
  chain = find_chain(make_model().network)
  assert [source.site for source in chain.inputs] == [None, "dropout_0", "dropout_1", "dropout_2"]
  assert sorted(chain.pixels[0]) == list(range(28 * 28))


def test_hybrid_holds_what_is_exact_and_searches_the_rest():
  model = make_model("vit", width=64, depth=1, num_heads=4, mlp_size=32)
  observation, secret = observe_victims(model, 1)
  parts = recover(jax.random.key(0), model, observation).parts
  attack = attacks.hybrid(model, max_iterations=5)
  (trial,) = engine.run([engine.Task(jax.random.key(1), attack, [observation], parts=[parts])])
  np.testing.assert_allclose(trial.candidate.images, parts.images, atol=1e-4)  # valid pixels
  site = model.sites[0].name
  assert np.array_equal(trial.candidate.masks[site], secret.masks[site])
  other = model.sites[2].name
  assert not np.array_equal(trial.candidate.masks[other], parts.masks[other])


def test_features_are_matched():
  model = make_lenet()
  observation, secret = observe_victims(model, 1)
  parts = recover(jax.random.key(0), model, observation).parts
  true = attacks.Candidate(secret.images, secret.masks, None)
  assert attacks.feature_distance(model, observation, true, parts) < 1e-6
  other = true._replace(images=true.images + 0.1)
  assert attacks.feature_distance(model, observation, other, parts) > 1e-3


def test_closed_forms_are_compiled_once_for_all_rates_of_a_network():
  model = make_model()
  recover(jax.random.key(0), model, observe_victims(model, 1)[0])
  for rate in (0.15, 0.6):
    other = make_model(rate=rate)
    observation, secret = observe_victims(other, 1)
    with compilations() as compiled:
      recovery = recover(jax.random.key(0), other, observation)
    assert not compiled
    np.testing.assert_allclose(recovery.parts.images, secret.images, atol=1e-4)
    for site, mask in secret.masks.items():
      np.testing.assert_array_equal(recovery.parts.masks[site], mask)


@pytest.mark.slow
def test_a_search_that_matches_features_is_interrupted_and_resumed(tmp_path):
  model = make_lenet()
  observation, _ = observe_victims(model, 1)
  # A gradient without any sense gives results of the same form.
  sick = dataclasses.replace(
    observation, gradient=jax.tree.map(lambda x: x * jnp.nan, observation.gradient)
  )
  parts = [recover(jax.random.key(0), model, o).parts for o in (observation, sick)]
  assert parts[0].features and jax.tree.structure(parts[0]) == jax.tree.structure(parts[1])
  nothing = parts[0]._replace(verdict=np.zeros(1, np.int32))
  attack = attacks.hybrid(model, feature_weight=0.5, max_iterations=12)
  task = engine.Task(jax.random.key(1), attack, [observation, sick], parts=[nothing, parts[1]])
  path = tmp_path / "checkpoint.npz"

  class Enough(Exception):
    pass

  def stop(progress):
    if path.exists():
      raise Enough

  options = {"lanes": 1, "chunk": 3, "checkpoint_path": path, "checkpoint_seconds": 0.0}
  options["devices"] = jax.local_devices()[:1]
  with pytest.raises(Enough):
    list(engine.run([task], on_progress=stop, **options))
  reports = []
  resumed = list(engine.run([task], on_progress=reports.append, **options))
  path.unlink(missing_ok=True)
  alone = list(engine.run([task], **options))
  assert [trial.status.name for trial in alone] == ["MAX_ITERATIONS", "DIVERGED"]
  assert reports[-1].steps < 13  # the first three were not repeated
  np.testing.assert_array_equal(resumed[0].candidate.images, alone[0].candidate.images)


def test_closed_forms_outlive_an_interruption_of_the_search(tmp_path, monkeypatch):
  c = _config("mlp", 2, 1, name="hybrid", feature_weight=0.0)

  def interrupted(tasks, **options):
    assert all(tasks[0].parts)
    raise KeyboardInterrupt

  run = engine.run
  monkeypatch.setattr(engine, "run", interrupted)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(c, tmp_path, say=print)
  assert len(list((tmp_path / "checkpoint").glob("hybrid_closed_form_*.npz"))) == 2
  monkeypatch.setattr(engine, "run", run)
  monkeypatch.setattr("jaxdia.closed_form.recover", None)
  summary = experiment.run(c, tmp_path, say=print)
  assert summary["hybrid"]["finished"] == 2
  assert summary["hybrid"]["metrics"]["mse_normalized"]["max"] < 1e-8
  assert not list((tmp_path / "checkpoint").glob("*"))


def _config(network, count, size, **attack):
  c = config.config_for(network, "mnist")
  if network == "mlp":
    c.model.hidden_sizes = (128, 96, 112)
  c.data.count, c.data.batch_size, c.model.dropout_rate = count, size, 0.5
  c.attack.update({"name": "closed_form,hybrid", "max_iterations": 20, **attack})
  return c


def test_the_launchers_results_say_which_part_came_from_where(tmp_path):
  summary = experiment.run(_config("mlp", 4, 2), tmp_path, say=print)
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  assert len(rows) == 8
  for row in rows:
    origin = row["closed_form"]
    assert row["mse_normalized"] < 1e-8 and row["label_accuracy"] == 1
    assert origin["verdict"] == "exact" and origin["label"] and origin["reason"] is None
    assert origin["masks"] == {"dropout_0": 1.0, "dropout_1": 1.0, "dropout_2": 1.0}
    assert origin["residual"] < 1e-4
  assert {row["status"] for row in rows if row["attack"] == "closed_form"} == {"exact"}
  assert summary["closed_form"]["finished"] == summary["hybrid"]["finished"] == 4
  assert min(summary["closed_form"][f"{kind}_seconds"] for kind in ("run", "compile")) > 0
  again = experiment.run(_config("mlp", 4, 2), tmp_path, say=print)
  assert again["hybrid"]["metrics"] == summary["hybrid"]["metrics"]


@pytest.mark.slow
def test_what_no_closed_form_gives_is_counted_and_searched(tmp_path):
  c = _config("lenet", 2, 1)
  c.data.image_size, c.model.channels = 16, 2  # too few equations
  summary = experiment.run(c, tmp_path, say=print)
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  alone = [row for row in rows if row["attack"] == "closed_form"]
  for row in alone:
    assert row["status"] == "not_applicable" and row["mse_normalized"] is None
    assert row["mask_accuracy_by_site"] == {f"dropout_{i}": 1.0 for i in (1, 2, 3)}
    assert set(row["closed_form"]["features"]) == {"hidden", "classifier", "conv_2"}
    assert "inputs of conv_1 in part" in row["closed_form"]["reason"]
  counts = summary["closed_form"]
  assert (counts["attempted"], counts["finished"], counts["not_applicable"]) == (2, 0, 2)
  for row in rows[2:]:
    assert row["attack"] == "hybrid" and row["mse_normalized"] is not None
    assert row["mask_accuracy_by_site"]["dropout_3"] == 1
  with np.load(tmp_path / "reconstructions.npz") as file:
    assert np.isnan(file["closed_form"]).all() and np.isfinite(file["hybrid"]).all()


def test_solve_is_independent_of_the_type_of_the_gradient():
  model = make_model()
  observation, secret = observe_victims(model, 3)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), observation.params)
    chain, loss = find_chain(model.network), observation.loss
    seen = (params, observation.gradient, 3, 0.1, loss, float(jnp.finfo(jnp.float32).eps))
    batch = solve(jax.random.key(0), model, chain, *seen)
  assert len(batch.samples.label) == 3 and batch.noise < 1e-5
