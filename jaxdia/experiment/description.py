"""What an experiment is about to attempt, for a person to read."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxdia.attacks import Attack
from jaxdia.client import defences, mask_shapes
from jaxdia.core.errors import InputError
from jaxdia.engine import Plan
from jaxdia.experiment import local, training
from jaxdia.experiment.clients import Clients
from jaxdia.experiment.config import ExperimentSettings
from jaxdia.experiment.network import common_rate
from jaxdia.experiment.training import DELTA

_MASKS = {
  "expected": "no dropout assumed",
  "known": "the client's masks are given to it",
  "free": "masks searched",
}
_LABELS = {"given": "labels given", "recovered": "labels read from the gradient"}


def describe(
  settings: ExperimentSettings,
  clients: Clients,
  attacks: Mapping[str, Attack],
  plans: Mapping[str, Plan],
) -> str:
  """Returns what is about to be attempted, for a person to read.

  Args:
    settings: of the experiment.
    clients: that are attacked.
    attacks: by name.
    plans: how the engine shares out each of them.
  """
  d, model = settings.data, clients.model
  gradient = sum(leaf.size for leaf in jax.tree.leaves(clients.params))
  shapes = mask_shapes(model, clients.local, d.batch_size)
  masks = sum(int(np.prod(shape)) for shape in shapes.values())
  pixels = d.batch_size * int(np.prod(model.image_shape))
  shape = "x".join(str(n) for n in model.image_shape)
  lines = [
    f"jaxdia: {d.count} images of {d.source} ({shape}) in {d.batches} batches of {d.batch_size}",
    f"  model    {settings.model.name}, dropout rate {common_rate(model):g} at {len(model.sites)}"
    " sites,"
    f" {training.describe(dataclasses.asdict(settings.training))}",
    "  threat   an honest-but-curious server knows the weights, the dropout rates and"
    f" {local.describe(dataclasses.asdict(settings.local)) or 'one client gradient'}",
    f"  known    {gradient:,} gradient entries a batch",
    f"  defence  {defences.describe(settings.defence)}{_privacy(settings.defence)}",
  ]
  for name, attack in attacks.items():
    unknowns = [f"{pixels:,} pixels"]
    if attack.masks == "free":
      unknowns.append(f"{masks:,} mask entries")
    if attack.labels != "given":
      unknowns.append(f"{d.batch_size} labels")
    is_ignored = settings.defence != defences.identity and attack.settings.defence == "ignored"
    assumptions = _assumptions(attack) + ", defence ignored" * is_ignored
    lines.append(f"  {name:11} unknown: {' + '.join(unknowns)} ({assumptions})")
  searches = [plan for plan in plans.values() if plan.lanes]
  what = f"{d.gradients} gradient{'s' * (d.gradients > 1)}"
  if searches:
    most = max(searches, key=lambda plan: plan.lanes)
    device = most.devices[0]
    what += (
      f" x {settings.restarts} trials, {most.lanes} lanes on each of {len(most.devices)}"
      f" {device.platform} device(s) ({device.device_kind})"
    )
  return "\n".join([*lines, f"  run      {what}{'' if searches else ', each once'}"])


def _privacy(defence: defences.Defence) -> str:
  """Returns what differential privacy a defence promises, if it does."""
  try:
    epsilon = defence.epsilon(DELTA)
  except InputError:  # nothing is installed that computes it
    return ""
  return f", ε = {epsilon:.3g} at δ = {DELTA:g} for this step" if epsilon < math.inf else ""


def _assumptions(attack: Attack) -> str:
  """Returns what an attack takes as given."""
  if not attack.max_iterations:
    return "linear algebra alone, nothing searched"
  if type(attack).recover is not Attack.recover:
    return "what linear algebra gives is fixed, the rest searched"
  return f"{_MASKS[attack.masks]}, {_LABELS.get(attack.labels, 'labels searched')}"
