"""Audits of updates over several local steps, whose number and rate are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import config_of, nets, write

from jaxdia import audit, data, models
from jaxdia.audit.proof import prove
from jaxdia.client import LocalUpdate, client_gradient, observe
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_name
from jaxdia.models import sample_masks
from jaxdia.report import write_audit_report

__all__ = ["nets"]  # a fixture
EPOCHS, RATE = 3, 0.02


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"local_steps": 3}, "4 images cannot be shared out evenly among clients=1 with steps=3"),
    ({"local_epochs": 0}, "epochs of a local update is 0"),
    ({"optimizer": "adam", "momentum": 0.9}, "with optimizer=adam, which has its own"),
    ({"local_epochs": 2, "learning_rate": None}, "2 local steps of sgd are set without config"),
  ],
)
def test_local_steps_that_cannot_be_are_refused_before_anything_is_written(
  fields, message, tmp_path
):
  write(tmp_path, "linen")
  with pytest.raises(InputError, match=message):
    audit.run(config_of(tmp_path, "linen", "after", **fields), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_gradient_has_no_local_steps(tmp_path):
  write(tmp_path, "linen")
  with pytest.raises(InputError, match="are of weights that came back"):
    audit.run(config_of(tmp_path, "linen", local_epochs=2), tmp_path / "run")


def test_what_was_found_is_held_against_all_steps():
  model = models.create("mlp", (6, 6, 1), 4, 0.5, hidden_sizes=(24,))
  params = model.init(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (4, 6, 6, 1))
  labels = jnp.arange(4, dtype=jnp.int32)
  local = LocalUpdate(epochs=2, steps=2, learning_rate=0.5, momentum=0.9)
  seen, secret = observe(jax.random.key(2), model, params, images, labels, local=local)
  true = prove(model, seen, secret.masks, images, labels)
  assert true.residual < 1e-5 and abs(true.factor - 1) < 1e-5
  swapped = prove(model, seen, secret.masks, images[::-1], labels[::-1])
  assert swapped.residual > 0.1


@pytest.mark.parametrize(
  "fields, said",
  [
    ({"learning_rate": None}, "weights before and after 1 step at an unknown learning rate"),
    ({}, "weights before and after 1 step at learning rate 0.1"),
    ({"local_epochs": 2}, "weights before and after the update of a client (2 x 1 steps of sgd at"),
  ],
)
def test_the_report_says_what_came_between_the_weights(fields, said, tmp_path):
  write(tmp_path, "linen")
  audit.run(config_of(tmp_path, "linen", "after", **fields), tmp_path / "run")
  assert said in write_audit_report(tmp_path / "run").read_text()


@pytest.mark.slow
def test_an_update_over_several_steps_is_seen_through_by_one_command(tmp_path):
  digits = data.load("samples:mnist", 2)
  images = jnp.asarray(data.normalize(digits.images, digits.statistics))
  labels = jnp.asarray(digits.labels, jnp.int32)
  model = models.create("mlp", (28, 28, 1), 10, 0.5, hidden_sizes=(128, 128))
  before = after = model.init(jax.random.key(0))
  for epoch in range(EPOCHS):
    masks = sample_masks(jax.random.key(epoch), model, 2)
    gradient = jax.jit(client_gradient)(model, after, masks, images, labels)
    after = jax.tree.map(lambda w, g: w - RATE * g, after, gradient)
  for name, tree in (("before", before), ("after", after)):
    arrays = {key: np.asarray(leaf) for key, leaf in leaves_by_name(tree).items()}
    np.savez(tmp_path / f"{name}.npz", **arrays)
  np.savez(tmp_path / "truth.npz", images=digits.images, labels=digits.labels)
  config = audit.default_config()
  config.model.update({"name": "mlp", "dropout_rate": 0.5, "hidden_sizes": (128, 128)})
  config.update({"batch_size": 2, "learning_rate": RATE, "statistics": "mnist", "seconds": 40.0})
  for name in ("before", "after", "truth"):
    config[name] = str(tmp_path / f"{name}.npz")

  def ssim(**fields):
    config.update(fields)
    (update,) = audit.run(config, tmp_path / f"run_{len(fields)}").updates
    return update, min(image.scores.get("ssim") or 0 for image in update.images)

  update, known = ssim(local_epochs=EPOCHS)
  assert known > 0.9
  assert {image.verdict for image in update.images} == {"likely"}
  config.local_epochs = 1
  update, unknown = ssim()
  assert unknown < known and "likely" not in {image.verdict for image in update.images}
  assert "several steps" in {finding.name for finding in update.findings}
