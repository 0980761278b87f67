"""What the running averages of BatchNorm, sent with an update, are worth to a search.

python benchmarks/averages.py                          # two networks, two batches of each size
python benchmarks/averages.py --weights=none,1 --max_iterations=500
"""

import dataclasses

import jax
import numpy as np
from absl import flags
from flax import linen as nn

from jaxdia import attacks, data, evaluation, models
from jaxdia.client import observe
from jaxdia.command_line import launch
from jaxdia.core.trees import leaves_by_name
from jaxdia.experiment.table import markdown, markdown_row

_WEIGHTS = flags.DEFINE_list("weights", ["none", "0.01", "0.1", "1"], "attack.average_weight.")
_SIZES = flags.DEFINE_list("sizes", ["2", "4"], "Images of a batch.")
_RATE = flags.DEFINE_float("rate", 0.1, "Of dropout.")
_ITERATIONS = flags.DEFINE_integer("max_iterations", 1500, "Of DIA, given the labels.", 1)
_DATASET = flags.DEFINE_string("dataset", "mnist", "Of the samples.")
_HEADINGS = ("network", "batch", "average_weight", "images", "median MSE", "median SSIM")


class Dense(nn.Module):
  """Two dense layers with BatchNorm and dropout, and a classifier."""

  rate: float

  @nn.compact
  def __call__(self, x, train=True):
    """Returns logits."""
    x = x.reshape(len(x), -1)
    for width in (256, 128):
      x = nn.gelu(nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x)))
      x = nn.Dropout(self.rate)(x, deterministic=not train)
    return nn.Dense(10)(x)


class Convolutional(nn.Module):
  """Two convolutions of stride 2 with BatchNorm and dropout, and a classifier."""

  rate: float

  @nn.compact
  def __call__(self, x, train=True):
    """Returns logits."""
    for channels in (16, 32):
      x = nn.Conv(channels, (3, 3), strides=2)(x)
      x = nn.gelu(nn.BatchNorm(use_running_average=not train)(x))
      x = nn.Dropout(self.rate)(x, deterministic=not train)
    return nn.Dense(10)(x.reshape(len(x), -1))


def main() -> None:
  """Prints the table."""
  print(markdown(_HEADINGS, ()), end="", flush=True)
  for module in (Dense(_RATE.value), Convolutional(_RATE.value)):
    for size in map(int, _SIZES.value):
      _run(module, size)


def _run(module, size):
  victims = data.load(f"samples:{_DATASET.value}", 2 * size)
  statistics, images = victims.statistics, data.normalize(victims.images, victims.statistics)
  model = models.from_flax(module, images.shape[1:])
  params = model.init(jax.random.key(0))
  before = leaves_by_name(model.network.collections.tree)
  pairs = []
  for i in range(2):
    batch = slice(i * size, (i + 1) * size)
    labels = victims.labels[batch]
    key = jax.random.key(5 + i)
    seen, secret = observe(key, model, params, images[batch], labels, statistics=statistics)
    after = models.averages_after(model, params, secret.masks, secret.images, {})
    averages = {name: models.Averages(before[name], after[name]) for name in before}
    pairs.append((dataclasses.replace(seen, averages=averages), secret))
  for weight in _WEIGHTS.value:
    number = None if weight == "none" else float(weight)
    options = {"average_weight": number, "max_iterations": _ITERATIONS.value, "schedule": "cosine"}
    attack = attacks.dia(model, **options)
    scores = []
    for seen, secret in pairs:
      best = attacks.solve(jax.random.key(1), attack, seen).best
      scores += evaluation.evaluate(model, secret, best.candidate, statistics).scores
    mse, ssim = (np.median([s[name] for s in scores]) for name in ("mse_normalized", "ssim"))
    cells = (
      type(module).__name__,
      str(size),
      weight,
      str(len(scores)),
      f"{mse:.2g}",
      f"{ssim:.2f}",
    )
    print(markdown_row(cells), end="", flush=True)


if __name__ == "__main__":
  launch(main)
