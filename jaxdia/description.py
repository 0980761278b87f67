"""What an experiment is about to attempt, for a person to read."""

import jax
import numpy as np

from jaxdia.client import Observation
from jaxdia.config import ExperimentSettings
from jaxdia.models import DropoutModel


def describe(
  settings: ExperimentSettings,
  model: DropoutModel,
  observation: Observation,
  lanes: int,
  devices: int,
) -> str:
  """Returns what is about to be attempted, for a person to read.

  Args:
    settings: of the experiment.
    model: the client's network.
    observation: one of those that are attacked.
    lanes: trials that a device runs at once.
    devices: number of devices that share the trials.
  """
  d, size = settings.data, settings.data.batch_size
  batches = d.count // size
  gradient = sum(leaf.size for leaf in jax.tree.leaves(observation.gradient))
  masks = sum(int(np.prod(shape)) for shape in model.mask_shapes(size).values())
  pixels = size * int(np.prod(model.image_shape))
  shape = "x".join(str(n) for n in model.image_shape)
  device = jax.local_devices()[0]
  lines = [
    f"jaxdia: {d.count} images of {d.source} ({shape}) in {batches} batches of {size}",
    f"  model    {settings.model['name']}, dropout rate {settings.model['dropout_rate']} at"
    f" {len(model.sites)} sites, random weights",
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
  lines.append(
    f"  run      {batches} x {settings.restarts} trials, {lanes} lanes on each of"
    f" {devices} {device.platform} device(s) ({device.device_kind})"
  )
  return "\n".join(lines)
