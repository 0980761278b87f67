"""The patches of a batch of images behind dropout, from the space that their rows span.

What a vision transformer's first block multiplies is, for a token of an image, a row
`mask * (offset + patch @ kernel)`, up to a normalisation: offset and kernel are known, patch and
mask are not. For a basis N of what the space of all rows leaves out

  (offset + patch @ kernel) @ N == dropped @ N

where `dropped` is zero but for the entries that dropout took. With the patch projected out this is
a sparse problem for each position (compressed sensing), which has a solution for each image of the
batch. Its rounding gives masks; given a mask the patch is a least-squares solution, and that it
leaves nothing outside of the space is the proof.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxdia.closed_form.span import Span, pad_programs, solve_masks, split
from jaxdia.core.precision import full_precision

# Of the splitting that solves the sparse problems.
_STEPS, _STEP_SIZE = 600, 0.05
# Rounds of problems at a position whose weights chance turns, and how many of them at once.
_ROUNDS, _RESTARTS = 6, 4
# Of positions, the share that the first round must find a row at.
_LEAST_FIRST = 0.2
# Weight of entries that are known to be kept.
_KEPT = 1e3
# Looks at one solution, of which each rounds a mask and fits the patch.
_LOOKS = 6
# Shares of the equations that are spent on entries of a mask that are unclear.
_UNCLEAR = (0.4, 0.6, 0.8, 0.9)
# Two rows of one position are one if they differ in fewer entries of their masks.
_SAME = 8


class PatchRow(NamedTuple):
  """A row of one image.

  Attributes:
    patch: f64[K], what the kernel was given.
    mask: b[D].
    outside: share of the row that lies outside of the space.
  """

  patch: Float[np.ndarray, " pixels"]
  mask: Bool[np.ndarray, " width"]
  outside: float


class _Equations:
  """What all positions share."""

  def __init__(self, span: Span, kernel: np.ndarray):
    self.kernel, self.left = kernel, span.complement.T  # f[equations, D]
    self.limit = span.outside
    free = self.left @ kernel.T
    basis = np.linalg.qr(free)[0]
    _, sizes, rest = np.linalg.svd(self.left - basis @ (basis.T @ self.left), full_matrices=False)
    rest = rest[sizes > 1e-9]
    self.spare = len(rest)
    self.without_patch = jnp.asarray(rest.T @ rest, jnp.float32)
    self.outside_of_space = jnp.asarray(self.left.T @ self.left, jnp.float32)

  def fit(self, offset: np.ndarray, mask: np.ndarray) -> PatchRow:
    """Returns the patch that leaves least outside of the space, given a mask."""
    system = self.left @ (mask[:, None] * self.kernel.T)
    patch = _least_squares(system, -self.left @ (mask * offset))
    row = mask * (offset + patch @ self.kernel)
    size = max(float(np.linalg.norm(row)), 1e-300)
    return PatchRow(patch, mask, float(np.linalg.norm(self.left @ row)) / size)

  def polish(self, offset: np.ndarray, row: PatchRow, dropped: np.ndarray) -> PatchRow:
    """Decides entries that are unclear together with the patch, of more and more of them."""
    for share in _UNCLEAR:
      for clear in (np.ones(len(dropped)), np.abs(dropped - 0.5)):
        if row.outside <= self.limit:
          return row
        values = offset + row.patch @ self.kernel
        unclear = np.argsort(np.abs(values) * clear)[: int(share * self.spare)]
        mask = row.mask.copy()
        mask[unclear] = False
        system = np.concatenate(
          [self.left @ (mask[:, None] * self.kernel.T), self.left[:, unclear]], axis=1
        )
        solved = _least_squares(system, -self.left @ (mask * offset))
        patch, kept = np.split(solved, [len(self.kernel)])
        values = offset + patch @ self.kernel
        mask[unclear] = _ratio(kept, values[unclear]) > 0.5
        other = self.fit(offset, mask)
        row = other if other.outside < row.outside else row
    return row

  def look(self, offset: np.ndarray, dropped: np.ndarray, known: np.ndarray) -> PatchRow:
    """Returns the row that a solution of the sparse problem stands for.

    Args:
      offset: f64[D].
      dropped: f64[D], values of what was dropped.
      known: f64[D], 1 for what is known to be dropped, 0 kept, NaN not known.
    """
    left = self.left @ (dropped - offset)
    patch = _least_squares(self.left @ self.kernel.T, left)
    share = _ratio(dropped, offset + patch @ self.kernel)
    best = None
    for number in range(_LOOKS):
      share = np.where(np.isnan(known), share, known)
      row = self.polish(offset, self.fit(offset, share < 0.5), share)
      if best is None or row.outside < best.outside:
        best = row
      elif number > 2:
        break
      if best.outside <= self.limit:
        break
      values = (offset + best.patch @ self.kernel)[None]
      share = solve_masks(self.outside_of_space, values, np.ones(values.shape))[0]
    assert best is not None  # there is one look at least
    return best


def find_patch_rows(
  span: Span,
  offsets: Float[np.ndarray, "positions width"],
  kernel: Float[np.ndarray, "pixels width"],
  sums: Float[np.ndarray, "positions width"] | None,
  most: int,
) -> list[list[PatchRow]]:
  """Finds the rows of all images at each position.

  Args:
    span: of the rows.
    offsets: f64[T, D], what is added to the products of patches.
    kernel: f64[K, D]; without rows for tokens that have no patch.
    sums: f64[T, D], sums over images of derivatives behind the dropout: exactly zero where it took
      the entry of all of them. None if they are not clean.
    most: images of the batch.
  """
  equations = _Equations(span, kernel)
  if equations.spare < 1:
    return [[] for _ in offsets]
  chance = np.random.default_rng(0)
  found: list[list[PatchRow]] = [[] for _ in offsets]
  known = np.full(offsets.shape, np.nan)
  if sums is not None:
    known[sums == 0] = 1
  for number in range(_ROUNDS):
    if number == 1 and sum(map(bool, found)) < _LEAST_FIRST * len(found):
      break  # there is too little that the space leaves out; more rounds would find few
    left = [t for t, rows in enumerate(found) if len(rows) < most]
    restarts = _RESTARTS if number else 1
    while left:
      weights = [
        _weights(known[t], found[t], number, chance) for t in left for _ in range(restarts)
      ]
      given = np.repeat(offsets[left], restarts, axis=0)
      dropped = _sparse(equations.without_patch, given, np.array(weights))
      again = []
      for i, t in enumerate(left):
        for one in dropped[i * restarts : (i + 1) * restarts]:
          row = equations.look(offsets[t], one, known[t])
          if row.outside <= equations.limit and _is_new(row, found[t]):
            found[t].append(row)
            if sums is not None and len(found[t]) == most - 1:
              # Where all others were dropped, the sum is that of the last image.
              others = ~np.any([row.mask for row in found[t]], axis=0)
              known[t, others] = sums[t, others] == 0
            again.append(t)
            break
      left = [t for t in again if len(found[t]) < most]
  return found


def _is_new(row: PatchRow, rows: list[PatchRow]) -> bool:
  return all(np.sum(row.mask != other.mask) >= _SAME for other in rows)


def _least_squares(system: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Returns a least-squares solution, fast: what it is good for is checked behind it."""
  gram = system.T @ system
  gram += (1e-13 * np.trace(gram) + 1e-300) * np.eye(len(gram))
  return np.linalg.solve(gram, system.T @ right)


def _ratio(values: np.ndarray, wholes: np.ndarray) -> np.ndarray:
  """Returns values as shares of wholes, in [0, 1]."""
  return np.clip(values / np.where(np.abs(wholes) < 1e-9, 1e-9, wholes), 0, 1)


def _weights(known, rows, number, chance) -> np.ndarray:
  """Returns the weights of entries that were dropped: away from masks that were found."""
  weights = np.ones(len(known))
  if rows:
    weights = 0.1 + np.sum([~row.mask for row in rows], axis=0)
  weights = weights + 0.3 * min(number, 4) * chance.random(len(known))
  return np.where(known == 1, 0, np.where(known == 0, _KEPT, weights))


def _sparse(without_patch: jax.Array, offsets: np.ndarray, weights: np.ndarray) -> np.ndarray:
  given = pad_programs(32, offsets, weights)
  return np.asarray(_solve(without_patch, *given), np.float64)[: len(offsets)]


@jax.jit
def _solve(without_patch, offsets, weights):
  """Minimises the weighted sum of sizes."""

  def shrink(z):
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - _STEP_SIZE * weights, 0)

  with full_precision():
    target = offsets @ without_patch
  return split(without_patch, target, shrink, _STEPS)
