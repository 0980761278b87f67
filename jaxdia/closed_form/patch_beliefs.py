"""Beliefs about rows behind dropout, by expectation propagation (Minka 2001).

A row lies in a known space and is, entry by entry, either 0 or `offset + patch @ kernel`. Without
the masks that would be linear in the coordinates of the row and in the patch, both normal. So each
entry is a mixture of two linear equations: it is replaced by the normal distribution that has its
moments, given what all others say, over and over. The equations are softened by noise that falls.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Steps, how far each goes, and noise of the equations: at first, each step's share, at the end, and
# of those that are known to hold. The less noise, the more a row of zeros, which lies in any space,
# is believed in: it fulfils as many equations as a row and leaves the patch free.
_STEPS, _DAMPING = 70, 0.5
_FIRST_NOISE, _SHARE, _LAST_NOISE, _KNOWN_NOISE = 0.3, 0.9, 0.03, 1e-3
# Steps have ended when no belief changes by more than that.
_STILL = 1e-3
_LARGEST_ODDS = 60.0


class Prior(NamedTuple):
  """What is believed of a patch.

  Attributes:
    mean: f64[K].
    covariance: f64[K, K].
  """

  mean: Float[np.ndarray, " pixels"]
  covariance: Float[np.ndarray, "pixels pixels"]


class Beliefs(NamedTuple):
  """What is believed of the rows at all positions.

  Attributes:
    kept: f64[T, D], probability of an entry not to be dropped.
    patches: f64[T, K].
  """

  kept: Float[np.ndarray, "positions width"]
  patches: Float[np.ndarray, "positions pixels"]


class _Pairs(NamedTuple):
  """Normal distributions of an entry of the row (r) and of its patch's product (v).

  As moments: variances, covariance and means; as factors: precisions and precision times mean.
  """

  rr: np.ndarray
  vv: np.ndarray
  rv: np.ndarray
  r: np.ndarray
  v: np.ndarray

  def turned(self) -> "_Pairs":
    """Returns factors of moments, or moments of factors."""
    size = np.maximum(self.rr * self.vv - self.rv**2, 1e-10 * self.rr * self.vv + 1e-300)
    rr, vv, rv = self.vv / size, self.rr / size, -self.rv / size
    return _Pairs(rr, vv, rv, rr * self.r + rv * self.v, rv * self.r + vv * self.v)

  def given(
    self, on_r: float, on_v: float, value: np.ndarray, noise: np.ndarray
  ) -> tuple["_Pairs", np.ndarray]:
    """Returns moments given that `on_r * r + on_v * v` is a value but for noise, and how likely."""
    with_r = on_r * self.rr + on_v * self.rv
    with_v = on_r * self.rv + on_v * self.vv
    size = on_r * with_r + on_v * with_v + noise**2
    off = value - on_r * self.r - on_v * self.v
    after = _Pairs(
      self.rr - with_r**2 / size,
      self.vv - with_v**2 / size,
      self.rv - with_r * with_v / size,
      self.r + with_r * off / size,
      self.v + with_v * off / size,
    )
    return after, -0.5 * (off**2 / size + np.log(size))


def believe(
  bases: Float[np.ndarray, "positions width rank"],
  offsets: Float[np.ndarray, "positions width"],
  kernel: Float[np.ndarray, "pixels width"],
  prior: Prior,
  odds: Float[np.ndarray, "positions width"],
  least: Float[np.ndarray, " positions"],
) -> Beliefs:
  """Returns what to believe of a row at each position.

  Args:
    bases: f64[T, D, n], orthonormal but for columns of zeros; rows of zeros for what is dropped.
    offsets: f64[T, D].
    kernel: f64[K, D].
    prior: of patches.
    odds: f64[T, D], logarithms of the odds that an entry is kept; infinite where that is known.
    least: f64[T], of the entries that the odds promise, the share that has to be kept: else zeros
      are believed in.
  """
  precision = np.linalg.inv(prior.covariance)
  dropped, known = np.isneginf(odds), np.isposinf(odds)
  free = ~dropped & ~known
  share = np.clip(1 / (1 + np.exp(-np.clip(odds, -_LARGEST_ODDS, _LARGEST_ODDS))), 1e-6, 1 - 1e-6)
  promised = least * np.sum(share * free, axis=1)
  squares = _squares(offsets, kernel, prior)
  # A row has the size that its entries have, spread over the directions of its space.
  ranks = np.sum(np.any(bases != 0, axis=1), axis=1)
  tightness = ranks / np.maximum(np.sum(np.where(dropped, 0, share * squares), axis=1), 1e-9)
  sites = _first_sites(share, offsets, squares, dropped)
  kept, patches = share, np.zeros((len(offsets), len(kernel)))
  for number in range(_STEPS):
    falling = max(_FIRST_NOISE * _SHARE**number, _LAST_NOISE)
    noise = np.where(known, _KNOWN_NOISE, falling)
    marginals, patches = _marginals(bases, tightness, kernel, prior.mean, precision, sites)
    factors = marginals.turned()
    cavity = _Pairs(*(whole - own for whole, own in zip(factors, sites, strict=True)))
    proper = ~dropped & (cavity.rr > 0) & (cavity.vv > 0)
    proper &= cavity.rr * cavity.vv - cavity.rv**2 > 1e-9 * np.abs(cavity.rr * cavity.vv)
    cavity = _Pairs(
      *(np.where(proper, x, x0) for x, x0 in zip(cavity, (1, 1, 0, 0, 0), strict=True))
    )
    moments = cavity.turned()
    out, likely_out = moments.given(1, 0, np.zeros_like(offsets), noise)
    kept_, likely_kept = moments.given(1, -1, offsets, noise)
    given = np.clip(likely_kept - likely_out + odds, -_LARGEST_ODDS, _LARGEST_ODDS)
    given += np.where(free, _lift(given, free, promised)[:, None], 0)
    last, kept = kept, np.where(dropped, 0, _sigmoid(given))
    new = _mixed(out, kept_, kept).turned()
    sites = _Pairs(
      *(
        np.where(proper & np.isfinite(x), (1 - _DAMPING) * old + _DAMPING * (x - rest), old)
        for x, rest, old in zip(new, cavity, sites, strict=True)
      )
    )
    if falling == _LAST_NOISE and np.abs(kept - last).max() < _STILL:
      break
  return Beliefs(kept, patches)


def _squares(offsets, kernel, prior) -> np.ndarray:
  """Returns the mean squares of what dropout is given."""
  varies = np.einsum("kd,kl,ld->d", kernel, prior.covariance, kernel)
  return (offsets + prior.mean @ kernel) ** 2 + varies


def _first_sites(share, offsets, squares, dropped) -> _Pairs:
  """Returns factors as if a row were its share of the whole, with the variance that masks give."""
  size = 1 / (share * (1 - share) * squares + 1e-3)
  size = np.where(dropped, 0, size)
  across = -size * share
  return _Pairs(size, size * share**2, across, -across * offsets, across * share * offsets)


def _marginals(bases, tightness, kernel, mean, precision, sites) -> tuple[_Pairs, np.ndarray]:
  """Returns the moments of all entries, and the patches, given all factors."""
  rank = bases.shape[2]
  turned, positions = bases.swapaxes(1, 2), len(bases)
  together = np.zeros((positions, rank + len(kernel), rank + len(kernel)))
  together[:, :rank, :rank] = (
    turned * sites.rr[:, None] @ bases + np.eye(rank) * tightness[:, None, None]
  )
  together[:, :rank, rank:] = turned * sites.rv[:, None] @ kernel.T
  together[:, rank:, :rank] = together[:, :rank, rank:].swapaxes(1, 2)
  together[:, rank:, rank:] = kernel * sites.vv[:, None] @ kernel.T + precision
  right = np.concatenate(
    [(turned @ sites.r[..., None])[..., 0], sites.v @ kernel.T + precision @ mean], axis=1
  )
  spread = np.linalg.inv(together)
  middle = (spread @ right[..., None])[..., 0]
  of_row = bases @ spread[:, :rank]
  of_patch = kernel.T @ spread[:, rank:, rank:]
  return (
    _Pairs(
      np.maximum(np.sum(of_row[:, :, :rank] * bases, axis=2), 1e-12),
      np.maximum(np.sum(of_patch * kernel.T, axis=2), 1e-12),
      np.sum(of_row[:, :, rank:] * kernel.T, axis=2),
      (bases @ middle[:, :rank, None])[..., 0],
      middle[:, rank:] @ kernel,
    ),
    middle[:, rank:],
  )


def _mixed(out: _Pairs, kept: _Pairs, share: np.ndarray) -> _Pairs:
  """Returns the moments of a mixture."""
  mixed = _Pairs(*((1 - share) * x + share * y for x, y in zip(out, kept, strict=True)))
  both, r, v = share * (1 - share), kept.r - out.r, kept.v - out.v
  return mixed._replace(
    rr=mixed.rr + both * r**2, vv=mixed.vv + both * v**2, rv=mixed.rv + both * r * v
  )


def _lift(odds, free, promised) -> np.ndarray:
  """Returns by how much odds have to rise for as many entries to be kept as are promised, or 0."""
  low, high = np.zeros(len(odds)), np.full(len(odds), 2 * _LARGEST_ODDS)
  for _ in range(20):
    middle = (low + high) / 2
    few = np.sum(_sigmoid(odds + middle[:, None]) * free, axis=1) < promised
    low, high = np.where(few, middle, low), np.where(few, high, middle)
  return np.where(np.sum(_sigmoid(odds) * free, axis=1) < promised, low, 0)


def _sigmoid(odds: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-np.clip(odds, -_LARGEST_ODDS, _LARGEST_ODDS)))
