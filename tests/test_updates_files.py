"""Files, each written by the library that owns the format."""

import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from update_cases import assert_same, flat, random_like, small

from jaxdia import updates
from jaxdia.core.errors import InputError

MODEL, PARAMS = small()
TYPES = ["float32", "bfloat16", "float16"]


def npz(path, tree):
  with open(path, "wb") as file:  # given a name, NumPy would add an ending
    np.savez(file, **flat(tree, "/"))


def msgpack(path, tree):
  path.write_bytes(serialization.to_bytes(tree))


def safetensors(path, tree):
  # Its other functions for NumPy lack bfloat16 in some versions.
  save = pytest.importorskip("safetensors.flax").save_file
  save({name: jnp.asarray(array) for name, array in flat(tree).items()}, path)


def orbax(path, tree):
  ocp = pytest.importorskip("orbax.checkpoint")
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(path.absolute(), jax.tree.map(jnp.asarray, tree))
  checkpointer.wait_until_finished()


def as_tensors(tree):
  torch = pytest.importorskip("torch")
  return {
    name: torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name))
    for name, array in flat(tree).items()
  }


def torch(path, tree):
  pytest.importorskip("torch").save(as_tensors(tree), path)


def old_torch(path, tree):
  save = pytest.importorskip("torch").save
  save(as_tensors(tree), path, _use_new_zipfile_serialization=False)


FORMATS = [npz, msgpack, safetensors, orbax, torch, old_torch]


def refusal(path):
  """Returns the message of a refusal, which is one line and names the file."""
  with pytest.raises(InputError) as caught:
    updates.read(path)
  message = str(caught.value)
  assert "\n" not in message and str(path) in message
  return message


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("write", FORMATS)
def test_what_a_library_wrote_is_read_with_its_types(write, dtype, tmp_path):
  tree = random_like(PARAMS, dtype=jnp.dtype(dtype))
  path = tmp_path / "update.bin"  # what is in a file counts, not its name
  write(path, tree)
  arrays = updates.read(path)
  assert all(isinstance(array, np.ndarray) for array in arrays.values())
  for what in ("params", "gradient"):
    assert_same(updates.fit(MODEL, arrays, what).tree, tree)


@pytest.mark.parametrize("write", [msgpack, orbax])
def test_a_checkpoint_of_more_than_params_is_read(write, tmp_path):
  momentum = jax.tree.map(np.zeros_like, PARAMS)
  state = {"opt_state": {"0": {"mu": momentum}}, "params": PARAMS, "step": 3}
  write(tmp_path / "state", state)
  assert_same(updates.fit(MODEL, updates.read(tmp_path / "state")).tree, PARAMS)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_a_wrapped_state_dict_is_read(wrapper, tmp_path):
  torch = pytest.importorskip("torch")
  optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
  checkpoint = {wrapper: as_tensors(PARAMS), "epoch": 3, "optimizer": optimizer}
  torch.save(checkpoint, tmp_path / "x.pt")
  fitted = updates.fit(MODEL, updates.read(tmp_path / "x.pt"))
  assert_same(fitted.tree, PARAMS)
  assert list(fitted.extra) == ["optimizer.state.0.exp_avg"]


def test_a_module_of_pytorch_gives_what_its_state_dict_holds(tmp_path):
  torch = pytest.importorskip("torch")
  module = torch.nn.Sequential()
  module.add_module("conv", torch.nn.Conv2d(3, 6, 3, stride=2, padding=1))
  module.add_module("square", torch.nn.Linear(24, 24))
  module.add_module("norm", torch.nn.BatchNorm1d(24))
  module.add_module("classifier", torch.nn.Linear(24, 5))
  torch.save(module.state_dict(), tmp_path / "x.pt")
  fitted = updates.fit(MODEL, updates.read(tmp_path / "x.pt"))
  kernel = fitted.tree["conv"]["kernel"]
  np.testing.assert_array_equal(
    kernel, np.einsum("oihw->hwio", module.conv.weight.detach().numpy())
  )
  assert set(fitted.extra) == {f"norm.{name}" for name, _ in module.norm.named_buffers()}


def test_a_manager_of_checkpoints_is_read_by_step(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    manager.save(7, args=ocp.args.StandardSave(jax.tree.map(jnp.asarray, PARAMS)))
  assert_same(updates.fit(MODEL, updates.read(tmp_path / "run" / "7")).tree, PARAMS)
  assert str(tmp_path / "run" / "7") in refusal(tmp_path / "run")
  assert "no Orbax checkpoint" in refusal(tmp_path)


def test_arrays_without_names_are_taken_by_order(tmp_path):
  np.savez(tmp_path / "x.npz", *jax.tree.leaves(PARAMS))
  arrays = updates.read(tmp_path / "x.npz")
  assert_same(updates.fit(MODEL, arrays, by_order=True).tree, PARAMS)


@pytest.mark.parametrize("dtype", TYPES)
def test_leaves_that_equinox_serialised_are_taken_by_order(dtype, tmp_path):
  tree = random_like(PARAMS, dtype=jnp.dtype(dtype))
  equinox = pytest.importorskip("equinox")
  equinox.tree_serialise_leaves(tmp_path / "x.eqx", [0.5, jax.tree.map(jnp.asarray, tree)])
  fitted = updates.fit(MODEL, updates.read(tmp_path / "x.eqx"), by_order=True)
  assert_same(fitted.tree, tree)
  assert list(fitted.extra) == ["0"]


class Harmful:
  """Leaves a trace when it is read."""

  def __reduce__(self):
    return (exec, ("import builtins; builtins.harmed = True",))


def test_pickles_are_refused_and_not_run(tmp_path):
  plain, harmful = tmp_path / "x.pkl", tmp_path / "y.npz"
  for protocol in range(2, 6):
    plain.write_bytes(pickle.dumps({"kernel": Harmful()}, protocol))
    assert "pickle" in refusal(plain)
  plain.write_bytes(pickle.dumps({"kernel": np.ones(3)}, 0))
  assert "no format" in refusal(plain)
  np.savez(harmful, kernel=np.array([Harmful()], object))
  assert "pickled" in refusal(harmful)
  np.save(tmp_path / "z.npy", np.array([Harmful()], object))
  refusal(tmp_path / "z.npy")
  import builtins

  assert not hasattr(builtins, "harmed")


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_files_of_pytorch_are_refused_and_not_run(zipped, tmp_path):
  torch = pytest.importorskip("torch")
  for name, content in {"a": {"x": Harmful()}, "b": torch.nn.Linear(2, 2)}.items():
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / name)
    assert "Python objects" in message and "state_dict()" in message
  import builtins

  assert not hasattr(builtins, "harmed")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("write", [npz, msgpack, safetensors, torch, old_torch])
def test_truncated_files_are_refused(write, share, tmp_path):
  write(tmp_path / "whole.npz", PARAMS)
  content = (tmp_path / "whole.npz").read_bytes()
  (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
  refusal(tmp_path / "cut")


def test_a_damaged_orbax_folder_is_refused(tmp_path):
  orbax(tmp_path / "x", PARAMS)
  for file in tmp_path.rglob("*"):
    if file.is_file() and file.name != "_METADATA":
      file.write_bytes(b"")
  refusal(tmp_path / "x")


@pytest.mark.parametrize(
  "content", [b"", b"PK", b"kernel, bias", b"\x89HDF\r\n\x1a\n", b"\x81", b"{}", bytes(40)]
)
def test_other_files_are_refused_with_what_is_expected(content, tmp_path):
  (tmp_path / "x.npz").write_bytes(content)
  message = refusal(tmp_path / "x.npz")
  assert "expected" in message or "damaged" in message


def test_files_that_are_not_there_or_empty_of_arrays(tmp_path):
  assert "does not exist" in refusal(tmp_path / "x.npz")
  np.savez(tmp_path / "y.npz")
  assert "no arrays" in refusal(tmp_path / "y.npz")
  (tmp_path / "z.msgpack").write_bytes(serialization.to_bytes({"step": 3}))
  assert "no arrays" in refusal(tmp_path / "z.msgpack")


@pytest.mark.parametrize("write", [safetensors, orbax, torch])
def test_a_library_that_is_not_installed_is_named_by_its_extra(write, tmp_path, monkeypatch):
  write(tmp_path / "x", PARAMS)
  package = write.__name__
  for name in list(sys.modules):
    if name.split(".")[0] == package:
      monkeypatch.setitem(sys.modules, name, None)
  assert f'"jaxdia[{package}]"' in refusal(tmp_path / "x")


def test_what_is_no_file_is_not_read(tmp_path):
  """A pipe would be waited for, and a device read, for ever."""
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "device").symlink_to("/dev/zero")
  for name in ("pipe", "device"):
    assert "no regular file" in refusal(tmp_path / name)
  assert "cannot be read" in refusal(tmp_path / ("long" * 100))
