"""Audits of updates in files, of networks of four libraries: one command answers the question."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from adapter_cases import IMAGE_SHAPE, LIBRARIES, NUM_CLASSES, make_case
from audit_cases import RATE, SIZE, batch, config_of, nets, write
from experiment_cases import ROOT, silent

from jaxdia import audit
from jaxdia.client import Observation
from jaxdia.core.errors import InputError
from jaxdia.report import write_audit_report

__all__ = ["nets"]  # a fixture


@pytest.mark.parametrize(
  ("library", "kind"),
  [(library, kind) for library in LIBRARIES for kind in ("gradient", "after")]
  + [("linen", "difference")],
)
def test_the_update_of_each_library_is_answered(tmp_path, library, kind):
  write(tmp_path, library)
  config = config_of(tmp_path, library, kind, truth=str(tmp_path / "truth.npz"))
  (update,) = audit.run(config, tmp_path / "work", say=silent).updates
  assert [image.verdict for image in update.images] == ["certain"] * SIZE
  assert max(image.scores["mse"] for image in update.images) < 1e-10
  assert update.attempts[0].residual < 1e-4 and update.factor == pytest.approx(1, abs=1e-3)
  _, labels = batch()
  assert sorted(image.label for image in update.images) == sorted(labels.tolist())


def test_the_truth_changes_nothing_but_the_scores(tmp_path):
  write(tmp_path, "linen")
  told = audit.run(
    config_of(tmp_path, "linen", truth=str(tmp_path / "truth.npz")), tmp_path / "told", say=silent
  )
  untold = audit.run(config_of(tmp_path, "linen"), tmp_path / "untold", say=silent)
  images = [np.load(tmp_path / name / "update_000.npz")["images"] for name in ("told", "untold")]
  np.testing.assert_array_equal(*images)
  for one, other in zip(told.updates[0].images, untold.updates[0].images, strict=True):
    assert one.scores and not other.scores
    assert (one.verdict, one.residual, one.label) == (other.verdict, other.residual, other.label)


def test_what_linear_algebra_leaves_is_searched():
  """Behind a convolution, where the images of a batch cannot be told apart by linear algebra."""
  case = make_case("linen", "cnn")
  native, _ = case.gradient(*batch(2))
  observation = Observation(case.params, native, None, (0.0,), (1.0,), 2)
  outcome = audit.audit(jax.random.key(0), case.model, observation, seconds=3, say=silent)
  algebra, search = outcome.attempts
  assert algebra.name == "closed form" and search.name in ("dia", "hybrid")
  assert search.iterations > 10 and 0 < search.residual < 1
  # A search proves nothing, however well it explains the update.
  assert set(outcome.found.verdicts) <= {"likely", "partial", "none"}


def test_several_updates_are_told_apart_and_an_interrupted_audit_goes_on(tmp_path):
  write(tmp_path, "linen")
  other = {k: 2 * v for k, v in np.load(tmp_path / "gradient.npz").items()}
  np.savez(tmp_path / "other.npz", **other)
  files = f"{tmp_path / 'gradient.npz'},{tmp_path / 'other.npz'}"
  said = []

  def stop(text):
    said.append(text)
    if "update 2 of 2" in text:
      raise KeyboardInterrupt

  config = config_of(tmp_path, "linen", gradient=files)
  with pytest.raises(KeyboardInterrupt):
    audit.run(config, tmp_path / "work", say=stop)
  half = json.loads((tmp_path / "work" / "audit.json").read_text())
  assert half["pending"] == ["other.npz"] and len(half["updates"]) == 1
  assert "unfinished" in write_audit_report(tmp_path / "work").read_text()
  said.clear()
  whole = audit.run(config, tmp_path / "work", say=said.append)
  assert said[0] == "gradient.npz: audited before"
  assert [update.name for update in whole.updates] == ["gradient.npz", "other.npz"]
  assert whole.updates[0].factor == pytest.approx(1, abs=1e-3)
  assert whole.updates[1].factor == pytest.approx(2, abs=1e-3)
  page = write_audit_report(tmp_path / "work").read_text()
  assert "Yes: from these 2 updates a server can compute all of the 8 images" in page
  assert page.index("Yes: from") < page.index("What was known")
  for part in ("What was not tried", "What would make it harder", "2 times the gradient"):
    assert part in page


def test_an_update_that_is_no_gradient_is_not_attacked_and_the_page_says_why(tmp_path):
  write(tmp_path, "linen")
  signs = {k: np.sign(v) * 1e-3 for k, v in np.load(tmp_path / "gradient.npz").items()}
  np.savez(tmp_path / "gradient.npz", **signs)
  (update,) = audit.run(config_of(tmp_path, "linen"), tmp_path / "work", say=silent).updates
  assert update.attempts == [] and {image.verdict for image in update.images} == {"none"}
  page = write_audit_report(tmp_path / "work").read_text()
  assert "Not by what was tried" in page and "first step of Adam" in page


def test_images_that_are_none_are_found_again_and_not_shown(tmp_path):
  write(tmp_path, "linen")
  signs = {k: np.sign(v) * 1e-3 for k, v in np.load(tmp_path / "gradient.npz").items()}
  np.savez(tmp_path / "gradient.npz", **signs)  # which is not attacked: this is quick
  config, path = config_of(tmp_path, "linen"), tmp_path / "work" / "update_000.npz"
  audit.run(config, tmp_path / "work", say=silent)
  whole = dict(np.load(path))
  dates = whole["images"].astype("datetime64[s]")
  for change in ({"images": dates}, {"images": np.zeros(3, np.float32)}, {"truth": dates}):
    np.savez(path, **whole | change)
    with pytest.raises(InputError, match="no whole audit"):
      write_audit_report(tmp_path / "work")
  np.savez(path, **whole | {"images": dates})
  audit.run(config, tmp_path / "work", say=silent)
  assert np.load(path)["images"].dtype == np.float32
  assert write_audit_report(tmp_path / "work").exists()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"before": None}, "config.before is not set"),
    ({"gradient": None}, "config.gradient 0 are set"),
    ({"after": "after.npz"}, "2 are set; expected one of them"),
    ({"learning_rate": 0.1}, "config.learning_rate=0.1"),
    ({"batch_size": 0}, "config.batch_size is 0"),
    ({"mode": "eval"}, "Choose one of: training, evaluation"),
    ({"seconds": -1.0}, "config.seconds is -1.0"),
    ({"statistics": "minst"}, "Did you mean 'mnist'"),
    ({"labels": "1,x"}, "config.labels is '1,x'"),
    ({"labels": "1,2"}, "expected integers of shape \\(4,\\)"),
    ({"bogus": 1}, "Unknown config field 'bogus'"),
    ({"loss": {"knd": "mse"}}, "Did you mean 'kind'"),
    ({"loss": {"kind": "crossentropy"}}, "Did you mean 'cross_entropy'"),
    ({"truth": "nowhere.npz"}, "nowhere.npz"),
    ({"gradient": "nowhere.npz"}, "nowhere.npz does not exist"),
    ({"model.name": "audited_nets:linnen"}, "Did you mean 'linen'"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, fields, message):
  write(tmp_path, "linen")
  config = config_of(tmp_path, "linen")
  with config.unlocked():
    config.update_from_flattened_dict(
      {name: value for name, value in fields.items() if not isinstance(value, dict)}
    )
    config.update({name: value for name, value in fields.items() if isinstance(value, dict)})
  with pytest.raises(InputError, match=message):
    audit.run(config, tmp_path / "work", say=silent)
  assert not (tmp_path / "work").exists()


def test_the_launcher_answers_and_says_where_the_report_is(tmp_path):
  write(tmp_path, "linen")
  command = [
    *(sys.executable, ROOT / "launch" / "audit.py", "--config=configs/audit.py"),
    *("--config.model.name=audited_nets:linen", f"--config.image_shape={IMAGE_SHAPE}"),
    *(f"--config.num_classes={NUM_CLASSES}", f"--config.batch_size={SIZE}"),
    *(f"--config.before={tmp_path / 'before.npz'}", f"--config.after={tmp_path / 'after.npz'}"),
    *(f"--config.learning_rate={RATE}", f"--workdir={tmp_path / 'work'}"),
  ]
  environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}:{ROOT}"}
  done = subprocess.run(
    list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stderr
  assert "closed form: 4 exact" in done.stdout and "report.html" in done.stdout
  bad = subprocess.run(
    [*map(str, command), "--config.after=nowhere"], cwd=ROOT, capture_output=True, text=True,
    env=environment,
  )  # fmt: skip
  assert bad.returncode == 2 and bad.stderr.startswith("error: nowhere does not exist")
