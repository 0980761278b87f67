"""What the closed forms recover, in what time, and what DIA reaches in the same time.

python benchmarks/closed_forms.py                            # all cases, samples
python benchmarks/closed_forms.py --cases=mlp:cifar10:8:0.1 --source=npz:victims.npz
python benchmarks/closed_forms.py --cases=mlp:cifar10:8:0.0 --activation=relu
python benchmarks/closed_forms.py --cases=mlp:digits:8:0.5 --train_steps=100   # on trained weights
"""

import dataclasses
import time

import jax
import numpy as np
from absl import flags

from jaxdia import attacks, closed_form, data, evaluation, models
from jaxdia.client import observe
from jaxdia.client.training import accuracy, train
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
_CASES = flags.DEFINE_list(
  "cases",
  _VIT + _MLP,
  "MODEL:DATASET:BATCH_SIZE:DROPOUT_RATE, ...; the data set digits is scikit-learn's, of which"
  " those are attacked that are not trained on.",
)
_SOURCE = flags.DEFINE_string(
  "source", None, "Where the images come from, as in config.data.source; DATASET is put for {}."
)
_BATCHES = flags.DEFINE_integer("batches", 2, "Batches of a case, each with its own masks.", 1)
_ACTIVATION = flags.DEFINE_string(
  "activation", None, "Of the MLP, in place of the paper's GELU: relu or leaky_relu."
)
_WIDTHS = flags.DEFINE_list(
  "widths",
  None,
  "Of the hidden layers of the MLP, which then have biases, in place of the paper's.",
)
_TRAIN_STEPS = flags.DEFINE_integer(
  "train_steps", 0, "Steps of Adam before, with dropout, on batches of 64 digits.", 0
)
_PRECISION = flags.DEFINE_enum(
  "precision", "float32", ("float32", "float64"), "That the client computes its gradient in."
)
_DIA = flags.DEFINE_bool("dia", True, "Whether to run DIA for as long.")

_HEADINGS = (
  *("network", "data", "batch", "p", "images", "MSE < 1e-3", "worst found", "first site"),
  *("known sites", "labels", "seconds a batch", "DIA: median MSE", "MSE < 1e-3"),
  *("median PSNR", "test accuracy"),
)


def main() -> None:
  """Prints the table."""
  print(markdown(_HEADINGS, ()), end="", flush=True)
  for case in _CASES.value:
    _run(*case.split(":"))


def _load(dataset, size):
  if dataset == "digits":
    return data.load("sklearn:digits/test", data.available("sklearn:digits/test"))
  source = (_SOURCE.value or "samples:{}").replace("{}", dataset)
  options = {"image_size": 224 if dataset == "imagenet" else None, "statistics": dataset}
  try:
    return data.load(source, size * _BATCHES.value, **options)
  except InputError:  # fewer images: the batches overlap, their masks differ
    return data.load(source, size, **options)


def _victims(name, dataset, size, rate):
  victims = _load(dataset, size)
  images = data.normalize(victims.images, victims.statistics)
  options = {"activation": _ACTIVATION.value} if _ACTIVATION.value else {}
  if _WIDTHS.value:
    options |= {"hidden_sizes": tuple(map(int, _WIDTHS.value)), "use_bias": True}
  model = models.create(name, images.shape[1:], victims.num_classes, rate, **options)
  params, reached = jax.jit(model.init)(jax.random.key(0)), np.nan
  if _TRAIN_STEPS.value:
    if dataset != "digits":
      raise InputError(f"--train_steps is for digits, not {dataset}, of which there are too few.")
    seen = data.load("sklearn:digits/train", data.available("sklearn:digits/train"))
    inputs = data.normalize(seen.images, seen.statistics)
    params = train(jax.random.key(1), model, params, inputs, seen.labels, _TRAIN_STEPS.value)
    reached = float(accuracy(model, params, images, victims.labels))
  params, images = jax.tree.map(lambda x: np.asarray(x, _PRECISION.value), (params, images))
  pairs = []
  for i in range(_BATCHES.value):
    batch = np.arange(i * size, (i + 1) * size) % len(images)
    key = jax.random.key(100 + i)
    labels = victims.labels[batch]
    statistics = victims.statistics
    with jax.enable_x64(_PRECISION.value == "float64"):
      pairs.append(observe(key, model, params, images[batch], labels, statistics=statistics))
  return model, victims, reached, *zip(*pairs, strict=True)


def _run(name, dataset, size, rate):
  size, rate = int(size), float(rate)
  model, victims, reached, observations, secrets = _victims(name, dataset, size, rate)
  hidden = [dataclasses.replace(o, labels=None) for o in observations]
  scores, seconds = [], []
  for observation, secret in zip(hidden, secrets, strict=True):
    # How many candidates are looked at together depends on the batch, and is compiled for.
    closed_form.recover(jax.random.key(1), model, observation)
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
  mse = [s["mse_normalized"] for s in scores if s["mse_normalized"] is not None]
  dia = ["-", "-"]
  if _DIA.value:
    other = _dia(model, victims, observations[0], secrets[0], mean)
    dia = [f"{np.median(other):.2g}", f"{np.sum(np.asarray(other) < 1e-3)}/{len(other)}"]
  cells = [
    *(name, dataset, str(size), str(rate), str(len(scores))),
    f"{np.sum(np.asarray(mse) < 1e-3)}/{len(scores)}",
    f"{max(mse, default=np.nan):.1e}",
    f"{np.mean(first):.3%}",
    f"{np.mean(masks):.3%}",
    f"{np.mean([s['label_accuracy'] for s in scores]):.0%}",
    f"{mean:.3g}",
    *dia,
    f"{np.median([s['psnr'] or 0.0 for s in scores]):.4g}",
    "-" if np.isnan(reached) else f"{reached:.1%}",
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
