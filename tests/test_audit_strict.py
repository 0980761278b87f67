"""An audit of files answers, or says in a line why not, whatever it is given."""

import importlib
import shutil

import jax
import numpy as np
import pytest
from adapter_cases import make_case
from audit_cases import SIZE, batch, config_of, nets, write
from experiment_cases import silent

from jaxdia import attacks, audit
from jaxdia.audit.attempts import _of_certain, choose_attack
from jaxdia.audit.schema import Finding
from jaxdia.client import Observation
from jaxdia.client.losses import Loss
from jaxdia.closed_form import Parts, Recovery, recover
from jaxdia.core.errors import InputError
from jaxdia.report import write_audit_report

__all__ = ["nets"]  # a fixture


def rewrite(path, change):
  np.savez(path, **{name: change(name, array) for name, array in np.load(path).items()})


def seen(kind, size=SIZE, **options):
  case = make_case("linen", kind)
  native, _ = case.gradient(*batch(size))
  return case.model, Observation(case.params, native, None, (0.0,), (1.0,), size, **options)


def test_another_order_of_the_files_does_not_meet_the_pictures_of_the_last(tmp_path, monkeypatch):
  write(tmp_path, "linen")
  shutil.copy(tmp_path / "gradient.npz", tmp_path / "first.npz")
  rewrite(tmp_path / "gradient.npz", lambda name, array: -array)
  files = [str(tmp_path / name) for name in ("first.npz", "gradient.npz")]
  audited = []

  def stub(key, model, observation, **options):
    audited.append(observation)
    return audit.AuditResult([Finding(name="stub", effect="stops", text="a stub")], [], None)

  monkeypatch.setattr(importlib.import_module("jaxdia.audit.run"), "audit", stub)
  for order, count in ((files, 2), (files, 2), (files[::-1], 4), (files[::-1], 4)):
    config = config_of(tmp_path, "linen", gradient=",".join(order))
    audit.run(config, tmp_path / "work", say=silent)
    assert len(audited) == count


def test_without_a_search_a_network_that_linear_algebra_cannot_read_has_an_answer(tmp_path):
  write(tmp_path, "linen", "cnn")
  config = config_of(tmp_path, "linen")
  config.model.name = "audited_nets:cnn"
  (tmp_path / "audited_nets.py").write_text(
    "from adapter_cases import make_case\ncnn = lambda: make_case('linen', 'cnn').module\n"
  )
  # Without the gradients of dense layers nothing tells the labels either.
  dense = [layer.path[-1] for layer in make_case("linen", "cnn").model.dense(1)]
  arrays = dict(np.load(tmp_path / "gradient.npz"))
  kept = {name: x for name, x in arrays.items() if not any(layer in name for layer in dense)}
  assert 0 < len(kept) < len(arrays)
  np.savez(tmp_path / "gradient.npz", **kept)
  (update,) = audit.run(config, tmp_path / "work", say=silent).updates
  assert {image.verdict for image in update.images} == {"none"}
  assert all(image.label is None for image in update.images)
  page = write_audit_report(tmp_path / "work").read_text()
  assert "Not by what was tried" in page and "config.seconds is 0" in page


@pytest.mark.parametrize(
  "loss", [Loss(), pytest.param(Loss("mean_squared_error"), marks=pytest.mark.slow)]
)
def test_labels_that_nothing_tells_are_searched(loss):
  model, observation = seen("cnn", 2, loss=loss)
  gradient = dict(observation.gradient)
  if loss == Loss():
    gradient |= {layer.path[0]: None for layer in model.dense(2)}
  observation = Observation(observation.params, gradient, None, (0.0,), (1.0,), 2, loss)
  recovery = recover(jax.random.key(0), model, observation)
  assert not recovery.parts.known_labels.any()
  _, attack = choose_attack(model, observation, recovery)
  assert attack.labels == "free"
  state = attacks.solve(jax.random.key(0), attack, observation, recovery=recovery, seconds=0.1)
  assert int(state.iteration) > 0


def test_two_searches_do_not_start_from_the_same_approximate_images(monkeypatch):
  """Else that they agree would tell nothing."""
  model, observation = seen("mlp", 1)
  noise = np.random.default_rng(0)
  gradient = jax.tree.map(
    lambda g: g + 0.03 * np.abs(g).max() * noise.standard_normal(g.shape), observation.gradient
  )
  noisy = Observation(observation.params, gradient, None, (0.0,), (1.0,), 1)
  told = []

  def solve(key, attack, observation, *, recovery, seconds):
    told.append(np.asarray(recovery.parts.verdict).tolist())
    return solved(key, attack, observation, recovery=recovery, seconds=seconds)

  solved = attacks.solve
  monkeypatch.setattr(attacks, "solve", solve)
  audit.audit(jax.random.key(0), model, noisy, seconds=0.1, say=silent)
  assert [1] in told and told.count([0]) >= len(told) // 2


def test_all_searches_keep_an_image_that_rounding_alone_keeps_from_being_exact():
  """Else another could be found in its place, and it twice."""
  images, verdict, labels = np.zeros((3, 2, 2, 1)), np.array([1, 1, 2], np.int32), np.arange(3)
  parts = Parts(images, verdict, {}, {}, labels, labels >= 0, {}, {})
  kept = _of_certain(Recovery(parts, np.zeros(3), "", determined=np.array([True, False, True])))
  assert kept.parts.verdict.tolist() == [1, 0, 2]


def test_hostile_names_are_text_in_the_report(tmp_path):
  write(tmp_path, "linen")
  name = "<img src=x onerror=alert(1)>.npz"
  rewrite(tmp_path / "gradient.npz", lambda _, array: np.sign(array))  # refused, so quick
  shutil.move(tmp_path / "gradient.npz", tmp_path / name)
  audit.run(
    config_of(tmp_path, "linen", gradient=str(tmp_path / name)), tmp_path / "work", say=silent
  )
  page = write_audit_report(tmp_path / "work").read_text()
  assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;.npz" in page


def test_what_cannot_be_audited_is_not_called_found_in_the_report(tmp_path):
  write(tmp_path, "linen")
  rewrite(tmp_path / "gradient.npz", lambda name, array: np.sign(array))
  audit.run(config_of(tmp_path, "linen", seconds=5.0), tmp_path / "work", say=silent)
  page = write_audit_report(tmp_path / "work").read_text()
  assert "linear algebra had found all" not in page and "cannot be audited so" in page


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"labels": "0,1,2,5"}, "config.labels contains 5; expected classes from 0 to 4"),
    ({"labels": "0,1,2,-1"}, "config.labels contains -1"),
    ({"statistics": "mnist", "mean": (0.5,)}, "statistics=mnist and config.mean=.* are both set"),
    ({"statistics": "cifar10"}, "has 3 numbers; expected 1, one for each channel"),
    ({"std": (0.0,)}, "expected values above 0"),
  ],
)
def test_what_is_said_of_the_images_must_be_possible(tmp_path, fields, message):
  write(tmp_path, "linen")
  with pytest.raises(InputError, match=message):
    audit.run(config_of(tmp_path, "linen", **fields), tmp_path / "work", say=silent)
  assert not (tmp_path / "work").exists()
