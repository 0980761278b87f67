"""Weights of each library, as it writes them itself, for models of the same library."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from update_cases import assert_same

from jaxdia import models, updates

IMAGE_SHAPE = (6, 6, 2)


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.layers = nnx.List([nnx.Linear(144, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, images):
    x = nnx.gelu(self.conv(images)).reshape(images.shape[0], -1)
    return self.layers[1](self.dropout(nnx.gelu(self.layers[0](x))))


@pytest.mark.parametrize("pure", [True, False])
def test_nnx_from_orbax(pure, tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  module = NNX(nnx.Rngs(0))
  model = models.from_nnx(module, IMAGE_SHAPE)
  state = nnx.state(module, nnx.Param)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "x", nnx.to_pure_dict(state) if pure else state)
  checkpointer.wait_until_finished()
  fitted = updates.fit(model, updates.read(tmp_path / "x"))
  assert_same(fitted.tree, models.from_native(model, state))
  assert not fitted.extra


def torch_module():
  torch = pytest.importorskip("torch")
  if importlib.util.find_spec("torchax") is None:  # which the adapter alone can import
    pytest.skip("torchax is not installed")
  nn = torch.nn
  return nn.Sequential(
    *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten()),
    *(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 3)),
  )


def test_pytorch_from_its_files(tmp_path):
  module = torch_module()
  import torch

  model = models.from_torch(module, IMAGE_SHAPE)
  expected = models.from_native(model, module.state_dict())
  torch.save({"state_dict": module.state_dict()}, tmp_path / "x.pt")
  paths = [tmp_path / "x.pt"]
  try:
    from safetensors.torch import save_file

    paths.append(tmp_path / "x.safetensors")
    save_file({f"module.{k}": v for k, v in module.state_dict().items()}, paths[-1])
  except ImportError:
    pass
  for path in paths:
    fitted = updates.fit(model, updates.read(path))
    assert_same(fitted.tree, expected)
    assert {name.split(".")[-2] for name in fitted.extra} == {"1"}  # BatchNorm's averages
    assert "its own values" in fitted.notes[-1] and "1.running_mean" in fitted.notes[-1]


def test_pytorch_by_order_as_older_clients_of_flower_send_it():
  module = torch_module()
  model = models.from_torch(module, IMAGE_SHAPE)
  arrays = [tensor.numpy() for tensor in module.state_dict().values()]
  fitted = updates.fit(model, updates.from_flower(arrays), by_order=True)
  assert_same(fitted.tree, models.from_native(model, module.state_dict()))
  assert list(fitted.extra) == ["4", "5", "6"]  # BatchNorm's averages and count
  arrays = [parameter.detach().numpy() for parameter in module.parameters()]
  fitted = updates.fit(model, arrays, by_order=True)
  assert_same(fitted.tree, models.from_native(model, module.state_dict()))


def test_gradients_of_pytorch_with_a_frozen_layer(tmp_path):
  module = torch_module()
  import torch

  module[0].requires_grad_(False)
  module(torch.zeros(2, 2, 6, 6)).sum().backward()
  model = models.from_torch(module, IMAGE_SHAPE)
  gradient = {name: p.grad for name, p in module.named_parameters()}
  torch.save(gradient, tmp_path / "x.pt")
  fitted = updates.fit(model, updates.read(tmp_path / "x.pt"), "gradient")
  assert fitted.frozen == ("0/bias", "0/kernel")
  np.testing.assert_array_equal(fitted.tree["4"]["kernel"], module[4].weight.grad.numpy().T)


def test_equinox_from_its_leaves(tmp_path):
  eqx = pytest.importorskip("equinox")
  keys = jax.random.split(jax.random.key(0), 3)
  module = eqx.nn.Sequential(
    [
      eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
      eqx.nn.Lambda(jnp.ravel),
      eqx.nn.Linear(64, 64, key=keys[1]),
      eqx.nn.Dropout(0.5),
      eqx.nn.Linear(64, 3, key=keys[2]),
    ]
  )
  model = models.from_equinox(module, IMAGE_SHAPE)
  eqx.tree_serialise_leaves(tmp_path / "x.eqx", module)
  fitted = updates.fit(model, updates.read(tmp_path / "x.eqx"), by_order=True)
  assert_same(fitted.tree, models.from_native(model, module))
