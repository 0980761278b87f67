"""Updates of several rounds, what their files hold besides weights, and a client's own loss."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import config_of, nets, write
from experiment_cases import silent

from jaxdia import attacks, audit, models, updates
from jaxdia.audit import attempts
from jaxdia.audit.schema import Attempt, Finding
from jaxdia.client import observe
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_name
from jaxdia.report import write_audit_report

__all__ = ["nets"]  # a fixture
SHAPE = (8, 8, 1)
OWN = """
import jax
import jax.numpy as jnp
from flax import linen as nn


class Normed(nn.Module):
  num_classes: int = 10

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(64, use_bias=False)(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.3)(nn.gelu(x), deterministic=not train)
    return nn.Dense(self.num_classes)(x)


def factory(**options):
  return Normed(**options)


def own_loss(logits, targets):
  return jnp.mean(jnp.sum(jnp.square(jax.nn.softmax(logits) - targets), axis=1))


number = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
  (tmp_path / "audited_own.py").write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)
  yield
  sys.modules.pop("audited_own", None)


def save(path, tree):
  np.savez(path, **{name: np.asarray(leaf) for name, leaf in leaves_by_name(tree).items()})


def stub(seen):
  """Returns what stands for the audit of an update, and notes what it is shown."""

  def audited(key, model, observation, **options):
    seen.append((model, observation))
    finding = Finding(name="stub", effect="stops", text="a stub")
    return audit.AuditResult([finding], [], None)

  return audited


@pytest.fixture
def seen(monkeypatch):
  """What audits are shown, of which none is made."""
  shown = []
  monkeypatch.setattr(sys.modules["jaxdia.audit.run"], "audit", stub(shown))
  return shown


def test_running_averages_of_the_file_are_those_of_the_network(tmp_path, monkeypatch):
  from audited_own import Normed  # pyright: ignore[reportMissingImports]

  rng, module = np.random.default_rng(0), Normed()
  variables = module.init(jax.random.key(0), jnp.ones((1, *SHAPE)), train=False)
  averages = jax.tree.map(
    lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32), variables["batch_stats"]
  )
  model = models.from_flax(module, SHAPE, variables={"batch_stats": averages})
  images = rng.uniform(size=(1, *SHAPE)).astype(np.float32)
  client = models.evaluation_mode(model)
  sent, _ = observe(jax.random.key(1), client, variables["params"], images, [3])
  save(tmp_path / "before.npz", {"params": variables["params"], "batch_stats": averages})
  save(tmp_path / "gradient.npz", sent.gradient)
  np.savez(tmp_path / "truth.npz", images=images, labels=np.array([3]))
  config = config_of(tmp_path, "linen", mode="evaluation", truth=str(tmp_path / "truth.npz"))
  config.model.name, config.image_shape, config.num_classes = "audited_own:Normed", SHAPE, 10
  config.batch_size = 1
  (update,) = audit.run(config, tmp_path / "work", say=silent).updates
  assert [image.verdict for image in update.images] == ["certain"]
  assert update.images[0].scores["mse"] < 1e-9
  monkeypatch.setattr(sys.modules["jaxdia.audit.run"], "audit", stub([]))
  save(tmp_path / "before.npz", variables["params"])
  (update,) = audit.run(config, tmp_path / "without", say=silent).updates
  assert any("holds no running averages" in finding.text for finding in update.findings)


def test_averages_of_another_module_or_shape_are_not_taken():
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(64, 32, rngs=rngs)
      self.norm = nnx.BatchNorm(32, rngs=rngs)
      self.drop = nnx.Dropout(0.5, rngs=rngs)
      self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
      x = self.norm(self.first(x.reshape(len(x), -1)))
      return self.last(self.drop(nnx.relu(x)))

  module = Net(nnx.Rngs(0))
  model = models.from_nnx(module, SHAPE)
  averages = {"norm.mean": np.full(32, 0.5, np.float32), "norm.var": np.full(32, 2.0, np.float32)}
  other = updates.use_averages(model, averages | {"step": np.zeros(3)})
  assert other != model and hash(other) != hash(model)
  assert updates.use_averages(model, {"step": np.zeros(3)}) is model
  module.norm.mean[...], module.norm.var[...] = 0.5, 2.0
  images = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
  params = model.init(jax.random.key(0))
  logits = [
    models.evaluation_mode(each).apply(params, None, images)
    for each in (other, models.from_nnx(module, SHAPE), model)
  ]
  np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5)
  assert np.abs(logits[0] - logits[2]).max() > 1e-2
  with pytest.raises(InputError, match=r"'norm.mean' has shape \(3,\); expected \(32,\)"):
    updates.use_averages(model, {"norm.mean": np.zeros(3, np.float32)})
  with pytest.raises(InputError, match="norm.mean of the weights before have NaN"):
    updates.use_averages(model, {"norm.mean": np.full(32, np.nan, np.float32)})


def test_each_round_has_its_own_weights_and_labels(tmp_path, seen):
  write(tmp_path, "linen")
  for number in (1, 2):
    weights = {name: number * x for name, x in np.load(tmp_path / "before.npz").items()}
    np.savez(tmp_path / f"before_{number}.npz", **weights)
  files = {
    "before": ",".join(str(tmp_path / f"before_{number}.npz") for number in (1, 2)),
    "gradient": ",".join([str(tmp_path / "gradient.npz")] * 2),
  }
  audit.run(config_of(tmp_path, "linen", labels="0,1,2,3; 3,2,1,0", **files), tmp_path / "work")
  first, second = (observation for _, observation in seen)
  for one, other in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True):
    np.testing.assert_array_equal(2 * one, other)
  assert first.labels.tolist() == [0, 1, 2, 3] and second.labels.tolist() == [3, 2, 1, 0]
  files["before"] = str(tmp_path / "before.npz")  # of all updates
  audit.run(config_of(tmp_path, "linen", labels="0,1,2,3", **files), tmp_path / "one")
  assert [observation.labels.tolist() for _, observation in seen[2:]] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"before": "a.npz,b.npz"}, "config.before holds 2 for 1 updates; expected one for all"),
    ({"labels": "0,1,2,3;0,1,2,3"}, "config.labels holds 2 for 1 updates; .* semicolons between"),
    ({"labels": "0,1,2,3;"}, "config.labels is ''; expected classes separated by commas"),
    ({"loss": {"kind": "audited_own:los"}}, "attribute of config.loss.kind=audited_own:los:"),
    ({"loss": {"kind": "audited_own:number"}}, "config.loss.kind=audited_own:number gives a int"),
    (
      {"loss": {"kind": "nowhere:loss"}},
      "cannot import config.loss.kind=nowhere:loss: there is no",
    ),
    ({"loss": {"kind": "audited_own:"}}, "config.loss.kind is 'audited_own:'; expected a module"),
  ],
)
def test_what_does_not_fit_the_updates_is_refused(tmp_path, fields, message):
  write(tmp_path, "linen")
  with pytest.raises(InputError, match=message):
    audit.run(config_of(tmp_path, "linen", **fields), tmp_path / "work", say=silent)
  assert not (tmp_path / "work").exists()


def test_a_loss_is_named_by_its_import_path(tmp_path, seen):
  write(tmp_path, "linen")
  config = config_of(tmp_path, "linen", loss={"kind": "audited_own:own_loss"})
  result = audit.run(config, tmp_path / "work", say=silent)
  from audited_own import own_loss  # pyright: ignore[reportMissingImports]

  assert seen[0][1].loss.kind is own_loss
  assert result.settings["loss"]["kind"] == "audited_own:own_loss"
  assert "audited_own:own_loss" in write_audit_report(tmp_path / "work").read_text()


def test_a_network_of_another_number_of_logits_is_refused(tmp_path, seen):
  """As of a factory that takes **kwargs, which is not told how many there are."""
  write(tmp_path, "linen")
  config = config_of(tmp_path, "linen")
  config.model.name = "audited_own:factory"
  with pytest.raises(InputError, match="gives 10 logits; expected 5.*config.model.num_classes=5"):
    audit.run(config, tmp_path / "work", say=silent)
  with config.unlocked():
    config.model.num_classes = 5
  with pytest.raises(InputError) as error:  # of the weights, which are another network's
    audit.run(config, tmp_path / "work", say=silent)
  assert "logits" not in str(error.value)


@pytest.mark.parametrize("name, fields, is_said", [
  ("several steps", {}, True),
  ("several steps", {"local_epochs": 2}, False),
  ("factor", {}, False),
])  # fmt: skip
def test_steps_that_were_simulated_are_not_called_untried(
  tmp_path, monkeypatch, name, fields, is_said
):
  write(tmp_path, "linen")
  outcome = audit.AuditResult([Finding(name=name, effect="noted", text="a stub")], [], None)
  monkeypatch.setattr(sys.modules["jaxdia.audit.run"], "audit", lambda *_, **__: outcome)
  audit.run(config_of(tmp_path, "linen", "after", **fields), tmp_path / "work", say=silent)
  page = write_audit_report(tmp_path / "work").read_text()
  assert ("simulation of several local steps" in page) == is_said


def test_the_time_of_a_search_begins_after_compiling(monkeypatch):
  model = models.create("mlp", SHAPE, 10, 0.5, hidden_sizes=(16,))
  params, images = model.init(jax.random.key(0)), np.full((1, *SHAPE), 0.5, np.float32)
  update, _ = observe(jax.random.key(1), model, params, images, [3])
  now, given, compiled = [0.0], [], []
  solved = attacks.solve

  def solve(*args, seconds, **options):
    if not compiled:
      compiled.append(True)
      now[0] += 1000.0
    given.append(seconds)
    now[0] += seconds
    return solved(*args, seconds=0, **options)

  class Clock:
    monotonic = staticmethod(lambda: now[0])

  monkeypatch.setattr(attempts, "time", Clock)
  monkeypatch.setattr(attacks, "solve", solve)
  attempt, _ = attempts.by_search(jax.random.key(0), model, update, None, 40.0, silent)
  assert isinstance(attempt, Attempt) and given == [0, 20.0, 20.0]
