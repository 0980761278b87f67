"""Defences of an experiment: named in the config, acting on gradients, told in the results."""

import json

import jax
import numpy as np
import pytest
from experiment_cases import rows_of, silent, small

from jaxdia import experiment
from jaxdia.client import client_gradient, defences
from jaxdia.core.errors import InputError
from jaxdia.experiment import Clients
from jaxdia.experiment.config import default_config, validate
from jaxdia.report.results import read_study
from jaxdia.report.verdict import judge


def _config(**defence):
  config = small(name="ig", max_iterations=2)
  config.data.count = 1
  config.defence.update(defence)
  return config


def _noise_of(config):
  """What the server sees of the only client, less the gradient of its secret."""
  clients = Clients(validate(config).clients)
  seen, secret = clients.observations[0], clients.secrets[0]
  inputs = (clients.params, secret.masks, secret.images, secret.labels)
  true = jax.jit(client_gradient)(clients.model, *inputs)
  pairs = zip(jax.tree.leaves(seen.gradient), jax.tree.leaves(true), strict=True)
  return np.concatenate([np.ravel(a - b) for a, b in pairs])


@pytest.mark.parametrize("defence", [{}, {"name": "gaussian_noise", "std": 0.0}])
def test_no_defence_and_no_noise_leave_the_gradient_as_it_is(defence):
  assert not _noise_of(_config(**defence)).any()


def test_noise_of_the_config_is_added_to_the_gradient():
  noise = _noise_of(_config(name="gaussian_noise", std=0.03))
  assert abs(noise.std() / 0.03 - 1) < 0.05 and abs(noise.mean()) < 1e-3
  default = defences.DEFENCES["gaussian_noise"]().std
  assert abs(_noise_of(_config(name="gaussian_noise")).std() / default - 1) < 0.05


def test_results_tell_the_defence_and_another_is_another_experiment(tmp_path):
  config = _config(name="gaussian_noise", std=0.5)
  lines = []
  experiment.run(config, tmp_path, say=lines.append)
  what = "gaussian_noise(std=0.5, relative=False)"
  assert f"  defence  {what}" in lines[0].splitlines()
  assert [row["defence"] for row in rows_of(tmp_path)] == [what]
  assert json.loads((tmp_path / "summary.json").read_text())["ig"]["defence"] == what
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["defence"] == {"name": "gaussian_noise", "std": 0.5, "relative": False}
  assert any(what in caveat for caveat in judge(read_study(tmp_path)).caveats)
  experiment.run(config, tmp_path, say=silent)
  for defence, field in (({"std": 0.4}, "defence.std"), ({"name": "none", "std": None}, "defence")):
    with pytest.raises(InputError, match=rf"another experiment: its {field}[a-z.]* is"):
      experiment.run(_config(**({"name": "gaussian_noise"} | defence)), tmp_path, say=silent)


@pytest.mark.parametrize(
  "defence, message",
  [
    ({"name": "gausian_noise"}, "Unknown defence 'gausian_noise'. Did you mean 'gaussian_noise'"),
    ({"name": "gaussian_noise", "std": -1.0}, "std of the noise is -1.0; expected a finite number"),
    ({"name": "gaussian_noise", "std": float("inf")}, "std of the noise is inf"),
    ({"std": 0.1}, "std is set, but the defence none takes no settings"),
  ],
)
def test_a_defence_that_cannot_be_is_refused_before_anything_is_written(defence, message, tmp_path):
  with pytest.raises(InputError, match=message):
    experiment.run(_config(**defence), tmp_path / "run", say=silent)
  assert not (tmp_path / "run").exists()


def test_every_setting_of_every_defence_is_a_field_of_the_config():
  fields = default_config().defence
  for name in defences.DEFENCES:
    made = defences.to_json(defences.create(name))
    assert set(made) <= set(fields)
    assert defences.create(**made) == validate(_config(**made)).defence
