"""Follows the authors' code in float64, number by number (tests/parity/)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import attacks, models
from jaxdia.client import Observation, client_gradient, client_loss

PARITY = pathlib.Path(__file__).parent / "parity"


class Case:
  """One parity file, with its arrays in this package's layout."""

  def __init__(self, name):
    with np.load(PARITY / f"{name}.npz") as file:
      self.arrays = dict(file)
    if name == "mlp":
      self.model = models.create("mlp", (12, 12, 1), 10, 0.25, hidden_sizes=(24, 24, 24))
      mean, std = [0.13066373765468597], [0.30810782313346863]
    else:
      self.model = models.create(
        "vit", (8, 8, 3), 10, 0.25, patch_size=4, width=16, depth=2, num_heads=4, mlp_size=24
      )
      mean = [0.4914672374725342, 0.4822617471218109, 0.4467701315879822]
      std = [0.24703224003314972, 0.24348513782024384, 0.26158785820007324]
    params, gradient = (
      models.params_of_reference(
        {k.removeprefix(kind): v for k, v in self.arrays.items() if k.startswith(kind)},
        self.model.image_shape,
      )
      for kind in ("param/", "grad/")
    )
    self.labels = jnp.asarray(self.arrays["labels"])
    self.observation = Observation(
      params, gradient, self.labels, jnp.asarray(mean), jnp.asarray(std), batch_size=2
    )

  def images(self, key):
    return jnp.moveaxis(jnp.asarray(self.arrays[key]), 1, -1)

  def masks(self, prefix):
    return {
      site.name: jnp.asarray(self.arrays[f"{prefix}/{i}"])
      for i, site in enumerate(self.model.sites)
    }

  @property
  def attack(self):
    steps = len(self.arrays["losses"])
    return attacks.dia(self.model, plateau_patience=2, max_iterations=steps)

  @property
  def start(self):
    candidate = attacks.Candidate(self.images("init_images"), self.masks("init_mask"), None)
    return candidate, attacks.Known(None, self.labels)


@pytest.fixture(params=["mlp", "vit"])
def case(request):
  with jax.enable_x64(True):
    yield Case(request.param)


def _assert_trees_close(actual, expected, **tolerance):
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


def test_client(case):
  params, masks = case.observation.params, case.masks("client_mask")
  images = case.images("images")
  logits = case.model.apply(params, masks, images)
  np.testing.assert_allclose(logits, case.arrays["logits"], rtol=1e-10, atol=1e-12)
  loss = client_loss(case.model, params, masks, images, case.labels)
  np.testing.assert_allclose(loss, case.arrays["loss"], rtol=1e-12)
  gradient = client_gradient(case.model, params, masks, images, case.labels)
  _assert_trees_close(gradient, case.observation.gradient, rtol=1e-8, atol=1e-12)


def test_objective_and_its_derivatives_at_the_start(case):
  candidate, known = case.start

  def measure(candidate):
    settings = case.attack.settings
    return attacks.objective(case.model, settings, case.observation, candidate, known)

  (value, terms), grad = jax.value_and_grad(measure, has_aux=True)(candidate)
  expected = {name: case.arrays[f"start/{name}"] for name in ("objective", "cosine_distance")}
  np.testing.assert_allclose(value, expected["objective"], rtol=1e-10)
  np.testing.assert_allclose(terms.distance, expected["cosine_distance"], rtol=1e-10)
  for name in ("total_variation", "mask_prior"):
    np.testing.assert_allclose(getattr(terms, name), case.arrays[f"start/{name}"], rtol=1e-10)
  np.testing.assert_allclose(grad.images, case.images("start/d_images"), rtol=1e-7, atol=1e-11)
  _assert_trees_close(grad.masks, case.masks("start/d_mask"), rtol=1e-7, atol=1e-11)


def test_whole_run(case):
  step = jax.jit(case.attack.step)
  state = jax.jit(case.attack.start)(*case.start)
  steps = len(case.arrays["losses"])
  losses, learning_rates = [], []
  for iteration in range(1, steps + 1):
    state, info = step(case.observation, state)
    losses.append(info.objective)
    learning_rates.append(info.learning_rate)
    if iteration in (1, 10, steps):
      images, masks = case.images(f"step_{iteration}/images"), case.masks(f"step_{iteration}/mask")
      np.testing.assert_allclose(state.candidate.images, images, rtol=1e-6, atol=1e-6)
      _assert_trees_close(state.candidate.masks, masks, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(losses, case.arrays["losses"], rtol=1e-7)
  np.testing.assert_allclose(learning_rates, case.arrays["learning_rates"], rtol=1e-7)
  best = int(np.argmin(losses))
  assert int(state.best.iteration) == best
  assert float(state.best.objective) == losses[best]
