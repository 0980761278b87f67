"""What is wrong with an update, found before anything is tried on it.

A gradient of one training step has marks of its own: its rank, the sum and the signs of the
classifier's entries, the zeros that dropout leaves. Where an update lacks them it is not what it
was said to be, and mostly the marks tell what it is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdia.audit.schema import Finding
from jaxdia.client import Observation
from jaxdia.closed_form import find_chain, is_turned
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
# Where no dropped unit is seen, so many must have been expected: e^-20 is chance enough.
_EXPECTED_ZEROS = 20
# Sizes of the entries of Adam's first update differ by less than this share.
_EQUAL = 0.02
# What should cancel does to this share of its terms.
_CANCELS = 1e-4
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
  """

  observation: Observation
  findings: list[Finding]
  rounding: float
  training: bool

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
  for look in (_equal_sizes, _weight_decay, _sign, _rank) if one_step else (_sign,):
    here = dataclasses.replace(observation, gradient=gradient)
    found = look(model, here, rounding)
    if found is not None:
      finding, gradient = found
      findings.append(finding)
  observation = dataclasses.replace(observation, gradient=gradient)
  if one_step and not {"several steps", "noise"} & {finding.name for finding in findings}:
    on, finding = _mode(model, observation, rounding)
    if on is not None and on != training:
      findings.append(finding)
      training = on
  return Diagnosis(observation, findings, rounding, training)


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


def _equal_sizes(model, observation, rounding):
  """Finds updates of which Adam, or a sign, left only the signs."""
  del model, rounding
  largest = max(jax.tree.leaves(observation.gradient), key=lambda leaf: leaf.size)
  sizes = np.abs(np.asarray(largest, np.float64))
  sizes = sizes[sizes > 0]
  if sizes.size < 20:
    return None
  low, middle, high = np.quantile(sizes, (0.1, 0.5, 0.9))
  if high - low > _EQUAL * middle:
    return None
  text = (
    f"nearly all entries that changed did so by the same amount ({middle:.2e}): this is the first"
    " step of Adam, or the sign of a gradient, and not the gradient. It tells the signs alone."
    " Audit what went into the optimiser instead, if you have it."
  )
  return Finding(name="adam", effect="stops", text=text, value=float(middle)), observation.gradient


def _weight_decay(model, observation, rounding):
  """Finds params in the gradient by the classifier, whose own entries cancel over the classes."""
  if model.classifier is None or observation.loss.kind != "cross_entropy":
    return None
  g, w = (
    layer_gradient(tree, model.classifier) for tree in (observation.gradient, observation.params)
  )
  if "kernel" not in g:
    return None
  kernel, weight = (np.asarray(layer["kernel"], np.float64) for layer in (g, w))
  left, weights = kernel.sum(axis=1), weight.sum(axis=1)
  size = np.linalg.norm(np.abs(kernel).sum(axis=1))
  if not weights.any() or np.linalg.norm(left) < max(_CANCELS, 3 * rounding) * size:
    return None
  decay = float(left @ weights / (weights @ weights))
  if np.linalg.norm(left - decay * weights) > 0.05 * np.linalg.norm(left):
    return None
  # Of units that were dropped nothing else is there, and they tell it to the last bit.
  every = [
    (np.asarray(g, np.float64).ravel(), np.asarray(w, np.float64).ravel())
    for g, w in _with_params(observation)
  ]
  ratios = np.concatenate([g[w != 0] / w[w != 0] for g, w in every])
  near = ratios[np.abs(ratios - decay) < 1e-3 * abs(decay)]
  decay = float(np.median(near)) if near.size else decay
  text = (
    f"the update holds {decay:.3g} times the weights, as weight decay of that size leaves there; it"
    " is taken out."
  )
  gradient = jax.tree.map(
    lambda leaf, weight: None if leaf is None else _without(leaf, decay, weight, rounding),
    observation.gradient,
    observation.params,
    is_leaf=lambda leaf: leaf is None,
  )
  return Finding(name="weight decay", effect="mended", text=text, value=decay), gradient


def _with_params(observation: Observation) -> list[tuple[Any, Any]]:
  """Returns the leaves of a gradient that were sent, each with that of the params."""
  params = leaves_by_path(observation.params)
  return [(leaf, params[path]) for path, leaf in leaves_by_path(observation.gradient).items()]


def _without(leaf, decay: float, weight, rounding: float) -> np.ndarray:
  """Returns a gradient without decayed weights; what is left of them by rounding is 0."""
  decayed = decay * np.asarray(weight, np.float64)
  rest = np.asarray(leaf, np.float64) - decayed
  rest[np.abs(rest) <= rounding * np.abs(decayed)] = 0
  return rest.astype(leaf.dtype)


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
      f" {rank} rows, as of a larger batch or many steps."
    )
    return Finding(name="noise", effect="noted", text=text, value=beyond), observation.gradient
  return None


def _mode(model: DropoutModel, observation: Observation, rounding: float):
  """Tells from the zeros of dense layers whether dropout was on; None if they do not tell.

  A unit that a ReLU silences, or a pixel that is black, is zero without dropout too, and so may a
  few be of which another function gets a number far below 0.
  """
  try:
    chain = find_chain(model.network) if model.rates else None
  except InputError:  # of a network that cannot be computed in float64
    chain = None
  if chain is None:
    return None, None
  zeros, told, small, expected = 0, 0.0, 0, 0.0
  for i, (layer, source) in enumerate(zip(chain.layers, chain.inputs, strict=True)):
    kernel = layer_gradient(observation.gradient, layer.path).get("kernel")
    if source.site is None or kernel is None:
      continue
    sizes = np.linalg.norm(np.asarray(kernel, np.float64), axis=1)
    small += int(np.sum(sizes <= max(_RANK, 3 * rounding) * sizes.max()))
    here = layer.inputs * float(model.rates[source.site]) ** observation.batch_size
    expected += here
    if i > 0 and not chain.links[i - 1].silent:
      zeros, told = zeros + int(np.sum(sizes == 0)), told + here
  if zeros and 2 * zeros >= told:
    text = "units are zero as dropout leaves them: the gradient was computed in training mode."
    return True, Finding(name="training mode", effect="mended", text=text)
  if small or expected < _EXPECTED_ZEROS:
    return None, None
  text = (
    f"no unit is zero, where dropout would have dropped about {expected:.0f} in all images: the"
    " gradient was computed in evaluation mode. The audit goes on without dropout."
  )
  return False, Finding(name="evaluation mode", effect="mended", text=text)
