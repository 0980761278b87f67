"""Models of four libraries: the same suite for all, against what each library computes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import IMAGE_SHAPE, LIBRARIES, NUM_CLASSES, SIZES, make_case
from conftest import compilations

from jaxdia import attacks, models
from jaxdia.client import CROSS_ENTROPY, Observation, client_gradient
from jaxdia.closed_form import Verdict, recover, recover_labels
from jaxdia.closed_form.structure import find_chain, find_convolutions
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_path
from jaxdia.gradients.matching import compare, prepare

LABELS = np.array([0, 3, 4, 1])


def _images():
  return jnp.asarray(np.random.default_rng(0).uniform(size=(4, *IMAGE_SHAPE)), jnp.float32)


@pytest.fixture(params=LIBRARIES)
def mlp(request):
  return make_case(request.param, "mlp")


@pytest.fixture(params=LIBRARIES)
def cnn(request):
  return make_case(request.param, "cnn")


@pytest.fixture(params=[(library, kind) for library in LIBRARIES for kind in ("mlp", "cnn")])
def case(request):
  return make_case(*request.param)


def _observe(case, labels=None):
  """Returns what the server sees of a step that the library computed by itself."""
  native, rngs = case.gradient(_images(), LABELS)
  gradient = models.from_native(case.model, native, what="gradient")
  observation = Observation(case.params, gradient, labels, [0.0], [1.0], len(LABELS))
  return observation, models.read_masks(case.model, case.params, _images(), rngs)


def test_expected_masks_are_the_librarys_evaluation_mode(case):
  expected = np.asarray(case.evaluate(_images()))
  for masks in (models.expected_masks(case.model, 4), None):
    actual = case.model.apply(case.params, masks, _images())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_librarys_gradient_is_ours_under_the_masks_that_it_drew(case):
  observation, masks = _observe(case)
  assert {site: mask.shape for site, mask in masks.items()} == case.model.mask_shapes(4)
  for mask in masks.values():
    assert set(np.unique(mask)) == {0, 1}
  actual = jax.jit(client_gradient)(case.model, case.params, masks, _images(), LABELS)
  expected = leaves_by_path(observation.gradient)
  assert leaves_by_path(actual).keys() == expected.keys()
  for path, leaf in leaves_by_path(actual).items():
    np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6)


def test_sites_and_rates(case):
  rates = [site.rate for site in case.model.sites]
  assert rates == ([0.25] if len(rates) == 3 else []) + [0.5, 0.5]
  masks = list(case.model.mask_shapes(3).values())
  assert masks[-2:] == [(3, SIZES[0]), (3, SIZES[1])]


def test_dense_layers_and_the_classifier_are_found(case):
  layers = case.model.dense(4)
  inputs = (64, *SIZES)
  assert [(x.rows, x.inputs, x.outputs) for x in layers] == [
    ((4,), n, m) for n, m in zip(inputs, (*SIZES, NUM_CLASSES), strict=True)
  ]
  assert case.model.classifier == layers[-1].path


def test_factored_gradients_match_as_formed_ones(case):
  observation, masks = _observe(case)
  found = [
    compare(
      case.model,
      case.params,
      prepare(case.model, observation, method).target,
      masks,
      _images() + 0.1,
      LABELS,
      CROSS_ENTROPY,
    )
    for method in ("formed", "factored")
  ]
  np.testing.assert_allclose(*(x.inner for x in found), rtol=1e-4)
  np.testing.assert_allclose(*(x.squared_norm for x in found), rtol=1e-4)


def test_structure_behind_the_flattening_order_of_the_library(cnn):
  chain = find_chain(cnn.model.network)
  assert len(chain.layers) == 3 and chain.pixels is None
  found = find_convolutions(cnn.model.network, chain.layers[0])
  assert len(found.layers) == 1
  # The library's own order of pixels; all of them are met.
  assert sorted(found.pixels[0]) == list(range(64))
  # By itself the convolution has the gradient that it has in the network.
  (layer,) = found.layers
  rest = leaves_by_path(cnn.params)
  leaves = {path[-1]: rest[path] for path in rest if path[:-1] == layer.path}

  def loss(tap):
    taps = {layer.path: (tap,)}
    logits, inputs = cnn.model.apply_tapped(cnn.params, None, _images()[:1], taps)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[:1]).mean(), inputs

  delta, inputs = jax.grad(loss, has_aux=True)(jnp.zeros((1, layer.outputs)))
  inputs = inputs[layer.path][0].reshape(1, *layer.input_shape)
  _, pull = jax.vjp(lambda leaves: layer.apply(leaves, inputs), leaves)
  expected = client_gradient(cnn.model, cnn.params, None, _images()[:1], LABELS[:1])
  for name, leaf in pull(delta.reshape(1, *layer.output_shape))[0].items():
    np.testing.assert_allclose(leaf, leaves_by_path(expected)[*layer.path, name], 1e-4, 1e-6)


def test_labels_are_recovered(case):
  observation, _ = _observe(case)
  np.testing.assert_array_equal(recover_labels(case.model, observation), np.sort(LABELS))


def test_the_librarys_own_gradient_gives_a_batch_away(mlp):
  observation, masks = _observe(mlp)
  recovery = recover(jax.random.key(0), mlp.model, observation)
  assert (recovery.parts.verdict == Verdict.EXACT).all(), recovery.summary()
  found, truth = (np.asarray(x).reshape(4, -1) for x in (recovery.parts.images, _images()))
  distances = np.mean(np.square(found[:, None] - truth[None]), axis=-1)
  order = distances.argmin(axis=0)
  assert sorted(order) == [0, 1, 2, 3]
  assert distances.min(axis=0).max() < 1e-10
  np.testing.assert_array_equal(np.asarray(recovery.parts.labels)[order], LABELS)
  site = mlp.model.sites[0].name
  np.testing.assert_array_equal(np.asarray(recovery.parts.masks[site])[order] > 0.5, masks[site])


def test_dia_lowers_its_objective(mlp):
  observation, _ = _observe(mlp, LABELS)
  attack = attacks.dia(mlp.model, max_iterations=100)
  state, step, objectives = attack.init(jax.random.key(0), observation), jax.jit(attack.step), []
  for _ in range(60):
    state, info = step(observation, state)
    objectives.append(float(info.objective))
  assert min(objectives[-10:]) < 0.7 * objectives[0]


def test_entries_name_every_array(case):
  entries = case.model.network.entries()
  paths = [entry.path for entry in entries.values()]
  assert len(entries) == case.count and set(paths) == set(leaves_by_path(case.params))
  native = case.module if hasattr(case.model.network, "arrays") else case.params
  again = models.from_native(case.model, native)
  jax.tree.map(np.testing.assert_array_equal, again, case.params)


def test_modules_that_are_equal_share_programs(mlp):
  model = models.from_module(mlp.make(0), IMAGE_SHAPE)
  assert model == mlp.model and hash(model) == hash(mlp.model)
  gradient = jax.jit(client_gradient)
  masks = models.expected_masks(mlp.model, 4)
  gradient(mlp.model, mlp.params, masks, _images(), LABELS)
  with compilations() as compiled:
    gradient(model, mlp.params, masks, _images(), LABELS)
  assert not compiled


def test_other_weights_are_params_of_the_same_model(mlp):
  if not hasattr(mlp.model.network, "arrays"):
    pytest.skip("a module of Linen has no weights")
  module = mlp.make(1)
  params = models.from_native(mlp.model, module)
  assert models.from_module(module, IMAGE_SHAPE) != mlp.model
  expected = models.from_module(module, IMAGE_SHAPE).init(jax.random.key(5))
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_arrays_that_do_not_fit_are_named(mlp):
  native = {name: np.zeros(3) for name in mlp.model.network.entries()}
  with pytest.raises(InputError, match=r"has shape \(3,\); expected"):
    models.from_native(mlp.model, native)
  with pytest.raises(InputError, match="Unknown array of the params .*'weihgt'"):
    models.from_native(mlp.model, {"weihgt": np.zeros(3)})
  with pytest.raises(InputError, match="the params lack "):
    models.from_native(mlp.model, {})
  with pytest.raises(InputError, match="the gradient lack "):
    models.from_native(mlp.model, dict.fromkeys(native), what="gradient")
  name, entry = list(mlp.model.network.entries().items())[-1]
  shape = dict(leaves_by_path(mlp.params))[entry.path].shape
  array = np.zeros(shape if entry.axes is None else [shape[i] for i in np.argsort(entry.axes)])
  frozen = models.from_native(mlp.model, {name: array}, what="gradient")
  assert list(leaves_by_path(frozen)) == [entry.path]
