"""What an experiment is about to attempt, for a person to read."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxdia.attacks import Attack
from jaxdia.client import defences, mask_shapes
from jaxdia.core.errors import InputError
from jaxdia.experiment import local, training
from jaxdia.experiment.clients import Clients
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.network import common_rate, count_weights
from jaxdia.experiment.training import DELTA


def describe(
  settings: ExperimentSettings,
  clients: Clients,
  attacks: Mapping[str, Attack],
  lanes: Mapping[str, int],
  where: str,
) -> str:
  """Returns what is about to be attempted, for a person to read.

  Args:
    settings: of the experiment.
    clients: that are attacked.
    attacks: by name.
    lanes: a device, of each of them; 0 of one that searches nothing.
    where: the devices, such as "2 cpu device(s)".
  """
  d, model = settings.data, clients.model
  shapes = mask_shapes(model, clients.local, d.batch_size)
  masks = sum(int(np.prod(shape)) for shape in shapes.values())
  pixels = d.batch_size * int(np.prod(model.image_shape))
  shape = "x".join(str(n) for n in model.image_shape)
  text = [
    f"jaxdia: {d.count} images of {d.source} ({shape}) in {d.batches} batches of {d.batch_size}",
    f"  model    {settings.model.name}, dropout rate {common_rate(model):g} at {len(model.sites)}"
    " sites,"
    f" {training.describe(dataclasses.asdict(settings.training))}",
    "  threat   an honest-but-curious server knows the weights, the dropout rates and"
    f" {local.describe(dataclasses.asdict(settings.local)) or 'one client gradient'}",
    f"  known    {count_weights(model):,} gradient entries a batch",
    f"  defence  {defences.describe(settings.defence)}{_privacy(settings.defence)}",
  ]
  for name, attack in attacks.items():
    unknowns = [f"{pixels:,} pixels"]
    if attack.masks == "free":
      unknowns.append(f"{masks:,} mask entries")
    if attack.labels != "given":
      unknowns.append(f"{d.batch_size} labels")
    is_ignored = settings.defence != defences.identity and attack.settings.defence == "ignored"
    assumptions = attack.assumptions + ", defence ignored" * is_ignored
    text.append(f"  {name:11} unknown: {' + '.join(unknowns)} ({assumptions})")
  most, what = max(lanes.values()), f"{d.gradients} gradient{'s' * (d.gradients > 1)}"
  if most:
    what += f" x {settings.restarts} trials, {most} lanes on each of {where}"
  rest = "" if most else ", each once"
  return "\n".join([*text, f"  run      {what}{rest}"])


def _privacy(defence: defences.Defence) -> str:
  """Returns what differential privacy a defence promises, if it does."""
  try:
    epsilon = defence.epsilon(DELTA)
  except InputError:  # nothing is installed that computes it
    return ""
  return f", ε = {epsilon:.3g} at δ = {DELTA:g} for this step" if epsilon < math.inf else ""
