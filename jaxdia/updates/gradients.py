"""Weights before and after a client's training, their difference or a gradient, as its gradient."""

from typing import Any, NamedTuple

import numpy as np

from jaxdia.core.errors import InputError, check_count, check_number
from jaxdia.core.trees import Path, leaves_by_path, with_leaves
from jaxdia.core.types import Gradient, Params
from jaxdia.updates.problems import listed

# A share of the gradient's norm that is worth a note.
MUCH_ROUNDING = 1e-3


class Update(NamedTuple):
  """The gradient that an update amounts to.

  Attributes:
    gradient: a tree like the params, float32, or float64 if what was sent is. None where a layer
      is frozen.
    frozen: paths of the leaves that are None: those that were not sent, and those of which the
      update is exactly zero in all entries.
    rounding: what the rounding of the numbers that were sent adds to the gradient, as a share of
      its norm: about the least residual that the truth itself has.
    assumed: what was assumed besides, each a sentence.
  """

  gradient: Gradient
  frozen: tuple[str, ...]
  rounding: float
  assumed: tuple[str, ...]

  @property
  def notes(self) -> tuple[str, ...]:
    """All that was assumed, and what limits what the gradient tells, each a sentence."""
    notes = list(self.assumed)
    if self.frozen:
      notes.append(
        f"there is no update of {listed(self.frozen)}, or it is exactly zero: taken as frozen"
        " layers."
      )
    if self.rounding > MUCH_ROUNDING:
      notes.append(
        f"the rounding of what was sent is {self.rounding:.1g} of the gradient, so nothing can be"
        " exact beyond that."
      )
    return tuple(notes)


def from_weights(
  before: Params,
  after: Params,
  learning_rate: float,
  *,
  local_steps: int = 1,
  weight_decay: float = 0.0,
) -> Update:
  """Returns the gradient of a client that sent its new weights: (before - after) / learning rate.

  This is the gradient of plain SGD. After several steps it is their mean, at weights that moved
  meanwhile, and so the gradient of no one batch.

  A leaf of which no entry has changed is taken as frozen. Its gradient may instead be zero, or
  lost in the rounding of the weights; but to leave that out loses little, while the zeros of a
  layer that is frozen would be taken for a gradient that it does not have.

  Args:
    before: the weights that the server sent, as `fit` gives them.
    after: those that the client sent back; leaves of frozen layers may be None.
    learning_rate: of the client. If it is not known, 1 gives the gradient but for a factor.
    local_steps: how often the client stepped.
    weight_decay: its coefficient, which adds `weight_decay * before` to the gradient of the loss;
      it is taken out.

  Raises:
    InputError: the trees do not fit, nothing has changed, or a setting is out of range.
  """
  pairs = _pairs(before, after)
  differences = {path: _wide(new) - _wide(old) for path, (old, new) in pairs.items()}
  errors = {path: _rounding(new) for path, (_, new) in pairs.items()}
  return _of_difference(before, differences, errors, learning_rate, local_steps, weight_decay)


def from_difference(
  before: Params,
  difference: Params,
  learning_rate: float,
  *,
  local_steps: int = 1,
  weight_decay: float = 0.0,
) -> Update:
  """Returns the gradient of a client that sent after - before, such as a DIFF of NVFlare.

  Args:
    before: the weights that the server sent, as `fit` gives them.
    difference: what the client sent; leaves of frozen layers may be None.
    learning_rate: as in `from_weights`.
    local_steps: as in `from_weights`.
    weight_decay: as in `from_weights`.

  Raises:
    InputError: the trees do not fit, all is zero, or a setting is out of range.
  """
  pairs = _pairs(before, difference)
  differences = {path: _wide(new) for path, (_, new) in pairs.items()}
  # The client rounded its new weights, as large as the old ones, and then their difference.
  errors = {path: _rounding(old) + _rounding(new) for path, (old, new) in pairs.items()}
  return _of_difference(before, differences, errors, learning_rate, local_steps, weight_decay)


def from_gradient(before: Params, gradient: Gradient, *, weight_decay: float = 0.0) -> Update:
  """Returns a gradient that was sent as such, without what weight decay added to it.

  Args:
    before: the weights that the server sent, as `fit` gives them.
    gradient: what the client sent; leaves of frozen layers may be None.
    weight_decay: as in `from_weights`.

  Raises:
    InputError: the trees do not fit, all is zero, or the weight decay is below 0.
  """
  pairs = _pairs(before, gradient)
  gradients = {path: _wide(new) for path, (_, new) in pairs.items()}
  errors = {path: _rounding(new) for path, (_, new) in pairs.items()}
  return _update(before, gradients, errors, weight_decay, [])


def _of_difference(before, differences, errors, learning_rate, local_steps, weight_decay) -> Update:
  rate = check_number("learning_rate", learning_rate, lambda x: x > 0, "a number above 0")
  steps = check_count("local_steps", local_steps, 1)
  notes = []
  if steps > 1:
    notes.append(
      f"the gradient is the mean of those of {steps} steps, whose weights are not the same."
    )
  gradients = {path: -leaf / (rate * steps) for path, leaf in differences.items()}
  errors = {path: error / (rate * steps) ** 2 for path, error in errors.items()}
  return _update(before, gradients, errors, weight_decay, notes)


def _update(before, gradients, errors, weight_decay, assumed) -> Update:
  """Returns the update of gradients f64 with the squares of their rounding errors, by path."""
  decay = check_number("weight_decay", weight_decay, lambda x: x >= 0, "a number of at least 0")
  leaves = leaves_by_path(before)
  moving = {path: leaf for path, leaf in gradients.items() if leaf.any()}
  if not moving:
    raise InputError(
      "the update is zero in all entries; expected one that a client's training has changed."
      " Compare the weights that the server sent with those that came back."
    )
  if decay:  # what decayed weights leave of units without gradient is rounding, and not a gradient
    moving = {path: leaf - decay * _wide(leaves[path]) for path, leaf in moving.items()}
    for path, leaf in moving.items():
      leaf[np.square(leaf) <= 16 * errors[path]] = 0
  rounding = np.sqrt(
    sum(np.nansum(errors[path]) for path in moving)
    / sum(np.nansum(np.square(leaf)) for leaf in moving.values())
  )
  is_double = any(np.asarray(leaf).dtype == np.float64 for leaf in leaves.values())
  dtype = np.float64 if is_double else np.float32
  gradient = with_leaves(
    before, {path: moving[path].astype(dtype) if path in moving else None for path in leaves}
  )
  frozen = tuple("/".join(path) for path in leaves if path not in moving)
  return Update(gradient, frozen, float(rounding), tuple(assumed))


def _pairs(before: Params, other: Any) -> dict[Path, tuple[np.ndarray, np.ndarray]]:
  """Returns the leaves of both trees by path, where the second has one."""
  old, new = leaves_by_path(before), leaves_by_path(other)
  for path, leaf in new.items():
    if path not in old or np.shape(leaf) != np.shape(old[path]):
      known = f"shape {np.shape(old[path])}" if path in old else "no such leaf"
      raise InputError(
        f"the leaf {'/'.join(path)!r} of the update has shape {np.shape(leaf)}; the weights before"
        f" have {known} there. Put both together by updates.fit of the same model."
      )
  return {path: (np.asarray(old[path]), np.asarray(leaf)) for path, leaf in new.items()}


def _wide(leaf: Any) -> np.ndarray:
  return np.asarray(leaf).astype(np.float64)


def _rounding(leaf: np.ndarray) -> np.ndarray:
  """Returns the variance of the error that rounding to the type of an array gives its entries."""
  return np.square(np.spacing(np.abs(leaf)).astype(np.float64)) / 12
