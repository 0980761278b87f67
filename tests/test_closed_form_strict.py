"""Closed forms inside programs that allow no implicit promotion of types and ranks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form_cases import make_lenet, make_model, observe_victims

from jaxdia.closed_form import Verdict, recover


@contextlib.contextmanager
def _strict():
  """As a careful program sets JAX; what was traced before is not taken up again."""
  jax.clear_caches()
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    with pytest.raises((TypeError, ValueError)):  # so the modes are on
      jnp.ones(2) + jnp.ones((3, 2), jnp.int32)
    yield


@pytest.mark.parametrize(
  ("make", "size"),
  [
    pytest.param(make_model, 1, id="chain of one image"),
    pytest.param(
      lambda: make_model(hidden_sizes=(128, 96), use_bias=True), 3, id="chain of a batch"
    ),
    pytest.param(make_lenet, 1, id="convolutions", marks=pytest.mark.slow),
    pytest.param(
      lambda: make_model("vit", width=64, depth=1, num_heads=4, mlp_size=32), 1, id="patches"
    ),
  ],
)
def test_closed_forms_promote_nothing_implicitly(make, size):
  model = make()
  observation, secret = observe_victims(model, size)
  with _strict():
    recovery = recover(jax.random.key(0), model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), recovery.summary()
  for image in np.asarray(secret.images):
    assert np.abs(recovery.parts.images - image).max(axis=(1, 2, 3)).min() < 1e-3
