"""What an audit says of an update: of few bits, frozen layers, an unknown learning rate, once."""

import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import make_case
from audit_cases import RATE, SIZE, batch, config_of, nets, write
from experiment_cases import silent

from jaxdia import audit, models
from jaxdia.core.errors import InputError

__all__ = ["nets"]  # a fixture


def _said(update, *words):
  return [f.text for f in update.findings if any(word in f.text for word in words)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_images_of_half_precision_are_certain_up_to_an_error_that_is_said(tmp_path, dtype):
  write(tmp_path, "linen")
  path = tmp_path / "gradient.npz"
  rounded = {k: np.asarray(jnp.asarray(v, dtype), np.float32) for k, v in np.load(path).items()}
  np.savez(path, **rounded)
  config = config_of(tmp_path, "linen", truth=str(tmp_path / "truth.npz"))
  (update,) = audit.run(config, tmp_path / "work", say=silent).updates
  assert [image.verdict for image in update.images] == ["certain"] * SIZE
  assert all("its pixels known to about" in image.reason for image in update.images)
  assert 1e-12 < max(image.scores["mse"] for image in update.images) < 1e-4
  _, labels = batch()
  assert sorted(image.label for image in update.images) == sorted(labels.tolist())
  assert len(_said(update, "rounding")) == 1 and "1 " not in update.attempts[0].outcome[:2]
  assert f"{SIZE} approximate" in update.attempts[0].outcome


def test_frozen_layers_are_said_once(tmp_path):
  write(tmp_path, "linen")
  names = list(np.load(tmp_path / "before.npz"))
  for kind in ("gradient", "after"):
    arrays = dict(np.load(tmp_path / f"{kind}.npz"))
    still = np.load(tmp_path / "before.npz")[names[-1]]
    arrays[names[-1]] = np.zeros_like(still) if kind == "gradient" else still
    np.savez(tmp_path / f"{kind}.npz", **arrays)
    config = config_of(tmp_path, "linen", kind)
    (update,) = audit.run(config, tmp_path / kind, say=silent).updates
    (text,) = _said(update, "frozen", "exactly zero")
    assert names[-1].replace(".", "/") in text
  del arrays[names[-1]]
  np.savez(tmp_path / "gradient.npz", **arrays)
  (update,) = audit.run(config_of(tmp_path, "linen"), tmp_path / "lacking", say=silent).updates
  assert len(_said(update, "frozen")) == 1


def test_without_the_learning_rate_it_is_the_factor_that_is_found(tmp_path):
  write(tmp_path, "linen")
  config = config_of(tmp_path, "linen", "after", learning_rate=None)
  (update,) = audit.run(config, tmp_path / "work", say=silent).updates
  assert [image.verdict for image in update.images] == ["certain"] * SIZE
  assert update.factor == pytest.approx(RATE, rel=1e-3)
  assert len(_said(update, "learning rate is not known")) == 1
  config.weight_decay = 0.1
  with pytest.raises(InputError, match="weight_decay=0.1 is set without config.learning_rate"):
    audit.run(config, tmp_path / "other", say=silent)


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_weights_are_not_taken_for_a_gradient(library):
  case = make_case(library, "mlp")
  message = "is the module NNXNet" if library == "nnx" else "is the weights of .* themselves"
  with pytest.raises(InputError, match=message):
    models.from_native(case.model, case.module, "gradient")
  gradient, _ = case.gradient(*batch())
  found = models.from_native(case.model, gradient, "gradient")
  assert all(
    np.any(leaf) for layer in found.values() for leaf in layer.values() if leaf is not None
  )
