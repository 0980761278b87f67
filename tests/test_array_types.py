"""What is annotated as an array is checked against it while the tests run."""

import inspect

import jax
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxdia import attacks, client, data
from jaxdia.client import tokens, training
from jaxdia.updates import names, problems


@pytest.fixture(scope="module")
def params(model):
  return model.init(jax.random.key(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_images_of_either_library_and_of_a_trace_are_taken(model, params, dtype):
  images = np.zeros((2, *model.image_shape), dtype)
  for apply in (model.apply, jax.jit(model.apply)):
    assert apply(params, None, images).shape == (2, 5)
  assert jax.vmap(model.apply, (None, None, 0))(params, None, images[:, None]).shape == (2, 1, 5)


def test_a_wrong_rank_is_caught(model, params):
  with pytest.raises(TypeCheckError, match="'images'"):
    model.apply(params, None, np.zeros(model.image_shape, np.float32))
  with pytest.raises(TypeCheckError, match="'images'"):
    attacks.total_variation(np.zeros((6, 6), np.float32))


def test_labels_of_another_batch_are_caught():
  with pytest.raises(TypeCheckError, match="'labels'"):
    client.CROSS_ENTROPY(np.zeros((2, 5), np.float32), np.zeros(3, np.int32))


def test_what_is_no_array_is_caught_among_arrays_by_name():
  with pytest.raises(TypeCheckError, match="'array'"):
    names.with_known_type([1.0])
  with pytest.raises(TypeCheckError, match="'arrays'"):
    problems.nearest(("kernel",), (2, 3), {"kernel": [1.0]})


@pytest.mark.parametrize(
  "function, names",
  [
    (client.observe, ("images", "labels")),
    (training.train, ("images", "labels")),
    (training.accuracy, ("images", "labels", "return")),
    (tokens.observe_tokens, ("tokens", "labels")),
    (data.normalize_features, ("values", "return")),
    (data.denormalize_features, ("images", "values", "return")),
  ],
)
def test_the_public_arrays_of_clients_and_data_say_what_they_are(function, names):
  written = inspect.unwrap(function).__annotations__  # those of arrays, if the hook was there
  source = inspect.getsource(inspect.unwrap(function))
  for name in names:
    assert "Any" not in str(written.get(name, "Any")).replace("Sequence[typing.Any]", ""), name
  assert ": Any" not in source.split('"""')[0]


def test_a_batch_may_be_lists(model, params):
  images, labels = np.zeros((2, *model.image_shape), np.float32), np.array([0, 1])
  seen = [
    client.observe(jax.random.key(0), model, params, *batch)[0].gradient
    for batch in ((images, labels), (images.tolist(), labels.tolist()))
  ]
  jax.tree.map(np.testing.assert_array_equal, *seen)
