"""Objects of Flower and NVFlare, made by these where they are installed."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import assert_same, flat, named, native, random_like, small

from jaxdia import updates
from jaxdia.core.errors import InputError

MODEL, PARAMS = small()
TYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture
def flwr_app():
  pytest.importorskip("flwr")
  return importlib.import_module("flwr.app")


def test_a_list_of_arrays_is_taken_by_order():
  arrays = updates.from_flower([np.asarray(leaf) for leaf in jax.tree.leaves(PARAMS)])
  assert_same(updates.fit(MODEL, arrays, by_order=True).tree, PARAMS)


@pytest.mark.parametrize("dtype", TYPES)
def test_named_arrays_of_flower(flwr_app, dtype):
  params = random_like(PARAMS, dtype=jnp.dtype(dtype))
  record = flwr_app.ArrayRecord({k: flwr_app.Array(v) for k, v in flat(params, "/").items()})
  for update in (record, flwr_app.RecordDict({"arrays": record})):
    assert_same(updates.fit(MODEL, updates.from_flower(update)).tree, params)
  message = types.SimpleNamespace(content=flwr_app.RecordDict({"arrays": record}))
  assert_same(updates.fit(MODEL, updates.from_flower(message)).tree, params)


@pytest.mark.parametrize("dtype", TYPES)
def test_arrays_of_flower_without_names(flwr_app, dtype):
  common = importlib.import_module("flwr.common")
  params = random_like(PARAMS, dtype=jnp.dtype(dtype))
  leaves = jax.tree.leaves(params)
  parameters = common.ndarrays_to_parameters(leaves)
  fit_res = common.FitRes(common.Status(common.Code.OK, ""), parameters, 4, {})
  for update in (flwr_app.ArrayRecord(leaves), parameters, fit_res):
    arrays = updates.from_flower(update)
    assert_same(updates.fit(MODEL, arrays, by_order=True).tree, params)


def test_a_state_dict_that_flower_sent(flwr_app):
  torch = pytest.importorskip("torch")
  model = named()
  tensors = {k: torch.from_numpy(v.copy()) for k, v in native(model.network, PARAMS).items()}
  record = flwr_app.ArrayRecord(tensors)
  assert_same(updates.fit(model, updates.from_flower(record)).tree, PARAMS)
  record = flwr_app.ArrayRecord([tensor.numpy() for tensor in tensors.values()])
  assert_same(updates.fit(model, updates.from_flower(record), by_order=True).tree, PARAMS)


def test_what_is_not_from_flower_or_damaged_is_refused(flwr_app):
  common = importlib.import_module("flwr.common")
  record = flwr_app.ArrayRecord([np.ones(3)])
  both = flwr_app.RecordDict({"a": record, "b": record})
  cut = common.Parameters(
    [tensor[:100] for tensor in common.ndarrays_to_parameters([np.ones(3)]).tensors],
    "numpy.ndarray",
  )
  record["0"].data = record["0"].data[:-1]
  for update, words in [
    ("weights.npz", "from_flower got str"),
    ([1.0], "from_flower got list"),
    (both, "holds 2 ArrayRecords"),
    (flwr_app.RecordDict(), "holds 0 ArrayRecords"),
    (cut, "of the Parameters cannot be read"),
    (record, "of the ArrayRecord cannot be read"),
  ]:
    with pytest.raises(InputError, match=words) as caught:
      updates.from_flower(update)
    assert "\n" not in str(caught.value)


def test_pickles_in_objects_of_flower_are_refused(flwr_app):
  import io

  common = importlib.import_module("flwr.common")
  file = io.BytesIO()
  np.save(file, np.array([object], object), allow_pickle=True)
  with pytest.raises(InputError, match="cannot be read"):
    updates.from_flower(common.Parameters([file.getvalue()], "numpy.ndarray"))


@pytest.fixture
def fl_model():
  pytest.importorskip("nvflare")
  return importlib.import_module("nvflare.app_common.abstract.fl_model").FLModel


def test_models_of_nvflare(fl_model):
  after = random_like(PARAMS, seed=1)
  difference = jax.tree.map(lambda a, b: a - b, after, PARAMS)
  arrays, kind = updates.from_nvflare(fl_model(params_type="FULL", params=flat(after)))
  assert kind == "weights"
  full = updates.from_weights(PARAMS, updates.fit(MODEL, arrays).tree, 0.1)
  arrays, kind = updates.from_nvflare(fl_model(params_type="DIFF", params=flat(difference)))
  assert kind == "difference"
  diff = updates.from_difference(PARAMS, updates.fit(MODEL, arrays, "gradient").tree, 0.1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), full[0], diff[0])
  expected = jax.tree.map(lambda a, b: (a - b) / np.float32(0.1), PARAMS, after)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), full[0], expected)


def test_models_of_nvflare_after_their_way_through_it(fl_model):
  utils = importlib.import_module("nvflare.app_common.utils.fl_model_utils").FLModelUtils
  sent = fl_model(params_type="DIFF", params=flat(PARAMS), meta={"rounds": 1})
  arrays, kind = updates.from_nvflare(utils.from_shareable(utils.to_shareable(sent)))
  assert kind == "difference"
  assert_same(updates.fit(MODEL, arrays, "gradient").tree, PARAMS)


def test_models_of_nvflare_may_hold_tensors(fl_model):
  torch = pytest.importorskip("torch")
  model = named()
  for name in ("float32", "bfloat16"):
    tensors = {
      k: torch.nn.Parameter(torch.from_numpy(v.copy()).to(getattr(torch, name)))
      for k, v in native(model.network, PARAMS).items()
    }
    arrays, _ = updates.from_nvflare(fl_model(params=tensors))
    expected = random_like(PARAMS, dtype=jnp.dtype(name))
    assert_same(updates.fit(model, arrays).tree, expected)


def test_other_models_are_refused(fl_model):
  with pytest.raises(InputError, match="from_nvflare got dict"):
    updates.from_nvflare({})
  with pytest.raises(InputError, match="metrics only"):
    updates.from_nvflare(fl_model(metrics={"loss": 1.0}))
