"""The space of the rows that a layer multiplied, and sparse problems that share what it leaves out.

The gradient of a dense layer's kernel tells the space of its inputs. A row behind dropout lies in
it, so that what the space leaves out gives equations for what was dropped: of tokens (`tokens/`)
and of patches (`patch_rows.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.core.errors import InputError
from jaxdia.core.precision import full_precision
from jaxdia.core.trees import Path
from jaxdia.core.types import Array
from jaxdia.models.hooks import Hooks

# A row lies in the space if no more of it is outside, but for noise that is known to be larger.
OUTSIDE = 1e-4
# Singular values fall by so much, at least, where the space ends.
_LEAST_GAP = 3.0
# Steps of the splitting that solves linear programs for masks, and its step size.
_STEPS, _STEP_SIZE = 300, 0.1
# Random rows that show what lies between dropout and a dense layer, and how nearly they must fit.
_PROBES = 64
_FITS = 1e-3


class Span(NamedTuple):
  """The space of the rows that a layer multiplied, as its gradient tells it.

  Attributes:
    basis: f64[D, rank], orthonormal.
    complement: f64[D, left], orthonormal: what it leaves out.
    outside: share of a row that may lie outside of it for noise.
  """

  basis: Float[np.ndarray, "width rank"]
  complement: Float[np.ndarray, "width left"]
  outside: float

  def extended(self, directions: Float[np.ndarray, "width more"]) -> "Span":
    """Returns the space with more directions in it.

    Args:
      directions: f64[D, more]; of zeros there may be some.
    """
    basis = np.linalg.svd(np.concatenate([self.basis, _unit(directions)], axis=1))
    rank = int(np.sum(basis[1] > 1e-9))
    return Span(basis[0][:, :rank], basis[0][:, rank:], self.outside)


def find_span(gradients: list[Float[np.ndarray, "width _"]], most: int) -> Span | None:
  """Returns the space of the rows of layers that share them; None if it has no end.

  Args:
    gradients: f64[D, outputs] of their kernels.
    most: rows that there can be.
  """
  together = np.concatenate([_unit(g, None) for g in gradients], axis=1)
  if not np.isfinite(together).all() or not together.any():
    return None
  basis, values, _ = np.linalg.svd(together)
  values = np.maximum(values, values[0] * np.finfo(np.float64).eps)
  ends = min(most, len(values) - 1)
  ratios = values[:ends] / values[1 : ends + 1]
  rank = int(np.argmax(ratios)) + 1 if ends else 0
  if not rank or ratios[rank - 1] < _LEAST_GAP:
    return None
  noise = values[rank] * np.sqrt(np.mean(values[:rank] ** -2.0))
  return Span(basis[:, :rank], basis[:, rank:], max(OUTSIDE, 3 * float(noise)))


def solve_masks(
  projection: Float[Array, "width width"],
  candidates: Float[np.ndarray, "programs width"],
  weights: Float[np.ndarray, "programs width"],
) -> Float[np.ndarray, "programs width"]:
  """Returns what was dropped of candidates, in [0, 1]: the least weighted sums that fit the space.

  Args:
    projection: f[D, D], on what the space leaves out.
    candidates: f[K, D].
    weights: f[K, D].
  """
  count = len(candidates)
  given = pad_programs(16 if count > 1 else 1, candidates, weights)
  return np.asarray(_solve_masks(projection, *given))[:count]


def pad_programs(
  multiple: int, *columns: Float[np.ndarray, "programs width"]
) -> list[Float[np.ndarray, "padded width"]]:
  """Returns float32 arrays with rows of zeros behind, so that few programs are compiled.

  Args:
    multiple: of which the number of rows is made one.
    *columns: f[K, D] each.
  """
  count = len(columns[0])
  padding = [(0, -count % multiple), (0, 0)]
  return [np.pad(np.asarray(column, np.float32), padding) for column in columns]


def split(
  projection: Float[Array, "width width"],
  target: Float[Array, "programs width"],
  shrink: Callable[[Any], Any],
  steps: int,
) -> Float[Array, "programs width"]:
  """Solves programs by Douglas-Rachford splitting.

  Args:
    projection: f[D, D], on what a space leaves out.
    target: f[K, D], what the solutions are projected to.
    shrink: the proximal map of what is minimised, by one step.
    steps: of the splitting.

  Returns:
    f[K, D], as `shrink` gives them.
  """

  def step(z, _):
    x = shrink(z)
    y = 2 * x - z
    return z + y - y @ projection + target - x, None

  with full_precision():
    z, _ = jax.lax.scan(step, target, None, steps)
  return shrink(z)


@jax.jit
def _solve_masks(projection, candidates, weights):
  """Solves linear programs, in units of what is dropped times size."""
  scale = jnp.sqrt(jnp.mean(candidates**2, axis=1, keepdims=True))
  c = candidates / jnp.where(scale > 0, scale, 1)
  size, sign = jnp.abs(c) + 1e-12, jnp.sign(c)

  def box(z):
    return sign * jnp.clip(z * sign - _STEP_SIZE * weights / size, 0, size)

  with full_precision():
    target = c @ projection
  return split(projection, target, box, _STEPS) * sign / size


def find_normalisation(
  after: Callable[[Float[Array, "n width"]], Float[Array, "n width"]], width: int, name: str
) -> tuple[bool, Float[np.ndarray, " width"], Float[np.ndarray, " width"]]:
  """Finds the normalisation between rows and a layer, by random rows.

  Args:
    after: what the layer is given for rows, f[n, D] of f[n, D].
    width: of rows.
    name: of the layer, for the message.

  Returns:
    Whether there is one, its scale and its shift.

  Raises:
    InputError: something else lies between.
  """
  probes = jax.random.normal(jax.random.key(0), (_PROBES, width), jnp.float32)
  given = np.asarray(after(probes), np.float64)
  drawn = np.asarray(probes, np.float64)
  if np.linalg.norm(given - drawn) <= _FITS * np.linalg.norm(given):
    return False, np.ones(width), np.zeros(width)
  for rows in (drawn - drawn.mean(axis=1, keepdims=True), drawn):  # LayerNorm, RMSNorm
    rows = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
    moved, mean = rows - rows.mean(axis=0), given.mean(axis=0)
    scale = np.sum(moved * (given - mean), axis=0) / np.sum(moved**2, axis=0)
    shift = mean - scale * rows.mean(axis=0)
    if np.linalg.norm(given - rows * scale - shift) <= _FITS * np.linalg.norm(given):
      return True, scale, shift
  raise InputError(
    f"between dropout and the dense layer {name!r} lies more than a LayerNorm or RMSNorm, through"
    " which nothing is seen."
  )


def inputs_behind(
  call: Callable[[Hooks], Any], site: str, path: Path, rows: Float[Array, "n width"]
) -> Float[Array, "n width"]:
  """Returns what a layer is given where dropout gives rows.

  Args:
    call: calls a network on a batch of n, whatever is in it.
    site: of the dropout, which gives a row to all tokens.
    path: of the layer.
    rows: f[n, D].
  """
  seen: list[jax.Array] = []

  def on_site(call):
    if call.name != site:
      return call.inputs
    return jnp.broadcast_to(rows[:, None], call.inputs.shape)

  def on_linear(layer, inputs, outputs, nested):
    del nested
    if layer.path == path:
      seen.append(inputs)
    return outputs

  call(Hooks(on_site, on_linear))
  return seen[0][:, 0]


def _unit(matrix: np.ndarray, axis: int | None = 0) -> np.ndarray:
  size = np.linalg.norm(matrix, axis=axis, keepdims=axis is not None)
  return matrix / np.where(size > 0, size, 1)
