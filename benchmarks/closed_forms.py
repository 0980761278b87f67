"""What the closed forms recover, in what time, and what DIA reaches in the same time.

python benchmarks/closed_forms.py                            # all cases, samples
python benchmarks/closed_forms.py --cases=mlp:cifar10:8:0.1 --source=npz:victims.npz
python benchmarks/closed_forms.py --cases=mlp:cifar10:8:0.0 --activation=relu
"""

import dataclasses
import time

import jax
import numpy as np
from absl import flags

from jaxdia import attacks, closed_form, data, evaluation, models
from jaxdia.client import observe
from jaxdia.command_line import launch
from jaxdia.core.errors import InputError
from jaxdia.experiment.table import markdown, markdown_row
from jaxdia.gradients import prepare

_VIT = [f"vit:{d}:1:{p}" for d in ("cifar10", "mnist") for p in (0.1, 0.25, 0.5, 0.75)]
_MLP = [
  f"mlp:{dataset}:{size}:{rate}"
  for dataset in ("cifar10", "mnist")
  for size, rates in ((8, (0.1, 0.25, 0.5, 0.75)), (16, (0.25, 0.5, 0.75)))
  for rate in rates
]
_CASES = flags.DEFINE_list("cases", _VIT + _MLP, "MODEL:DATASET:BATCH_SIZE:DROPOUT_RATE, ...")
_SOURCE = flags.DEFINE_string(
  "source", None, "Where the images come from, as in config.data.source; DATASET is put for {}."
)
_BATCHES = flags.DEFINE_integer("batches", 2, "Batches of a case, each with its own masks.", 1)
_ACTIVATION = flags.DEFINE_string(
  "activation", None, "Of the MLP, in place of the paper's GELU: relu or leaky_relu."
)
_DIA = flags.DEFINE_bool("dia", True, "Whether to run DIA for as long.")

_HEADINGS = (
  *("network", "data", "batch", "p", "images", "MSE < 1e-3", "worst MSE", "first site"),
  *("known sites", "labels", "seconds a batch", "DIA: median MSE", "MSE < 1e-3"),
)


def main() -> None:
  """Prints the table."""
  print(markdown(_HEADINGS, ()), end="", flush=True)
  for case in _CASES.value:
    _run(*case.split(":"))


def _victims(name, dataset, size, rate):
  source = (_SOURCE.value or "samples:{}").replace("{}", dataset)
  count = size * _BATCHES.value
  image_size = 224 if dataset == "imagenet" else None
  try:
    victims = data.load(source, count, image_size=image_size, statistics=dataset)
  except InputError:  # fewer images: the batches overlap, their masks differ
    victims = data.load(source, size, image_size=image_size, statistics=dataset)
  images = data.normalize(victims.images, victims.statistics)
  options = {"activation": _ACTIVATION.value} if _ACTIVATION.value else {}
  model = models.create(name, images.shape[1:], victims.num_classes, rate, **options)
  params = jax.jit(model.init)(jax.random.key(0))
  pairs = []
  for i in range(_BATCHES.value):
    batch = np.arange(i * size, (i + 1) * size) % len(images)
    key = jax.random.key(100 + i)
    labels = victims.labels[batch]
    statistics = victims.statistics
    pairs.append(observe(key, model, params, images[batch], labels, statistics=statistics))
  return model, victims, *zip(*pairs, strict=True)


def _run(name, dataset, size, rate):
  size, rate = int(size), float(rate)
  model, victims, observations, secrets = _victims(name, dataset, size, rate)
  hidden = [dataclasses.replace(o, labels=None) for o in observations]
  closed_form.recover(jax.random.key(0), model, hidden[0])  # compiles
  scores, seconds = [], []
  for observation, secret in zip(hidden, secrets, strict=True):
    start = time.monotonic()
    recovery = closed_form.recover(jax.random.key(1), model, observation)
    seconds.append(time.monotonic() - start)
    parts = recovery.parts
    candidate = attacks.Candidate(parts.images, parts.masks, None)
    scores += evaluation.evaluate(
      model,
      secret,
      candidate,
      victims.statistics,
      parts.labels,
      found=parts.verdict > 0,
      known_masks=parts.known_masks,
    ).scores
  mean = float(np.mean(seconds))
  first, masks = [], []
  for score in scores:
    sites = score["mask_accuracy_by_site"] or {}
    first.append(sites.get(model.sites[0].name, 0.0) if model.sites else np.nan)
    masks.append((score["mask_accuracy"] or 0.0) if model.sites else np.nan)
  mse = [np.inf if s["mse_normalized"] is None else s["mse_normalized"] for s in scores]
  dia = ["-", "-"]
  if _DIA.value:
    other = _dia(model, victims, observations[0], secrets[0], mean)
    dia = [f"{np.median(other):.2g}", f"{np.sum(np.asarray(other) < 1e-3)}/{len(other)}"]
  cells = [
    *(name, dataset, str(size), str(rate), str(len(scores))),
    f"{np.sum(np.asarray(mse) < 1e-3)}/{len(mse)}",
    f"{max(mse):.1e}",
    f"{np.mean(first):.3%}",
    f"{np.mean(masks):.3%}",
    f"{np.mean([s['label_accuracy'] for s in scores]):.0%}",
    f"{mean:.3g}",
    *dia,
  ]
  print(markdown_row(cells), end="", flush=True)


def _dia(model, victims, observation, secret, seconds):
  """Returns the MSE of DIA, which is given the labels, after so many seconds, at least one step."""
  attack = attacks.dia(model)
  prepared = prepare(model, observation)
  step = jax.jit(attack.step)
  state = jax.jit(attack.init)(jax.random.key(2), observation)
  jax.block_until_ready(step(prepared, state))  # compiles
  start = time.monotonic()
  while True:
    state = jax.block_until_ready(step(prepared, state)[0])
    if time.monotonic() - start >= seconds or int(state.status) != attacks.Status.RUNNING:
      break
  scores = evaluation.evaluate(model, secret, state.best.candidate, victims.statistics).scores
  return [score["mse_normalized"] for score in scores]


if __name__ == "__main__":
  launch(main)
