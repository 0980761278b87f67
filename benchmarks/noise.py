"""What noise, few bits and pruning leave to the closed form, the hybrid and DIA.

python benchmarks/noise.py
python benchmarks/noise.py --datasets=mnist --kinds=gaussian:1e-3,topk:0.9 --iterations=1000
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxdia import attacks, closed_form, data, evaluation, models
from jaxdia.client import observe
from jaxdia.command_line import launch
from jaxdia.experiment.table import markdown, markdown_row

_DATASETS = flags.DEFINE_list("datasets", ["mnist", "cifar10"], "Of samples.")
_KINDS = flags.DEFINE_list(
  "kinds",
  ["gaussian:1e-4", "gaussian:1e-3", "float16", "bfloat16", "topk:0.5", "topk:0.9"],
  "What is done to the gradient. gaussian:S adds noise of S times the rms of its entries; topk:P"
  " leaves out the share P of the entries of each array, those that are least.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images of a batch.", 1)
_RATE = flags.DEFINE_float("rate", 0.5, "Of dropout.")
_ITERATIONS = flags.DEFINE_integer("iterations", 3000, "Of DIA and of the hybrid.", 1)
_SEARCHES = flags.DEFINE_list("searches", ["hybrid", "dia"], "Which are run.")

# An image from this SSIM on counts as found.
_FOUND = 0.9


def spoil(kind, gradient):
  """Returns a gradient after what was done to it.

  Args:
    kind: as in the flag.
    gradient: of a client.
  """
  rng = np.random.default_rng(0)
  name, _, size = kind.partition(":")
  leaves = jax.tree.leaves(gradient)
  rms = np.sqrt(sum(float(jnp.sum(x**2)) for x in leaves) / sum(x.size for x in leaves))

  def one(leaf):
    leaf = np.asarray(leaf)
    if name == "gaussian":
      noise = float(size) * rms * rng.standard_normal(leaf.shape)
      return (leaf + noise).astype(leaf.dtype)
    if name == "topk":
      return np.where(np.abs(leaf) >= np.quantile(np.abs(leaf), float(size)), leaf, 0)
    return np.asarray(jnp.asarray(leaf, name), leaf.dtype)

  return jax.tree.map(one, gradient)


def main() -> None:
  """Prints the table."""
  headings = ["data", "gradient", "closed form: SSIM > .9", "worst true / stated error", "seconds"]
  for name in _SEARCHES.value:
    headings += [f"{name}: SSIM > .9", "seconds"]
  print(markdown(headings, ()), end="", flush=True)
  for dataset in _DATASETS.value:
    for kind in _KINDS.value:
      print(markdown_row(_row(dataset, kind)), end="", flush=True)


def _row(dataset, kind):
  victims = data.load(f"samples:{dataset}", _BATCH_SIZE.value)
  images = data.normalize(victims.images, victims.statistics)
  model = models.create("mlp", images.shape[1:], victims.num_classes, _RATE.value)
  params = model.init(jax.random.key(0))
  seen, secret = observe(
    jax.random.key(100),
    model,
    params,
    images,
    victims.labels,
    statistics=victims.statistics,
    reveal_labels=False,
  )
  seen = dataclasses.replace(seen, gradient=spoil(kind, seen.gradient))

  def above(candidate, **options):
    scores = evaluation.evaluate(model, secret, candidate, victims.statistics, **options).scores
    return f"{sum((score['ssim'] or 0) > _FOUND for score in scores)}/{len(scores)}"

  closed_form.recover(jax.random.key(1), model, seen)  # compiles
  start = time.monotonic()
  recovery = closed_form.recover(jax.random.key(1), model, seen)
  seconds = time.monotonic() - start
  parts = recovery.parts
  candidate = attacks.Candidate(parts.images, parts.masks, None)
  errors = [
    float(np.sqrt(np.mean((np.asarray(secret.images) - image) ** 2, axis=(1, 2, 3)).min()) / stated)
    for image, stated in zip(np.asarray(parts.images), recovery.error, strict=True)
    if np.isfinite(stated)
  ]
  worst = f"{max(errors):.2f}" if errors else "-"
  cells = [dataset, kind, above(candidate, found=parts.verdict > 0), worst, f"{seconds:.2f}"]
  for name in _SEARCHES.value:
    attack = attacks.create(name, model, labels="recovered", max_iterations=_ITERATIONS.value)
    given = recovery if name == "hybrid" else None
    attacks.solve(jax.random.key(2), attack, seen, recovery=given, seconds=0.1)  # compiles
    start = time.monotonic()
    state = attacks.solve(jax.random.key(2), attack, seen, recovery=given)
    cells += [above(state.best.candidate), f"{time.monotonic() - start:.1f}"]
  return cells


if __name__ == "__main__":
  launch(main)
