"""Arrays by name or by order, as params or a gradient of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import assert_same, flat, named, native, random_like, small

from jaxdia import models, updates
from jaxdia.core.errors import InputError

MODEL, PARAMS = small()


def refusal(*arguments, **options):
  """Returns the message of a refusal, which is one line."""
  with pytest.raises(InputError) as caught:
    updates.fit(*arguments, **options)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  "rename",
  [
    lambda name: name,
    lambda name: name.replace(".", "/"),
    lambda name: "".join(f"['{part}']" for part in name.split(".")),
    lambda name: f"{name}.value",
    lambda name: f"{name}:0".replace(".", "/"),
    lambda name: f"params/{name}",
    lambda name: f"module.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: f"anything.at.all.{name}",
    lambda name: name.replace("norm.scale", "norm.gamma").replace("norm.bias", "norm.beta"),
    lambda name: name.replace("kernel", "w").replace("square.bias", "square.b"),
  ],
)
@pytest.mark.parametrize("what", ["params", "gradient"])
def test_arrays_are_found_by_their_names(rename, what):
  arrays = {rename(name): array for name, array in flat(PARAMS).items()}
  fitted = updates.fit(MODEL, arrays, what)
  assert_same(fitted.tree, PARAMS)
  assert not fitted.frozen and not fitted.extra


def test_nested_trees_and_their_order_make_no_difference():
  arrays = dict(reversed(flat(PARAMS).items()))
  assert_same(updates.fit(MODEL, arrays).tree, PARAMS)
  assert_same(updates.fit(MODEL, {"params": PARAMS}).tree, PARAMS)
  assert not updates.fit(MODEL, PARAMS).notes


def test_names_of_the_own_library_turn_its_layouts_square_kernels_too():
  model = named()
  arrays = native(model.network, PARAMS)
  assert arrays["net.square.weight"].shape == (24, 24)
  fitted = updates.fit(model, arrays)
  assert_same(fitted.tree, PARAMS)
  assert not fitted.notes
  # Paths of the params have the layout of the params.
  assert_same(updates.fit(model, flat(PARAMS)).tree, PARAMS)
  # Names may lack what all of them begin with, and have what a wrapper puts before.
  without = {name.removeprefix("net."): array for name, array in arrays.items()}
  fitted = updates.fit(model, without)
  assert_same(fitted.tree, PARAMS)
  assert "lack the prefix 'net'" in fitted.notes[0]
  fitted = updates.fit(model, {f"module.{name}": array for name, array in without.items()})
  assert_same(fitted.tree, PARAMS)
  assert "'module'" in fitted.notes[0]


def as_pytorch_would(params):
  """The arrays of the same network in PyTorch, written down by hand."""
  rows = params["square"]["kernel"].reshape(2, 2, 6, 24)  # height, width, channels
  return {
    "conv.weight": np.einsum("hwio->oihw", params["conv"]["kernel"]),
    "conv.bias": params["conv"]["bias"],
    "square.weight": np.einsum("hwco->ochw", rows).reshape(24, 24),
    "square.bias": params["square"]["bias"],
    "norm.weight": params["norm"]["scale"],
    "norm.bias": params["norm"]["bias"],
    "classifier.weight": params["classifier"]["kernel"].T,
    "classifier.bias": params["classifier"]["bias"],
  }


def test_weights_of_pytorch_are_turned_for_a_model_of_flax():
  fitted = updates.fit(MODEL, as_pytorch_would(PARAMS))
  assert_same(fitted.tree, PARAMS)
  assert any("PyTorch's layout" in note for note in fitted.notes)
  assert any("(2, 2, 6)" in note for note in fitted.notes)  # how it flattens features


def test_rows_of_pixels_are_put_with_the_channels_last():
  model = models.create("mlp", (4, 4, 3), 5, 0.5, hidden_sizes=(7,))
  params = random_like(model.init(jax.random.key(0)))
  state = {f"layers.{i}.linear.weight": None for i in range(2)}
  first = params["hidden_0"]["kernel"].reshape(4, 4, 3, 7)
  state["layers.0.linear.weight"] = np.einsum("hwco->ochw", first).reshape(7, 48)
  state["layers.1.linear.weight"] = params["classifier"]["kernel"].T
  assert_same(models.params_of_reference(state, (4, 4, 3)), params)  # the layout that is meant
  renamed = dict(zip(("hidden_0.weight", "classifier.weight"), state.values(), strict=True))
  assert_same(updates.fit(model, renamed).tree, params)


def test_kernels_called_weight_in_the_layout_of_flax_are_left_so():
  arrays = {name.replace("kernel", "weight"): array for name, array in flat(PARAMS).items()}
  fitted = updates.fit(MODEL, arrays)
  assert_same(fitted.tree, PARAMS)
  assert "inputs x outputs" in fitted.notes[0]


def test_order_is_used_only_if_asked_for():
  leaves = jax.tree.leaves(PARAMS)
  fitted = updates.fit(MODEL, leaves, by_order=True)
  assert_same(fitted.tree, PARAMS)
  assert "order" in fitted.notes[0]
  message = refusal(MODEL, leaves)
  assert "by_order=True" in message and "without names" in message
  # By number, not by text: "10" comes after "9".
  model = models.create("mlp", (4, 4, 1), 16, 0.5, hidden_sizes=(16,) * 11)
  params = random_like(model.init(jax.random.key(0)))
  arrays = {f"arr_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))}
  shuffled = dict(sorted(arrays.items()))
  assert list(shuffled) != list(arrays)
  assert_same(updates.fit(model, shuffled, by_order=True).tree, params)


def test_the_order_of_the_own_library_has_its_layouts():
  model = named()
  arrays = list(native(model.network, PARAMS).values())
  fitted = updates.fit(model, arrays, by_order=True)
  assert_same(fitted.tree, PARAMS)
  fitted = updates.fit(model, jax.tree.leaves(PARAMS), by_order=True)
  assert_same(fitted.tree, PARAMS)
  assert "JAX's trees" in fitted.notes[0]


def test_an_order_that_does_not_fit_is_refused_with_the_first_array_that_is_wrong():
  leaves = jax.tree.leaves(PARAMS)
  assert "7 arrays; expected 8" in refusal(MODEL, leaves[1:], by_order=True)
  message = refusal(MODEL, [leaves[1], leaves[0], *leaves[2:]], by_order=True)
  assert "array 0" in message and "(24, 5)" in message and "'classifier/bias'" in message


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_types_are_kept(dtype):
  params = random_like(PARAMS, dtype=dtype)
  assert_same(updates.fit(MODEL, flat(params)).tree, params)


def test_values_that_are_not_finite_are_kept():
  arrays = flat(PARAMS)
  arrays["conv.bias"] = np.full(6, np.nan, np.float32)
  assert np.isnan(updates.fit(MODEL, arrays).tree["conv"]["bias"]).all()


def test_what_is_no_param_is_returned_apart():
  arrays = flat(PARAMS) | {
    "norm.running_mean": np.ones(24),
    "norm.num_batches_tracked": np.array(3),
  }
  for what in ("params", "gradient"):
    fitted = updates.fit(MODEL, arrays, what)
    assert_same(fitted.tree, PARAMS)
    assert set(fitted.extra) == {"norm.running_mean", "norm.num_batches_tracked"}
    assert "'norm.running_mean'" in fitted.notes[-1]


def test_states_of_an_optimizer_are_not_taken_for_the_params():
  momentum = jax.tree.map(np.zeros_like, PARAMS)
  checkpoint = {"opt_state": {"0": {"mu": momentum}}, "params": PARAMS, "step": 3}
  fitted = updates.fit(MODEL, checkpoint)
  assert_same(fitted.tree, PARAMS)
  assert len(fitted.extra) == 8
  checkpoint = {"params": PARAMS, "grads": momentum}
  assert_same(updates.fit(MODEL, checkpoint, "gradient").tree, momentum)
  assert_same(updates.fit(MODEL, checkpoint).tree, PARAMS)


def test_the_same_tree_twice_is_refused():
  message = refusal(MODEL, {"before": PARAMS, "after": PARAMS})
  assert "'before'" in message and "'after'" in message


def test_missing_leaves_of_a_gradient_are_frozen_and_of_params_refused():
  arrays = flat(PARAMS)
  del arrays["conv.kernel"], arrays["conv.bias"]
  fitted = updates.fit(MODEL, arrays, "gradient")
  assert fitted.tree["conv"] == {"kernel": None, "bias": None}
  assert set(fitted.frozen) == {"conv/kernel", "conv/bias"}
  said = (*fitted.notes, *updates.from_gradient(PARAMS, fitted.tree).notes)
  assert sum("frozen" in note for note in said) == 1
  assert_same(fitted.tree["square"], PARAMS["square"])
  # As PyTorch has it: the gradient of a frozen parameter is None.
  assert updates.fit(MODEL, arrays | {"conv.bias": None}, "gradient").tree["conv"]["bias"] is None
  message = refusal(MODEL, arrays)
  assert "'conv/bias'" in message and "(6,)" in message
  # Running averages of the shape of a frozen leaf do not make it a leaf of another name.
  arrays["conv.running_mean"] = np.ones(6)
  assert "conv/bias" in updates.fit(MODEL, arrays, "gradient").frozen


@pytest.mark.parametrize("what", ["params", "gradient"])
def test_a_wrong_name_is_met_with_the_nearest(what):
  arrays = flat(PARAMS)
  arrays["fc1.kernel"] = arrays.pop("square.kernel")
  message = refusal(MODEL, arrays, what)
  assert "'square/kernel'" in message and "(24, 24)" in message and "'fc1.kernel'" in message
  assert f"the {what} lack" in message


def test_a_wrong_shape_is_met_with_what_was_expected():
  arrays = flat(PARAMS)
  turned = arrays | {"classifier.kernel": arrays["classifier.kernel"].T}
  message = refusal(MODEL, turned)
  assert "(5, 24)" in message and "(24, 5)" in message and "transposed" in message
  assert "'classifier/kernel'" in message
  other = arrays | {"classifier.kernel": np.ones((24, 10), np.float32), "head": np.ones((24, 5))}
  assert "'head' (24, 5)" in refusal(MODEL, other)
  other = arrays | {"classifier.kernel": np.ones((24, 10), np.float32)}
  assert "another network" in refusal(MODEL, other)


def test_arrays_of_another_network_are_refused():
  message = refusal(MODEL, {"encoder.layers": np.ones((7, 7, 7))}, "gradient")
  assert "another network" in message and "'encoder.layers'" in message
  assert "no arrays at all" in refusal(MODEL, {})
  assert "no arrays at all" in refusal(MODEL, {"step": 3, "name": "x", "none": None})


def test_integers_are_refused():
  arrays = flat(PARAMS)
  arrays["conv.kernel"] = arrays["conv.kernel"].astype(np.int8)
  message = refusal(MODEL, arrays)
  assert "int8" in message and "'conv/kernel'" in message
  assert "expected 'params' or 'gradient'" in refusal(MODEL, arrays, "weights")


def test_arrays_that_are_no_params_are_left_out_of_an_order():
  leaves = jax.tree.leaves(PARAMS)
  # Only one way to take them: the rate of dropout, as Equinox serialises it, is no param.
  fitted = updates.fit(MODEL, [leaves[0], np.array(0.5), *leaves[1:]], by_order=True)
  assert_same(fitted.tree, PARAMS)
  assert list(fitted.extra) == ["1"]
  # Two ways, and nothing that tells which is meant.
  assert "9 arrays; expected 8" in refusal(MODEL, [leaves[0], *leaves], by_order=True)
