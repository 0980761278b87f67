"""IG on convolutional networks, here and in plain PyTorch, in one run on the same problems.

pip install torch
python benchmarks/versus_pytorch.py

Both get the same networks, weights, victims, starting points and settings: IG (Geiping et al.
2020) without dropout, batch 1, the cosine distance, total variation, signed gradients and Adam.
PyTorch is used as its users do: gradients by autograd with create_graph, one client after
another; and with torch.func, where vmap takes as many clients at once as this library has lanes.
Times are of iterations alone, without start and compilation; the programs take turns, and the
least of --rounds counts. The objectives of the first ten iterations are compared, as a check that
both do the same.

With --breaching=CHECKOUT its own attack "invertinggradients" (github.com/JonasGeiping/breaching;
pip install torchvision hydra-core) stands beside, on the same client and with the same settings.
"""

import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from absl import flags
from measuring import Table, about_device, lanes_timer, make_problems
from torch import nn
from torch.nn import functional

from jaxdia import attacks
from jaxdia.client import Observation
from jaxdia.command_line import launch
from jaxdia.core.trees import leaves_by_path
from jaxdia.core.types import Params

_CASES = flags.DEFINE_list("cases", ["lenet:cifar10", "resnet18:cifar10"], "MODEL:DATASET, ...")
_LANES = flags.DEFINE_list("lanes", ["1", "4", "16"], "Numbers of lanes.")
_CLIENTS = flags.DEFINE_list("clients", ["4"], "Numbers of clients at once under torch.func.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is timed.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "About how long each timing takes.")
_BREACHING = flags.DEFINE_string("breaching", None, "Checkout of breaching, if it is to be timed.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")

_COLUMNS = {
  "model": "", "data": "", "program": "", "ms": ".3f", "times the best other": ".1f",
}  # fmt: skip


class LeNet(nn.Module):
  """`jaxdia.models.zoo.lenet.LeNet`, without dropout."""

  def __init__(self, channels: int = 12, hidden: int = 256, features: int = 768):
    """Creates the layers, by the names that they have here."""
    super().__init__()
    for i, (inputs, stride) in enumerate([(3, 2), (channels, 2), (channels, 1)]):
      self.add_module(f"conv_{i}", nn.Conv2d(inputs, channels, 5, stride, 2))
    self.hidden, self.classifier = nn.Linear(features, hidden), nn.Linear(hidden, 10)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns logits of images N,C,H,W."""
    for layer in (self.conv_0, self.conv_1, self.conv_2):
      x = functional.gelu(layer(x))
    x = x.permute(0, 2, 3, 1).flatten(1)  # as the weights are ordered here
    return self.classifier(functional.gelu(self.hidden(x)))


class ResNet18(nn.Module):
  """`jaxdia.models.zoo.resnet.ResNet18` for small images, without dropout."""

  def __init__(self, width: int = 64, groups: int = 32):
    """Creates the layers, by the names that they have here."""
    super().__init__()

    def add(name, inputs, outputs, size, stride):
      conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
      self.add_module(name, conv)
      norm = name.replace("conv", "norm") if "conv" in name else f"{name}_norm"
      self.add_module(norm, nn.GroupNorm(groups, outputs))

    add("stem", 3, width, 3, 1)
    self.blocks = []
    inputs = width
    for stage in range(4):
      for block in range(2):
        outputs, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
        name = f"stage_{stage}_block_{block}"
        add(f"{name}_conv_0", inputs, outputs, 3, stride)
        add(f"{name}_conv_1", outputs, outputs, 3, 1)
        if inputs != outputs:
          add(f"{name}_skip", inputs, outputs, 1, stride)
        self.blocks.append((name, inputs != outputs))
        inputs = outputs
    self.classifier = nn.Linear(inputs, 10)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns logits of images N,C,H,W."""
    get = self.get_submodule
    x = functional.relu(self.stem_norm(self.stem(x)))
    for name, skips in self.blocks:
      y = functional.relu(get(f"{name}_norm_0")(get(f"{name}_conv_0")(x)))
      y = get(f"{name}_norm_1")(get(f"{name}_conv_1")(y))
      if skips:
        x = get(f"{name}_skip_norm")(get(f"{name}_skip")(x))
      x = functional.relu(x + y)
    return self.classifier(x.mean((2, 3)))


NETWORKS = {"lenet": LeNet, "resnet18": ResNet18}


def to_torch(tree: Params) -> dict[str, torch.Tensor]:
  """Returns params, or a gradient, as PyTorch's modules have them."""
  found = {}
  for (*path, last), leaf in leaves_by_path(tree).items():
    array = np.asarray(leaf)
    if last == "kernel":
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    name = ".".join((*path, "bias" if last == "bias" else "weight"))
    found[name] = torch.tensor(np.ascontiguousarray(array))
  return found


class Peer:
  """IG in PyTorch, as its users write it."""

  def __init__(self, name: str, observations: list[Observation], settings: attacks.AttackSettings):
    """Copies the network, and what the server saw of each client."""
    self.settings = settings
    self.model = NETWORKS[name]()
    self.model.load_state_dict(to_torch(observations[0].params))
    self.names = [key for key, _ in self.model.named_parameters()]
    self.targets = [to_torch(observation.gradient) for observation in observations]
    self.labels = [torch.tensor(np.asarray(o.labels)).long() for o in observations]
    mean, std = (np.asarray(getattr(observations[0], key)) for key in ("mean", "std"))
    box = [torch.tensor((bound - mean) / std).float() for bound in (0.0, 1.0)]
    self.low, self.high = (bound.reshape(1, -1, 1, 1) for bound in box)
    self.mean, self.std = mean.tolist(), std.tolist()

  def _objective(self, gradient: Any, target: Any, x: torch.Tensor) -> torch.Tensor:
    pairs = list(zip(gradient, target, strict=True))
    inner = sum((a * b).sum() for a, b in pairs)
    norms = [sum(t.pow(2).sum() for t in tensors).sqrt() for tensors in (gradient, target)]
    variation = x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
    return 1 - inner / (norms[0] * norms[1] + 1e-8) + self.settings.tv_weight * variation

  def _search(self, x: torch.Tensor, derivative: Callable, steps: int) -> tuple[list, float]:
    x = x.clone()
    optimizer = torch.optim.Adam([x], lr=self.settings.learning_rate)
    objectives = []
    start = time.perf_counter()
    for _ in range(steps):
      value, gradient = derivative(x)
      objectives.append(value.detach())
      x.grad = gradient.sign()
      optimizer.step()
      with torch.no_grad():
        x.clamp_(self.low, self.high)
    return [float(value.mean()) for value in objectives], time.perf_counter() - start

  def autograd(self, x: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Attacks the first client by autograd.

    Args:
      x: f[1, C, H, W], where to start.
      steps: iterations.

    Returns:
      The objectives before each iteration, and the seconds of all.
    """
    params = list(self.model.parameters())
    target = [self.targets[0][key] for key in self.names]

    def derivative(x):
      x = x.detach().requires_grad_()
      loss = functional.cross_entropy(self.model(x), self.labels[0])
      gradient = torch.autograd.grad(loss, params, create_graph=True)
      value = self._objective(gradient, target, x)
      return value, torch.autograd.grad(value, x)[0]

    return self._search(x, derivative, steps)

  def func(self, x: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Attacks the first clients together, by torch.func.

    Args:
      x: f[clients, C, H, W], where to start.
      steps: iterations.

    Returns:
      The mean objectives before each iteration, and the seconds of all.
    """
    params = {key: value.detach() for key, value in self.model.named_parameters()}
    targets = [torch.stack([t[key] for t in self.targets[: len(x)]]) for key in self.names]
    labels = torch.stack(self.labels[: len(x)])

    def loss(params, x, label):
      return functional.cross_entropy(torch.func.functional_call(self.model, params, x), label)

    def objective(x, label, *target):
      gradient = torch.func.grad(loss)(params, x[None], label)
      return self._objective([gradient[key] for key in self.names], target, x[None])

    one = torch.func.vmap(torch.func.grad_and_value(objective))

    def derivative(x):
      gradient, value = one(x, labels, *targets)
      return value, gradient

    return self._search(x, derivative, steps)

  def breaching(self, x: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Attacks the first client by breaching, whose checkout can be imported.

    Args:
      x: f[1, C, H, W], where to start.
      steps: iterations.

    Returns:
      The objectives before each iteration, and the seconds of all.
    """
    import breaching

    config = breaching.get_attack_config("invertinggradients")
    config.optim.max_iterations, config.optim.step_size = steps, self.settings.learning_rate
    config.optim.step_size_decay = None
    config.regularization.total_variation.scale = self.settings.tv_weight
    setup = {"device": torch.device("cpu"), "dtype": torch.float32}
    attacker = breaching.attacks.prepare_attack(
      self.model, nn.CrossEntropyLoss(), config, setup=setup
    )
    metadata = types.SimpleNamespace(
      shape=tuple(x.shape[1:]), mean=self.mean, std=self.std, modality="vision"
    )
    params = [value.detach() for value in self.model.parameters()]
    payload = [{"parameters": params, "buffers": None, "metadata": metadata}]
    facts = {"num_data_points": 1, "labels": self.labels[0], "local_hyperparams": None}
    gradient = [self.targets[0][key] for key in self.names]
    shared = [{"gradients": gradient, "buffers": None, "metadata": facts}]
    start = time.perf_counter()
    _, stats = attacker.reconstruct(payload, shared, {}, initial_data=x)
    return stats["Trial_0_Val"], time.perf_counter() - start


def compare_case(name: str, dataset: str, table: Table) -> None:
  """Times an iteration of each program."""
  lanes = [int(n) for n in _LANES.value]
  together = [int(n) for n in _CLIENTS.value]
  model, observations = make_problems(name, dataset, max(*lanes, *together), dropout_rate=0.0)
  attack = attacks.ig(model)
  peer = Peer(name, observations[: max(together)], attack.settings)
  states = [attack.init(jax.random.key(i), o) for i, o in enumerate(observations[: max(together)])]
  starts = np.concatenate([state.candidate.images for state in states]).transpose(0, 3, 1, 2)
  starts = torch.tensor(np.ascontiguousarray(starts))

  state, step, ours = states[0], jax.jit(attack.step), []
  for _ in range(10):
    state, info = step(observations[0], state)
    ours.append(float(info.objective))
  peers = {"PyTorch, autograd": peer.autograd, "PyTorch, torch.func, 1 client": peer.func}
  if _BREACHING.value:
    sys.path.insert(0, _BREACHING.value)
    peers["breaching"] = peer.breaching
  for label, found in peers.items():
    difference = np.max(np.abs(np.array(found(starts[:1], 10)[0]) / ours - 1))
    print(f"(largest difference of the first objectives, {label}: {difference:.1e})", flush=True)

  def timer(run, x):
    steps = 3
    steps = max(steps, int(_SECONDS.value / (run(x, steps)[1] / steps)))
    return lambda: 1e3 * run(x, steps)[1] / steps / len(x)

  timers = {label: timer(run, starts[:1]) for label, run in peers.items()}
  for count in together:
    timers[f"PyTorch, torch.func, {count} clients"] = timer(peer.func, starts[:count])
  devices = jax.local_devices()
  for count in lanes:
    used = devices if count % len(devices) == 0 else devices[:1]
    chosen = observations[:count]
    measure = lanes_timer(model, chosen, count, used, _SECONDS.value, name="ig")
    timers[f"jaxdia, {count} lanes"] = lambda measure=measure: measure().ms
  times = {label: [measure()] for label, measure in timers.items()}
  for _ in range(_ROUNDS.value - 1):
    for label, measure in timers.items():
      times[label].append(measure())
  least = {label: min(measured) for label, measured in times.items()}
  best = min(ms for label, ms in least.items() if not label.startswith("jaxdia"))
  for label, ms in least.items():
    ratio = best / ms if label.startswith("jaxdia") else None
    common = {"model": name, "data": dataset, "program": label}
    table.add(**common, ms=ms, all_ms=times[label], **{"times the best other": ratio})


def main() -> None:
  """Compares all cases."""
  about = about_device() | {"torch": torch.__version__, "threads": torch.get_num_threads()}
  table = Table(about, _COLUMNS)
  for case in _CASES.value:
    compare_case(*case.split(":"), table)
  table.write(_OUT.value)


if __name__ == "__main__":
  launch(main)
