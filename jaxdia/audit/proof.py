"""What was found of a batch, held against the update."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation, client_gradient
from jaxdia.client.defences import Step
from jaxdia.core.types import Images, Labels, Masks
from jaxdia.models import DropoutModel


class Proof(NamedTuple):
  """A result held against the update: the gradient that it would have caused.

  Attributes:
    residual: share of the update that is left when that gradient is taken out, at the factor that
      leaves least.
    factor: that factor.
    of_sent: the same share of the entries that are not zero, as of an update that was pruned.
  """

  residual: float
  factor: float
  of_sent: float


def prove(
  model: DropoutModel, observation: Observation, masks: Masks | None, images: Images, labels: Labels
) -> Proof:
  """Computes what a client would send of what was found, and compares it with the update.

  Args:
    model: the network.
    observation: the update.
    masks: of the step, or of all local steps; None is the evaluation mode.
    images: f[B, H, W, C], normalised.
    labels: i[B] classes, or f[B, num_classes] probabilities.
  """
  simulated = _simulate(model, observation, masks, jnp.asarray(images), jnp.asarray(labels))
  sent, other = (
    np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)])
    for gradient in (observation.gradient, simulated)
  )
  residual, factor = _compare(sent, other)
  of_sent, _ = _compare(sent[sent != 0], other[sent != 0])
  return Proof(residual, factor, of_sent)


def _compare(sent: np.ndarray, simulated: np.ndarray) -> tuple[float, float]:
  """Returns the share of one gradient that another leaves, and the factor that leaves least."""
  size = float(simulated @ simulated)
  factor = float(sent @ simulated) / size if size > 0 else 0.0
  left = float(np.sum((sent - factor * simulated) ** 2))
  residual = math.sqrt(left / float(sent @ sent)) if math.isfinite(left) else math.inf
  return residual, factor


@jax.jit
def _simulate(model, observation, masks, images, labels):
  """Returns what the client would send, as far as its defence can be foreseen."""
  step = (model, observation.params, masks, images, labels, observation.loss)
  sent, own = observation.gradient, client_gradient(*step, observation.local)
  # Of a frozen layer nothing was sent.
  own = jax.tree.map(lambda x, y: y if x is not None else None, sent, own, is_leaf=_is_none)
  return observation.defence.adapt(own, sent, Step(*step))


def _is_none(leaf: Any) -> bool:
  return leaf is None
