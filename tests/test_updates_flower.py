"""The example with Flower: its clients and server, with and without Flower's simulation."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxdia import updates

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
  monkeypatch.syspath_prepend(EXAMPLES)
  yield importlib.import_module("flower_digits")


def beginning(example, framework):
  """Returns the training step of a client and the weights that it begins with."""
  if framework == "flax":
    return example.train_flax, example.record_of(example.initial_params())
  pytest.importorskip("torch")
  from flwr.app import ArrayRecord

  return example.train_torch, ArrayRecord(example.torch_net().state_dict())


@pytest.mark.parametrize("framework", ["flax", "torch"])
def test_the_audit_reads_the_images_of_a_client(example, framework, tmp_path):
  train, initial = beginning(example, framework)
  before, after = tmp_path / "before.npz", tmp_path / "after.npz"
  np.savez(before, **updates.from_flower(initial))
  np.savez(after, **updates.from_flower(train(initial, 1)))
  recovery = example.audit(before, after)
  images, labels = example.digits_of(1)
  order = [int(np.argmin([np.mean((x - y) ** 2) for y in images])) for x in recovery.parts.images]
  assert sorted(order) == [0, 1, 2, 3]
  np.testing.assert_allclose(recovery.parts.images, images[order], atol=1e-5)
  np.testing.assert_array_equal(recovery.parts.labels, labels[order])


def test_the_networks_of_both_frameworks_are_the_same(example):
  torch = pytest.importorskip("torch")
  from jaxdia import models

  model = models.from_flax(example.Net(), example.IMAGE_SHAPE)
  net = example.torch_net().eval()
  images, _ = example.digits_of(0)
  params = updates.fit(model, net.state_dict()).tree
  theirs = net(torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy()
  np.testing.assert_allclose(model.apply(params, None, images), theirs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["flax", "torch"])
def test_the_server_of_a_simulation_writes_what_it_sees(example, framework, tmp_path, monkeypatch):
  pytest.importorskip("ray")
  monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
  monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
  train, initial = beginning(example, framework)
  # The clients' processes find the module by its name.
  monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
  example.simulate(tmp_path, train, initial)
  sent = updates.from_flower(initial)
  for name, array in updates.read(tmp_path / "before.npz").items():
    np.testing.assert_array_equal(array, sent[name])
  for client in range(example.NUM_CLIENTS):
    back = updates.from_flower(train(initial, client))
    for name, array in updates.read(tmp_path / f"after_{client}.npz").items():
      np.testing.assert_allclose(array, back[name], atol=1e-6)
    assert any(np.any(back[name] != sent[name]) for name in sent)
  if framework == "torch" and importlib.util.find_spec("torchax") is None:
    return
  network = {"flax": "Net", "torch": "torch_net"}[framework]
  command = [sys.executable, "launch/audit.py", "--config=configs/audit.py"]
  options = {
    "model.name": f"examples.digits_nets:{network}",
    "image_shape": "(8,8,1)",
    "before": tmp_path / "before.npz",
    "after": f"{tmp_path / 'after_0.npz'},{tmp_path / 'after_1.npz'}",
    "learning_rate": example.LEARNING_RATE,
    "batch_size": example.BATCH_SIZE,
  }
  command += [f"--config.{name}={value}" for name, value in options.items()]
  command.append(f"--workdir={tmp_path / 'audit'}")
  done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "audit" / "audit.json").read_text())
  for client, update in enumerate(result["updates"]):
    assert [image["verdict"] for image in update["images"]] == ["certain"] * 4
    _, labels = example.digits_of(client)
    assert sorted(image["label"] for image in update["images"]) == sorted(labels)
