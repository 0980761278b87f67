"""The layer that gives the logits is found in plain functions too, and tells the labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import attacks, models
from jaxdia.client import observe
from jaxdia.closed_form import recover, recover_labels
from jaxdia.closed_form.last_layer import LastLayer, find_last_layer
from jaxdia.core.errors import InputError

SHAPE, CLASSES = (6, 6, 1), 5


def _functions(kind):
  def init(key):
    keys = jax.random.split(key)
    out = jax.random.normal(keys[1], (24, CLASSES)) / 5
    params = {
      "linear": {"w": jax.random.normal(keys[0], (36, 24)) / 6, "b": jnp.zeros(24)},
      "out": {"w": out.T if kind == "turned" else out, "b": jnp.zeros(CLASSES)},
      "other": {"s": jnp.ones(CLASSES)},
    }
    if kind in ("no_bias", "tied"):
      del params["out"]["b"]
    return params

  def apply(params, drop, images):
    x = images.astype(jnp.float32).reshape(len(images), -1)
    x = x @ params["linear"]["w"] + params["linear"]["b"]
    w = params["out"]["w"].T if kind == "turned" else params["out"]["w"]
    x = drop("hidden", jax.nn.sigmoid(x))
    logits = jnp.einsum("bi,ij->bj", x, w)
    if "b" in params["out"]:
      logits += params["out"]["b"]
    if kind == "tied":
      logits += jnp.sum(w**2)
    if kind == "scaled":
      logits *= params["other"]["s"]
    return jnp.tanh(logits) if kind == "bent" else logits

  return models.from_functions(init, apply, SHAPE, {"hidden": 0.25})


def _observe(model, labels):
  images = np.random.default_rng(1).uniform(size=(len(labels), *SHAPE)).astype(np.float32)
  params = model.init(jax.random.key(0))
  return observe(jax.random.key(2), model, params, images, labels, reveal_labels=False)[0]


@pytest.mark.parametrize("kind", ["plain", "turned", "no_bias"])
def test_labels_of_plain_functions_are_recovered(kind):
  model = _functions(kind)
  bias = None if kind == "no_bias" else ("out", "b")
  # Found while something is traced, as in the lanes of an engine, too.
  for labels in ([3], [0, 3], [2, 2, 4]):
    seen = _observe(model, labels)
    np.testing.assert_array_equal(jax.jit(recover_labels)(model, seen), labels)
    np.testing.assert_array_equal(recover_labels(model, seen), labels)
  assert find_last_layer(model.network) == LastLayer(("out", "w"), bias, kind == "turned")
  state = attacks.solve(
    jax.random.key(0), attacks.dia(model, labels="recovered", max_iterations=1), seen
  )
  np.testing.assert_array_equal(state.known.labels, labels)


def test_sign_and_factor_are_told_by_it():
  model = _functions("turned")
  seen = _observe(model, [3])

  def scaled(factor):
    return dataclasses.replace(seen, gradient=jax.tree.map(lambda x: factor * x, seen.gradient))

  found = recover(jax.random.key(0), model, scaled(4.0))
  assert found.scale == pytest.approx(4, rel=1e-4) and list(found.parts.labels) == [3]
  with pytest.raises(InputError, match="gradient by the bias of out is negative for more than 1"):
    recover(jax.random.key(0), model, scaled(-1.0))


@pytest.mark.parametrize("kind", ["bent", "tied", "scaled"])
def test_what_does_not_give_the_logits_is_no_last_layer(kind):
  model = _functions(kind)
  assert find_last_layer(model.network) is None
  with pytest.raises(InputError, match="a dense layer that gives the logits; this model has none"):
    recover_labels(model, _observe(model, [3]))
