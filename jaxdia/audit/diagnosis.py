"""What is wrong with an update, found before anything is tried on it.

A gradient of one training step has marks of its own: its rank, the sum and the signs of the
classifier's entries, the zeros that dropout leaves. Where an update lacks them it is not what it
was said to be, and mostly the marks tell what it is.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxdia.audit.decay import find_decay
from jaxdia.audit.mode import find_mode, mode_finding
from jaxdia.audit.optimizers import find_signs
from jaxdia.audit.schema import Finding
from jaxdia.client import Observation
from jaxdia.closed_form import is_turned
from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path, leaves_by_path, with_leaves
from jaxdia.core.types import Gradient
from jaxdia.gradients import find_rounding, layer_gradient
from jaxdia.models import DropoutModel
from jaxdia.updates.gradients import MUCH_ROUNDING

# Rounding of float32, and of what JAX computes in it.
_SINGLE = 1e-6
# Singular values below this share of the largest are rounding.
_RANK = 1e-5
TURNED = Finding(
  name="sign",
  effect="mended",
  text="the update has the opposite sign of a gradient, as new weights minus old ones have; it is"
  " turned.",
)


class Diagnosis(NamedTuple):
  """An update that was put right as far as that is possible.

  Attributes:
    observation: what the attacks are shown.
    findings: what was seen.
    rounding: share of the gradient that rounding may have changed.
    training: whether dropout was on, as it shows; as it was said to be where it does not.
    mode_shows: whether it shows.
  """

  observation: Observation
  findings: list[Finding]
  rounding: float
  training: bool
  mode_shows: bool

  @property
  def stops(self) -> bool:
    """Whether there is no gradient to be attacked."""
    return any(finding.effect == "stops" for finding in self.findings)


def diagnose(
  model: DropoutModel, observation: Observation, rounding: float = 0.0, *, training: bool = True
) -> Diagnosis:
  """Looks for what an update has besides, or instead of, the gradient of one training step.

  Args:
    model: the network.
    observation: with the gradient as it was sent.
    rounding: share of it that is known to be rounding, as of weights of few bits.
    training: whether dropout is said to have been on.

  Returns:
    The observation, put right, and what was found.

  Raises:
    InputError: no layer of the gradient can be used, or weights are not finite.
  """
  gradient, findings = _usable(observation)
  kind, level = find_rounding(gradient)
  rounding = max(rounding, level, _SINGLE)
  findings += _precision(kind, rounding)
  one_step = observation.local is None  # of which the others know what it looks like
  for look in (find_decay, find_signs, _sign, _rank) if one_step else (_sign,):
    here = dataclasses.replace(observation, gradient=gradient)
    found = look(model, here, rounding)
    if found is not None:
      finding, gradient = found
      findings.append(finding)
  observation = dataclasses.replace(observation, gradient=gradient)
  if one_step and not {"several steps", "noise"} & {finding.name for finding in findings}:
    on, reason = find_mode(model, observation, rounding)
    if on is not None and on != training:
      findings.append(mode_finding(on, reason))
    return Diagnosis(
      observation, findings, rounding, training if on is None else on, on is not None
    )
  return Diagnosis(observation, findings, rounding, training, False)


def _name(path: Path) -> str:
  return "/".join(path)


def _usable(observation: Observation) -> tuple[Gradient, list[Finding]]:
  """Leaves out what holds no information, as if it were frozen."""
  leaves, params = leaves_by_path(observation.gradient), leaves_by_path(observation.params)
  paths = list(params)
  for path in paths:
    if not np.isfinite(np.asarray(params[path])).all():
      raise InputError(
        f"the weights {_name(path)} have NaN or infinite entries; expected those that the server"
        " sent, with which the network can be computed."
      )
  broken = [p for p, leaf in leaves.items() if not np.isfinite(np.asarray(leaf)).all()]
  zero = [p for p, leaf in leaves.items() if not np.any(np.asarray(leaf))]
  left_out = {
    "frozen layer": (
      [path for path in paths if path not in leaves],
      "there is no update of {}, or it is exactly zero: taken as frozen; the rest is audited.",
    ),
    "not finite": (broken, "{} has NaN or infinite entries, and is left out."),
    "zero layer": (
      zero,
      "the gradient of {} is zero throughout: frozen, or no image of the batch reached it. It is"
      " left out.",
    ),
  }
  findings = []
  for name, (which, text) in left_out.items():
    if which:
      shown = ", ".join(map(_name, which[:4]))
      shown += f" and {len(which) - 4} more" * (len(which) > 4)
      effect = "noted" if name == "frozen layer" else "mended"
      findings.append(Finding(name=name, effect=effect, text=text.format(shown)))
  kept = {path: None if path in (*broken, *zero) else leaves.get(path) for path in paths}
  if all(leaf is None for leaf in kept.values()):
    raise InputError(
      "the update is zero or not finite in every layer, so there is nothing to audit. If it was"
      " made of weights, those before and after may be the same file."
    )
  return with_leaves(observation.params, kept), findings


def _precision(kind: str | None, rounding: float) -> list[Finding]:
  """Says of how few bits an update is, by its values or by those that it was made of."""
  if kind is None and rounding <= MUCH_ROUNDING:
    return []
  name = "rounding" if kind is None else "half precision"
  what = "the numbers that were sent are coarse" if kind is None else f"all values fit into {kind}"
  text = (
    f"{what}: rounding changed {rounding:.1e} of the gradient, which linear algebra allows for."
    " What it finds is no more exact than that."
  )
  return [Finding(name=name, effect="noted", text=text, value=rounding)]


def _sign(model, observation, rounding):
  del rounding
  if not is_turned(model, observation):
    return None
  return TURNED, negative(observation).gradient


def negative(observation: Observation) -> Observation:
  """Returns an observation with its gradient turned.

  Args:
    observation: of an update.
  """
  gradient = jax.tree.map(lambda leaf: -leaf, observation.gradient)
  return dataclasses.replace(observation, gradient=gradient)


def tells_sign(model: DropoutModel, observation: Observation) -> bool:
  """Returns whether the bias of the classifier tells which sign is right.

  Args:
    model: the network.
    observation: of an update.
  """
  return is_turned(model, observation) or is_turned(model, negative(observation))


def _rank(model, observation, rounding):
  """Finds what is of more images than were named, by the rank of a dense layer's gradient."""
  for layer in model.dense(observation.batch_size):
    kernel = layer_gradient(observation.gradient, layer.path).get("kernel")
    most = sum(layer.rows)
    if kernel is None or min(kernel.shape) <= most:
      continue
    values = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    rank = int(np.sum(values > max(_RANK, 3 * rounding) * values[0]))
    if rank <= most:
      continue
    name, beyond = _name(layer.path), float(np.linalg.norm(values[most:]) / np.linalg.norm(values))
    text = (
      f"the gradient of {name} has rank {rank}; one step on {observation.batch_size} image(s) gives"
      f" at most {most}, and {beyond:.1e} of it lies outside. "
    )
    if rank < min(kernel.shape):
      text += (
        f"It is a sum over more images, of at least {-(-rank // most)} steps of that batch: several"
        " local steps, a larger batch, or momentum from rounds before. Linear algebra does not"
        " apply to it as it stands."
      )
      return Finding(name="several steps", effect="noted", text=text, value=rank), (
        observation.gradient
      )
    text += (
      "No rank is higher: it holds noise, was pruned or quantised, or is a sum over at least"
      f" {rank} rows, as of a larger batch or many steps; or an adaptive optimiser such as Adam"
      " divided its entries."
    )
    return Finding(name="noise", effect="noted", text=text, value=beyond), observation.gradient
  return None
