"""The patches of a batch of images behind dropout, from the space that their rows span.

What a vision transformer's first block multiplies is, for a token of an image, a row
`mask * (offset + patch @ kernel)`, up to a normalisation: offset and kernel are known, patch and
mask are not. That all rows lie in a known space, and that patches are smooth, tells what to believe
of each entry (`patch_beliefs.py`). Given a mask the patch is a least-squares solution of

  (mask * (offset + patch @ kernel)) @ N == 0

for a basis N of what the space leaves out, and that this leaves nothing is the proof.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.linalg import norm

from jaxdia.closed_form.patch_beliefs import Prior, believe
from jaxdia.closed_form.span import Span

# Rounds of beliefs, of which each begins elsewhere, and how many may find nothing.
_ROUNDS, _IDLE_ROUNDS = 16, 3
# How far beliefs begin from what is known, in logarithms of odds, and the share of the entries that
# ought to be kept which has to be.
_JITTER, _LEAST_KEPT = (0.3, 1.2), (0.85, 1.0)
# Shares of the equations that are spent on entries of a mask that are unclear.
_UNCLEAR = (0.3, 0.5, 0.7, 0.85, 0.95)
# Two rows of one position are one if they differ in fewer entries of their masks.
_SAME = 8
# Entries that a row keeps more than its patch has, so that these prove it.
_SPARE = 4
# A row is at least that share of the offsets that it keeps.
_LEAST_ROW = 0.1
# Of an entry of a plane's row, the share of the others that is as good as zero.
_ZERO = 0.02
# Patches that were found outweigh so many of what is believed of patches at first.
_FIRST_PRIOR = 20
# Variance of a pixel that its neighbours do not tell.
_ROUGHNESS = 1e-3


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


class _Equations(NamedTuple):
  """What all positions share: kernel f64[K, D], what the space leaves out f64[equations, D]."""

  kernel: np.ndarray
  left: np.ndarray
  limit: float

  def fit(self, offset: np.ndarray, mask: np.ndarray) -> PatchRow:
    """Returns the patch that leaves least outside of the space, given a mask."""
    system = self.left @ (mask[:, None] * self.kernel.T)
    patch = _least_squares(system, -self.left @ (mask * offset))
    row = mask * (offset + patch @ self.kernel)
    # A patch that takes away what few entries are kept proves nothing.
    is_row = mask.sum() >= len(patch) + _SPARE and norm(row) > _LEAST_ROW * norm(mask * offset)
    return PatchRow(patch, mask, norm(self.left @ row) / norm(row) if is_row else np.inf)

  def decide(
    self,
    offset: np.ndarray,
    patch: np.ndarray,
    kept: np.ndarray,
    is_open: np.ndarray,
  ) -> PatchRow:
    """Decides the entries of a mask that are least clear together with the patch.

    Args:
      offset: f64[D].
      patch: f64[K], what is believed of it.
      kept: f64[D], probabilities.
      is_open: b[D], which entries are not known.
    """
    best = self.fit(offset, kept > 0.5)
    mask = best.mask
    for share in _UNCLEAR:
      for clear in (np.ones(len(kept)), np.abs(kept - 0.5)):
        if best.outside <= self.limit:
          return best
        values = np.abs(offset + patch @ self.kernel)
        order = np.argsort(np.where(is_open, values * clear, np.inf))
        count = int(share * (len(self.left) - len(self.kernel)))
        unclear = order[: min(count, int(is_open.sum()))]
        rest = mask.copy()
        rest[unclear] = False
        system = np.concatenate(
          [self.left @ (rest[:, None] * self.kernel.T), self.left[:, unclear]], axis=1
        )
        solved = _least_squares(system, -self.left @ (rest * offset))
        other, found = np.split(solved, [len(self.kernel)])
        rest[unclear] = _ratio(found, (offset + other @ self.kernel)[unclear]) > 0.5
        row = self.fit(offset, rest)
        if row.outside < best.outside:
          best, mask, patch = row, row.mask, row.patch
    return best


def smooth_prior(places: Float[np.ndarray, "pixels 3"]) -> Prior:
  """Returns what to believe of patches of normalised images before any is known.

  Args:
    places: f64[K, 3], row, column and channel of the entries of a patch.
  """
  apart = norm(places[:, None, :2] - places[None, :, :2], axis=-1)
  alike = np.where(places[:, None, 2] == places[None, :, 2], 1.0, 0.9)
  covariance = alike * np.exp(-apart / 8) + _ROUGHNESS * np.eye(len(places))
  return Prior(np.zeros(len(places)), covariance)


def find_patch_rows(
  span: Span,
  offsets: Float[np.ndarray, "positions width"],
  kernel: Float[np.ndarray, "pixels width"],
  sums: Float[np.ndarray, "positions width"] | None,
  most: int,
  rate: float,
  prior: Prior,
) -> list[list[PatchRow]]:
  """Finds the rows of all images at each position.

  Args:
    span: of the rows.
    offsets: f64[T, D], what is added to the products of patches.
    kernel: f64[K, D]; without rows for tokens that have no patch.
    sums: f64[T, D], sums over images of derivatives behind the dropout: exactly zero where it took
      the entry of all of them. None if they are not clean.
    most: images of the batch.
    rate: of the dropout.
    prior: of patches.
  """
  equations = _Equations(kernel, span.complement.T, span.outside)
  if len(equations.left) <= len(kernel):
    return [[] for _ in offsets]
  chance = np.random.default_rng(0)
  nobody = np.zeros(offsets.shape, bool) if sums is None else sums == 0
  bases = _bases(span.basis, nobody)
  found: list[list[PatchRow]] = [[] for _ in offsets]
  for t, offset in enumerate(offsets):
    for kept in _sparsest(bases[t], ~nobody[t], most):
      row = equations.fit(offset, kept > 0.5)
      row = equations.decide(offset, row.patch, kept, ~nobody[t])
      if row.outside <= span.outside and _is_new(row, found[t]):
        found[t].append(row)
  believed, idle = prior, 0
  for _ in range(_ROUNDS):
    left = [t for t, rows in enumerate(found) if len(rows) < most]
    if not left or idle == _IDLE_ROUNDS:
      break
    odds = np.array([_odds(found[t], nobody[t], sums is not None, most, rate) for t in left])
    jitter = chance.uniform(*_JITTER, (len(left), 1)) * chance.standard_normal(odds.shape)
    least = chance.uniform(*_LEAST_KEPT, len(left))
    beliefs = believe(bases[left], offsets[left], kernel, believed, odds + jitter, least)
    before = sum(map(len, found))
    for t, kept, patch, given in zip(left, beliefs.kept, beliefs.patches, odds, strict=True):
      row = equations.decide(offsets[t], patch, kept, np.isfinite(given))
      if row.outside <= span.outside and _is_new(row, found[t]):
        found[t].append(row)
    idle = 0 if sum(map(len, found)) > before else idle + 1
    believed = _learn(prior, [row.patch for rows in found for row in rows])
  return found


def _bases(basis: np.ndarray, nobody: np.ndarray) -> np.ndarray:
  """Returns bases of what of a space is zero where all images dropped an entry, f64[T, D, n]."""
  parts = []
  for at in nobody:
    if at.any():
      _, sizes, turned = np.linalg.svd(basis[at])
      rank = int(np.sum(sizes > 1e-4))
      parts.append(np.where(at[:, None], 0, basis @ turned[rank:].T))
    else:
      parts.append(basis)
  most = max((part.shape[1] for part in parts), default=0)
  return np.stack([np.pad(part, [(0, 0), (0, most - part.shape[1])]) for part in parts])


def _sparsest(basis, is_open, most) -> list[np.ndarray]:
  """Returns what the sparsest rows of a plane keep, if no more than two images' plane is left.

  A row of the plane is zero at one entry, then also where the other image alone has something.
  """
  basis = basis[:, np.any(basis != 0, axis=0)]
  if most != 2 or basis.shape[1] != 2:
    return []
  rows = np.abs(basis @ np.stack([-basis[is_open, 1], basis[is_open, 0]]))
  rows = rows / np.sqrt(np.mean(rows[is_open] ** 2, axis=0))
  kept = rows**2 / (rows**2 + _ZERO**2)
  first = int(np.argmin(kept[is_open].sum(axis=0)))
  # The other row keeps what the first does not, but for what is next to nothing.
  is_other = kept[is_open & (kept[:, first] < 0.5)].mean(axis=0) > 0.8
  second = int(np.argmin(np.where(is_other, kept[is_open].sum(axis=0), np.inf)))
  return [kept[:, first], kept[:, second]]


def _odds(rows, nobody, are_known, most, rate) -> np.ndarray:
  """Returns logarithms of the odds that an entry of a further row is kept, f64[D].

  Where all other images dropped an entry that somebody kept, the last has it.
  """
  left = most - len(rows)
  alone = ~np.any([row.mask for row in rows], axis=0) if rows else np.ones(len(nobody), bool)
  with np.errstate(divide="ignore"):
    odds = np.full(len(nobody), np.log((1 - rate) / rate))
    if are_known:
      odds[alone] = np.log((1 - rate) / (rate - rate**left)) if left > 1 else np.inf
  return np.where(nobody, -np.inf, odds)


def _learn(prior: Prior, patches: list[np.ndarray]) -> Prior:
  """Returns what patches that were found make of what is believed of the others."""
  if len(patches) < _FIRST_PRIOR:
    return prior
  seen = np.array(patches)
  mean, weight = seen.mean(axis=0), len(seen) / (len(seen) + _FIRST_PRIOR)
  covariance = weight * np.cov(seen.T, bias=True).reshape(prior.covariance.shape)
  covariance += (1 - weight) * prior.covariance + _ROUGHNESS * np.eye(len(mean))
  return Prior(mean, covariance)


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
