"""Networks of PyTorch that others wrote: gradients in training mode against PyTorch's own."""

import importlib.util

import jax
import numpy as np
import pytest
from adapter_cases import to_torch

from jaxdia import models, updates
from jaxdia.client import client_gradient
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_path

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:
  pytest.skip("torchax is not installed", allow_module_level=True)

LABELS = np.array([0, 3, 4])


class Encoder(torch.nn.Module):
  def __init__(self):
    super().__init__()
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.3, batch_first=True)
    self.encoder = torch.nn.TransformerEncoder(layer, 2)
    self.head = torch.nn.Linear(64, 5)

  def forward(self, images):
    return self.head(self.encoder(images.reshape(len(images), 4, 16)).flatten(1))


def normed():
  return torch.nn.Sequential(
    torch.nn.Conv2d(1, 4, 3, 2, 1),
    torch.nn.BatchNorm2d(4),
    torch.nn.ReLU(),
    torch.nn.Dropout2d(0.3),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(16, 5),
  )


def normed_single_values():
  """PyTorch takes no batch statistics of one image where a channel has one value, as at the end of
  a ResNet of small images."""
  return torch.nn.Sequential(
    torch.nn.Conv2d(1, 4, 8),
    torch.nn.BatchNorm2d(4),
    torch.nn.GELU(),
    torch.nn.Flatten(),
    torch.nn.Dropout(0.3),
    torch.nn.Linear(4, 5),
  )


def resnet18():
  torchvision = pytest.importorskip("torchvision")
  return torchvision.models.resnet18(num_classes=5)


def vit():
  torchvision = pytest.importorskip("torchvision")
  return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, 0.2, 0.1, num_classes=5)


CASES = [
  (Encoder, (8, 8, 1), 8),
  (normed, (8, 8, 1), 1),
  (normed_single_values, (8, 8, 1), 1),
  pytest.param(resnet18, (32, 32, 3), 0, marks=pytest.mark.slow),
  pytest.param(vit, (32, 32, 3), 9, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "shape", "sites"), CASES)
def test_the_gradient_of_a_training_step_is_pytorchs_own(make, shape, sites):
  """In float64, as batch statistics of three images amplify rounding."""
  torch.manual_seed(0)
  module = make().double()
  for parameter in module.parameters():  # some are made as zeros, which would hide others
    torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
  model = models.from_torch(module, shape)
  assert len(model.sites) == sites and model.classifier is not None
  with jax.enable_x64(True):
    params = model.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, *shape), np.float64)
    masks = models.read_masks(model, params, images, 5)
    torch.manual_seed(5)
    logits = module(to_torch(images))
    torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
    expected = leaves_by_path(models.from_native(model, module, what="gradient"))
    actual = leaves_by_path(jax.jit(client_gradient)(model, params, masks, images, LABELS))
  assert actual.keys() == expected.keys()
  scale = max(float(np.abs(leaf).max()) for leaf in expected.values())
  for path, leaf in actual.items():
    assert leaf.dtype == np.float64
    difference = np.abs(np.asarray(leaf) - np.asarray(expected[path])).max()
    assert difference < 1e-9 * scale, path


def test_the_evaluation_mode_has_running_averages():
  torch.manual_seed(0)
  module = normed()
  module(torch.rand(16, 1, 8, 8))  # moves the averages
  evaluation = models.evaluation_mode(models.from_torch(module, (8, 8, 1)))
  module[1].eval()  # frozen, while dropout is on
  model = models.from_torch(module, (8, 8, 1))
  images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
  logits = model.apply(model.init(jax.random.key(0)), models.expected_masks(model, 3), images)
  with torch.no_grad():
    expected = module.eval()(to_torch(images)).numpy()
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
  logits = evaluation.apply(model.init(jax.random.key(0)), {}, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
  # A state dict has buffers too.
  params = models.from_native(model, module.state_dict())
  jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(0)))


def test_running_averages_of_a_file_take_the_place_of_the_modules_own():
  model = models.from_torch(normed(), (8, 8, 1))
  module = normed()
  module(torch.rand(16, 1, 8, 8))  # moves the averages
  arrays = {name: buffer.numpy().copy() for name, buffer in module.named_buffers()}
  other = updates.use_averages(model, arrays)
  assert other != model
  params = models.from_native(model, module.state_dict())
  images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
  with torch.no_grad():
    expected = module.eval()(to_torch(images)).numpy()
  logits = models.evaluation_mode(other).apply(params, {}, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
  logits = models.evaluation_mode(model).apply(params, {}, images)
  assert np.abs(logits - expected).max() > 1e-2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_averages_after_a_step_are_pytorchs_own(momentum):
  torch.manual_seed(0)
  module = normed()
  module[1].momentum = momentum
  module(torch.rand(16, 1, 8, 8))  # moves the averages
  model = models.from_torch(module, (8, 8, 1))
  assert models.follows_averages(model)
  params, images = (
    model.init(jax.random.key(0)),
    jax.random.uniform(jax.random.key(1), (3, 8, 8, 1)),
  )
  before = {"1.running_mean": np.array([0.1, 0.2, 0.3, 0.4], np.float32)}
  found = jax.jit(models.averages_after)(model, params, None, images, before)
  module[1].running_mean.copy_(torch.tensor(before["1.running_mean"]))
  module(to_torch(images))
  expected = dict(module.named_buffers())
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-5, atol=1e-6)


class Noisy(torch.nn.Linear):
  def forward(self, images):
    images = images.flatten(1)
    return super().forward(images + torch.randn_like(images))


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Noisy(64, 3), "draws 128 random numbers for 2 images besides"),
    (normed().eval(), r"all dropout of Sequential \(3\) is switched off"),
    (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.AlphaDropout(0.5)), "'1' is AlphaDropout"),
    (torch.nn.Flatten(), "has no parameters"),
    (torch.nn.Conv2d(1, 2, 3), "expected one array of logits"),
    (torch.nn.Linear, "from_torch got type"),
  ],
)
def test_from_torch_refuses_by_name(module, message):
  with pytest.raises(InputError, match=message):
    models.from_torch(module, (8, 8, 1))
