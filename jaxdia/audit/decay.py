"""Weight decay in an update: a part of the params that is no gradient."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxdia.audit.schema import Finding
from jaxdia.client import Observation
from jaxdia.core.trees import Path, leaves_by_path
from jaxdia.core.types import Gradient
from jaxdia.gradients import layer_gradient
from jaxdia.models import DropoutModel

# A vector of a gradient is decayed params if these leave no more of it than this share ...
_FITS = 0.05
# ... and it has so many entries that this is no chance.
_LEAST_ENTRIES = 8
# So many rows or columns of kernels must be, of one and the same decay.
_LEAST_VECTORS = 2

_Pair = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]


class _Leaf(NamedTuple):
  """A leaf of the gradient that was sent, f64, and of the params."""

  path: Path
  gradient: np.ndarray
  params: np.ndarray


def find_decay(
  model: DropoutModel, observation: Observation, rounding: float
) -> tuple[Finding, Gradient] | None:
  """Finds params in a gradient where it would be zero but for them, and takes them out.

  It would be in rows and columns of units that were dropped, whatever the loss; and in the sum of
  a classifier's kernel over the classes, if the loss is the cross-entropy.

  Args:
    model: the network.
    observation: of an update.
    rounding: share of the gradient that rounding changed.
  """
  params = leaves_by_path(observation.params)
  leaves = [
    _Leaf(path, *(np.asarray(x, np.float64) for x in (leaf, params[path])))
    for path, leaf in leaves_by_path(observation.gradient).items()
  ]
  decay = _of_dropped(leaves) or _of_classifier(model, observation, rounding)
  if decay is None:
    return None
  all_leaves = _is_everywhere(model, observation, leaves, decay, rounding)
  text = (
    f"the update holds {decay:.3g} times the weights{'' if all_leaves else ' of kernels alone'}, as"
    " weight decay of that size leaves there; it is taken out."
  )

  def without(leaf, weight):
    if leaf is None or (np.ndim(leaf) < 2 and not all_leaves):
      return leaf
    return _without(leaf, decay, weight, rounding)

  gradient = jax.tree.map(
    without, observation.gradient, observation.params, is_leaf=lambda leaf: leaf is None
  )
  return Finding(name="weight decay", effect="mended", text=text, value=decay), gradient


def _without(leaf, decay: float, weight, rounding: float) -> np.ndarray:
  """Returns a gradient without decayed weights; what is left of them by rounding is 0."""
  decayed = decay * np.asarray(weight, np.float64)
  rest = np.asarray(leaf, np.float64) - decayed
  rest[np.abs(rest) <= rounding * np.abs(decayed)] = 0
  return rest.astype(leaf.dtype)


def _of_dropped(leaves: list[_Leaf]) -> float | None:
  """Returns the decay by rows and columns of kernels that are nothing but decayed params."""
  found = [np.zeros(0)]
  for leaf in leaves:
    if leaf.gradient.ndim < 2:
      continue
    g, w = (x.reshape(-1, x.shape[-1]) for x in (leaf.gradient, leaf.params))
    for axis in (0, 1):
      if g.shape[axis] < _LEAST_ENTRIES:
        continue
      size = np.sum(w * w, axis=axis)
      decays = np.sum(g * w, axis=axis) / np.where(size > 0, size, 1)
      left = np.linalg.norm(g - np.expand_dims(decays, axis) * w, axis=axis)
      found.append(decays[(decays != 0) & (left <= _FITS * np.abs(decays) * np.sqrt(size))])
  decays = np.concatenate(found)
  if decays.size < _LEAST_VECTORS:
    return None
  decay = float(np.median(decays))
  near = np.abs(decays - decay) <= _FITS * abs(decay)
  return decay if np.sum(near) >= max(_LEAST_VECTORS, decays.size / 2) else None


def _of_classifier(model: DropoutModel, observation: Observation, rounding: float) -> float | None:
  """Returns the decay by the classifier, whose own entries cancel over the classes."""
  if model.classifier is None or observation.loss.kind != "cross_entropy":
    return None
  g, w = (
    layer_gradient(tree, model.classifier).get("kernel")
    for tree in (observation.gradient, observation.params)
  )
  if g is None or w is None:
    return None
  kernel = np.asarray(g, np.float64)
  left, weights = kernel.sum(axis=1), np.asarray(w, np.float64).sum(axis=1)
  size = np.linalg.norm(np.abs(kernel).sum(axis=1))
  if not weights.any() or np.linalg.norm(left) < 3 * rounding * size:
    return None
  decay = float(left @ weights / (weights @ weights))
  return decay if np.linalg.norm(left - decay * weights) <= _FITS * np.linalg.norm(left) else None


def _is_everywhere(model, observation, leaves: list[_Leaf], decay: float, rounding: float) -> bool:
  """Returns whether biases and scales decay too, as it shows; True where it does not."""
  vectors = [leaf for leaf in leaves if leaf.gradient.ndim < 2]
  # Of units that were dropped there is nothing else.
  here, nothing = 0, 0
  for leaf in vectors:
    decayed = decay * leaf.params
    is_near = np.abs(leaf.gradient - decayed) <= _FITS * np.abs(decayed)
    here += int(np.sum(is_near & (decayed != 0)))
    nothing += int(np.sum((leaf.gradient == 0) & (decayed != 0)))
  if nothing:
    return here > nothing
  pairs = [*_of_classifier_bias(model, observation, decay, rounding), *_of_norms(leaves, decay)]
  for left, decayed in pairs:
    size = np.linalg.norm(decayed)
    for everywhere, rest in ((True, left - decayed), (False, left)):
      if size > 0 and np.linalg.norm(rest) <= _FITS * size:
        return everywhere
  return True


def _of_classifier_bias(model, observation, decay: float, rounding: float) -> Iterator[_Pair]:
  """Yields what of a classifier's bias does not cancel, and what decay would leave there."""
  if model.classifier is None or observation.loss.kind != "cross_entropy":
    return
  g, w = (
    layer_gradient(tree, model.classifier).get("bias")
    for tree in (observation.gradient, observation.params)
  )
  if g is not None and w is not None:
    g, decayed = np.asarray(g, np.float64), decay * np.sum(np.asarray(w, np.float64))
    if abs(decayed) > 3 * rounding * np.sum(np.abs(g)):
      yield np.array([np.sum(g)]), np.array([decayed])


def _of_norms(leaves: list[_Leaf], decay: float) -> Iterator[_Pair]:
  """Yields what of a normalisation before a dense layer does not cancel, and decayed params.

  If `z = (γ x + β) W`, then Σ_k W_ik dW_ik = γ_i dγ_i + β_i dβ_i of each input i.
  """
  by_path = {leaf.path: leaf for leaf in leaves}
  for scale in leaves:
    shift = by_path.get((*scale.path[:-1], "bias"))
    if scale.gradient.ndim != 1 or scale.path[-1] == "bias" or shift is None:
      continue
    own = scale.params * scale.gradient + shift.params * shift.gradient
    decayed = decay * (scale.params**2 + shift.params**2)
    for kernel in leaves:
      if kernel.gradient.ndim == 2 and len(kernel.gradient) == len(own):
        gradient = kernel.gradient - decay * kernel.params
        yield own - np.sum(kernel.params * gradient, axis=1), decayed
