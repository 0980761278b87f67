"""Runs the authors' PyTorch code, from a checkout, on given problems; none of it is here.

It is github.com/dAI-SY-Group/DropoutInversionAttack, and needs torch, munch, einops
and pyyaml. It runs in a process of its own, as its user would run it: how fast it
is depends on what else a process allocates. This file imports no jax for that.
"""

import contextlib
import importlib
import io
import os
import pathlib
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdia.core.errors import InputError

# Our names of models and data sets -> theirs.
_MODELS = {"mlp": "MLP", "vit": "ViT"}
_DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR10"}


class AuthorsCode:
  """One of their models at random weights, their victims, and their DIA."""

  def __init__(self, checkout: str, model: str, dataset: str, rate: float):
    """Imports their code and builds their model.

    Args:
      checkout: folder of their repository.
      model: "mlp" or "vit".
      dataset: "mnist" or "cifar10".
      rate: of all dropout layers.

    Raises:
      InputError: the checkout, a package that it needs, or the model is missing.
    """
    root = pathlib.Path(checkout)
    if not (root / "src" / "attacks.py").is_file():
      raise InputError(
        f"{root} is no checkout of the authors' code (it has no src/attacks.py). Clone"
        " https://github.com/dAI-SY-Group/DropoutInversionAttack and pass its folder as"
        " --reference."
      )
    if model not in _MODELS or dataset not in _DATASETS:
      raise InputError(
        f"the authors' code has no {model}:{dataset}; choose of {sorted(_MODELS)} and"
        f" {sorted(_DATASETS)}."
      )
    sys.path.insert(0, str(root))
    try:
      self.torch = importlib.import_module("torch")
      self._attacks, self._utils, models = (
        importlib.import_module(f"src.{name}") for name in ("attacks", "utils", "models")
      )
    except ImportError as error:
      raise InputError(
        f"the authors' code needs a package that is missing ({error}). Install what it needs with"
        " pip install torch munch einops pyyaml."
      ) from error
    self._dataset = _DATASETS[dataset]
    victims = self.torch.load(root / "data" / f"{self._dataset}_128.tdump")
    self._inputs, self._labels = victims["inputs"], victims["targets"]
    config = self._utils.build_config(str(root / f"example_configs/models/{_MODELS[model]}.yaml"))
    config.p = config.dropout_rate = rate
    config.data_shape, config.num_classes = self._inputs.shape[1:], 10
    self._config = self._utils.build_config(str(root / "example_configs/attacks/DIA.yaml"))
    self._config.device, self._config.num_classes = self.torch.device("cpu"), 10
    self.torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
      self._model = models.get_model(config.name, config)

  def state(self) -> dict[str, np.ndarray]:
    """Returns their weights by their names."""
    return {name: value.numpy() for name, value in self._model.state_dict().items()}

  def victim(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns one of their victims: a normalised image f[1, H, W, C] and its label i[1]."""
    image = self._inputs[index : index + 1].permute(0, 2, 3, 1)
    return image.numpy(), self._labels[index : index + 1].numpy()

  def attack(
    self,
    index: int,
    client_masks: Sequence[np.ndarray],
    images: np.ndarray,
    masks: Sequence[np.ndarray],
    max_iterations: int,
    lean: bool,
  ) -> "Run":
    """Runs their DIA on one of their victims.

    Args:
      index: of the victim.
      client_masks: that the client used, in the order of the sites.
      images: where the search starts.
      masks: where the search starts, in the order of the sites.
      max_iterations: after which it stops, if not before.
      lean: whether to leave out the derivatives by the weights that it never uses.
    """
    self._config.max_iterations = max_iterations
    truth, label = self._inputs[index : index + 1], self._labels[index : index + 1]
    dummy = self.torch.tensor(np.moveaxis(images, -1, 1)).contiguous().requires_grad_(True)
    searched = [dummy]
    with contextlib.redirect_stdout(io.StringIO()):
      attacker = self._attacks.DropoutInversionAttack(
        self._dataset, self._model, [truth], [label], self._config
      )
      attacker.current_batch = 0
      self._set_masks(client_masks)
      gradient, _ = attacker.get_gradient(truth, label)
      attacker.init_dummies = lambda: (dummy, None)
      attacker.init_dropout_masks = lambda: searched.extend(self._set_masks(masks, searched=True))
      notes = attacker.early_stopper = _Notes(attacker.early_stopper, dummy, truth)
      with self._lean_backward(searched) if lean else contextlib.nullcontext():
        start = time.perf_counter()
        attacker.attack_batch(gradient, label)
        seconds = time.perf_counter() - start
    return Run(seconds, notes.objectives, [(t - start, e) for t, e in notes.errors])

  def _set_masks(self, masks, searched: bool = False) -> list[Any]:
    layers = self._model.get_dropout_layers()
    self._model.track_dropout_mask(False)
    self._model.use_dropout_mask(True)
    for layer, mask in zip(layers, masks, strict=True):
      layer.do_mask = self.torch.tensor(np.asarray(mask)).requires_grad_(searched)
      layer.mask_shape = layer.do_mask.shape
    return [layer.do_mask for layer in layers]

  @contextlib.contextmanager
  def _lean_backward(self, searched: list[Any]) -> Iterator[None]:
    """Lets `backward()` stop at what is searched."""
    tensor, original = self.torch.Tensor, self.torch.Tensor.backward
    tensor.backward = lambda loss: original(loss, inputs=searched)
    try:
      yield
    finally:
      tensor.backward = original


class Run(NamedTuple):
  """What came of one run of their attack.

  Attributes:
    seconds: that it took.
    objectives: of each iteration.
    errors: (seconds, mean squared error) after each iteration.
  """

  seconds: float
  objectives: list[float]
  errors: list[tuple[float, float]]


class _Notes:
  """Stands in for the early stopping of their attack, and notes what passes there."""

  def __init__(self, stopper, dummy, truth):
    self._stopper, self._dummy, self._truth = stopper, dummy, truth
    self.objectives: list[float] = []
    self.errors: list[tuple[float, float]] = []

  def __call__(self, objective):
    self._stopper(objective)
    self.objectives.append(objective)
    error = float((self._dummy.detach() - self._truth).square().mean())
    self.errors.append((time.perf_counter(), error))

  def __getattr__(self, name):
    return getattr(self._stopper, name)


class Remote:
  """`AuthorsCode` in a process of its own, with the same methods."""

  def __init__(self, *arguments: Any, keep_memory: bool = False):
    """Starts the process.

    Args:
      *arguments: of `AuthorsCode`.
      keep_memory: whether its allocator keeps large blocks that were freed, where
        by default it hands them back and gets them anew in every iteration. (Of
        glibc; the default of others varies.)

    Raises:
      InputError: as `AuthorsCode` does.
    """
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    self._process = subprocess.Popen(
      [sys.executable, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | (kept if keep_memory else {}),
    )
    self._call(None, *arguments)

  def _call(self, method, *arguments):
    pickle.dump((method, arguments), self._process.stdin)
    self._process.stdin.flush()
    answer = pickle.load(self._process.stdout)
    if isinstance(answer, Exception):
      raise answer
    return answer

  def __getattr__(self, name: str) -> Any:
    """Returns a method of `AuthorsCode`."""
    return lambda *arguments: self._call(name, *arguments)


def _serve() -> None:
  """Answers a `Remote` until it is gone."""
  answers, sys.stdout = sys.stdout.buffer, sys.stderr
  code = None
  while True:
    try:
      method, arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      if method is None:
        code, answer = AuthorsCode(*arguments), None
      else:
        answer = getattr(code, method)(*arguments)
    except Exception as error:  # goes to who asked
      answer = error
    # What is pickled here must not be of `__main__`, which is another module there.
    pickle.dump(tuple(answer) if isinstance(answer, Run) else answer, answers)
    answers.flush()


if __name__ == "__main__":
  _serve()
