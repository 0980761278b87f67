"""What an experiment is about to attempt, for a person to read."""

import jax
import numpy as np

from jaxdia.experiment.clients import Clients
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.network import common_rate


def describe(settings: ExperimentSettings, clients: Clients, lanes: int, devices: int) -> str:
  """Returns what is about to be attempted, for a person to read.

  Args:
    settings: of the experiment.
    clients: that are attacked.
    lanes: trials of a search that a device runs at once.
    devices: number of devices that share the trials.
  """
  d, model = settings.data, clients.model
  size = d.batch_size
  gradient = sum(leaf.size for leaf in jax.tree.leaves(clients.params))
  masks = sum(int(np.prod(shape)) for shape in model.mask_shapes(size).values())
  pixels = size * int(np.prod(model.image_shape))
  shape = "x".join(str(n) for n in model.image_shape)
  device = jax.local_devices()[0]
  lines = [
    f"jaxdia: {d.count} images of {d.source} ({shape}) in {d.batches} batches of {size}",
    f"  model    {settings.model.name}, dropout rate {common_rate(model):g} at {len(model.sites)}"
    " sites, random weights",
    "  threat   an honest-but-curious server knows the weights, the dropout rates and one"
    " client gradient",
    f"  known    {gradient:,} gradient entries a batch",
  ]
  for name, attack in settings.attacks.items():
    unknowns = [f"{pixels:,} pixels"]
    if attack.masks == "free":
      unknowns.append(f"{masks:,} mask entries")
    if attack.labels != "given":
      unknowns.append(f"{size} labels")
    assumed = {
      "expected": "no dropout assumed",
      "known": "the client's masks are given to it",
      "free": "masks searched",
    }[attack.masks]
    labels = {"given": "labels given", "recovered": "labels read from the gradient"}
    assumed += ", " + labels.get(attack.labels, "labels searched")
    assumed = {
      "none": assumed,
      "first": "what linear algebra gives is fixed, the rest searched",
      "only": "linear algebra alone, nothing searched",
    }[attack.closed_form]
    lines.append(f"  {name:11} unknown: {' + '.join(unknowns)} ({assumed})")
  searches = any(attack.closed_form != "only" for attack in settings.attacks.values())
  gradients = f"{d.gradients} gradient{'s' * (d.gradients > 1)}"
  lines.append(
    f"  run      {gradients} x {settings.restarts} trials, {lanes} lanes on each of"
    f" {devices} {device.platform} device(s) ({device.device_kind})"
    if searches
    else f"  run      {gradients}, each once"
  )
  return "\n".join(lines)
