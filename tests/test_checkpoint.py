"""Checkpoints: whole, damaged, and of another experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia.core.errors import InputError
from jaxdia.engine import checkpoint


@pytest.fixture
def saved(tmp_path):
  tree = {"a": np.arange(5000.0), "b": (jnp.ones((2, 3)), np.int32(4))}
  path = tmp_path / "deep" / "checkpoint.npz"
  checkpoint.save(path, tree)
  return path, jax.tree.map(np.asarray, tree)


def test_checkpoint_round_trip(saved):
  path, tree = saved
  restored = checkpoint.restore(path, tree)
  jax.tree.map(np.testing.assert_array_equal, restored, tree)
  assert checkpoint.restore(path.with_name("none.npz"), tree) is None
  assert [p.name for p in path.parent.iterdir()] == ["checkpoint.npz"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_checkpoint_is_found(saved, damage):
  path, tree = saved
  content = bytearray(path.read_bytes())
  if damage == "flip":
    content[len(content) // 2] ^= 1
  path.write_bytes(
    {"truncate": content[:-200], "flip": content, "empty": b"", "text": b"hello"}[damage]
  )
  with pytest.raises(InputError, match=f"{path} is damaged.*Delete it"):
    checkpoint.restore(path, tree)


def test_a_checkpoint_of_another_experiment_is_refused(saved):
  path, tree = saved
  with pytest.raises(InputError, match="of another experiment"):
    checkpoint.restore(path, tree | {"a": np.zeros(3)})
  with pytest.raises(InputError, match="it lacks"):
    checkpoint.restore(path, tree | {"c": np.zeros(3)})
  # In other lanes it is this one.
  assert checkpoint.restore(path, {"a": np.zeros(3)}, lane_axes=1)["a"].shape == (5000,)


def test_checkpoints_of_bfloat16(tmp_path):
  tree = {"a": jnp.arange(8, dtype=jnp.bfloat16)}
  checkpoint.save(tmp_path / "c.npz", tree)
  restored = checkpoint.restore(tmp_path / "c.npz", tree)
  assert restored["a"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(restored["a"], np.arange(8))


def test_lanes_that_not_all_arrays_have_are_damage(tmp_path):
  tree = {"a": np.zeros((2, 3)), "b": np.zeros((2, 4))}
  checkpoint.save(tmp_path / "c.npz", tree | {"b": np.zeros((0, 4))})
  with pytest.raises(InputError, match="is damaged .*lanes"):
    checkpoint.restore(tmp_path / "c.npz", tree, lane_axes=1)
