import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_SHAPE

from jaxdia.client import client_gradient, client_loss, defences, observe
from jaxdia.core.errors import InputError
from jaxdia.core.types import Statistics


@pytest.fixture
def batch(model):
  params = model.init(jax.random.key(0))
  images = np.random.default_rng(0).uniform(size=(2, *IMAGE_SHAPE)).astype(np.float32)
  return params, images, np.array([1, 4])


def test_the_server_sees_the_gradient_of_the_secret_and_nothing_else(model, batch):
  params, images, labels = batch
  statistics = Statistics((0.5,), (0.25,))
  observation, secret = observe(
    jax.random.key(3), model, params, images, labels, statistics=statistics
  )
  gradient = client_gradient(model, params, secret.masks, secret.images, secret.labels)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, 1e-5, 1e-8), observation.gradient, gradient
  )
  np.testing.assert_array_equal(secret.images, images)
  np.testing.assert_array_equal(observation.labels, labels)
  assert observation.batch_size == 2 and observation.mean == 0.5 and observation.std == 0.25
  fields = {"params", "gradient", "labels", "mean", "std", "averages", "batch_size", "loss"}
  assert set(vars(observation)) == fields | {"local", "defence"}
  assert observation.averages is None and observation.local is None
  assert observation.defence == defences.identity


def test_labels_are_not_seen_unless_revealed(model, batch):
  observation, _ = observe(jax.random.key(0), model, *batch, reveal_labels=False)
  assert observation.labels is None


def test_masks_depend_on_the_key(model, batch):
  masks = [observe(jax.random.key(i), model, *batch)[1].masks["dropout_0"] for i in (0, 0, 1)]
  np.testing.assert_array_equal(masks[0], masks[1])
  assert not np.array_equal(masks[0], masks[2])


def test_soft_labels_that_are_certain_are_labels(model, batch):
  params, images, labels = batch
  masks = {name: jnp.ones(shape) for name, shape in model.mask_shapes(2).items()}
  hard = client_loss(model, params, masks, images, jnp.asarray(labels))
  soft = client_loss(model, params, masks, images, jax.nn.one_hot(labels, 5))
  np.testing.assert_allclose(hard, soft, rtol=1e-6)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda x, y: (x[0], y), r"images have shape \(6, 6, 1\); expected \(B, 6, 6, 1\)"),
    (lambda x, y: (x[:, :5], y), "images have shape"),
    (lambda x, y: (x[:0], y[:0]), "B at least 1"),
    (lambda x, y: ((255 * x).astype(np.uint8), y), "images are uint8"),
    (lambda x, y: (np.where(x > 0.5, np.nan, x), y), "NaN"),
    (lambda x, y: (x, y[:1]), r"labels are int64 of shape \(1,\)"),
    (lambda x, y: (x, y.astype(float)), "labels are float64"),
    (lambda x, y: (x, y + 1), "labels contain 5; expected classes from 0 to 4"),
    (lambda x, y: (x, y - 2), "labels contain -1"),
  ],
)
def test_observe_refuses(model, batch, change, message):
  params, images, labels = batch
  with pytest.raises(InputError, match=message):
    observe(jax.random.key(0), model, params, *change(images, labels))
