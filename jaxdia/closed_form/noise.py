"""How much of a layer's gradient is noise, as the gradient shows it.

The kernel gradient of a dense layer has the rank of its batch. What lies outside is noise, be it
added or of rounding: with standard deviation σ an entry, the m - B singular values beyond
the rank B of an m by n matrix have the sum of squares σ² (m - B)(n - B).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdia.closed_form.singular import values_of

# A gradient of which less is noise is clean: so much comes of computing in float32.
CLEAN = 1e-6
# Noise fills all dimensions: the smaller half of the singular values is no less than this share of
# all beyond the rank. In sums of more samples than were named it is rounding.
_FILLED = 0.03
# Fewer singular values than this tell nothing.
_LEAST_VALUES = 6


class Spectrum(NamedTuple):
  """The singular values of a layer's gradient, without units that are off in all images.

  Attributes:
    values: f64[least of the shape], in descending order.
    shape: rows and columns that are not all zero.
  """

  values: Float[np.ndarray, " values"]
  shape: tuple[int, int]


class Level(NamedTuple):
  """How noisy the gradient of a layer is.

  Attributes:
    share: norm of the noise by that of the gradient.
    std: standard deviation of an entry.
  """

  share: float
  std: float


def spectrum(matrix: Float[np.ndarray, "inputs outputs"], batch_size: int) -> Spectrum:
  """Returns the singular values of a gradient.

  Args:
    matrix: f64[inputs, outputs].
    batch_size: of the client.
  """
  filled = matrix[matrix.any(axis=1)][:, matrix.any(axis=0)]
  return Spectrum(values_of(filled, batch_size), filled.shape)


def find_levels(
  spectra: list[Spectrum],
  batch_size: int,
  rounding: float,
  noise: float | None,
) -> list[Level]:
  """Returns how noisy the gradients of layers are.

  Args:
    spectra: of their gradients.
    batch_size: of the client.
    rounding: the least share, as of rounding that is known.
    noise: standard deviation of an entry, if it is known; else it is estimated.

  Returns:
    One for each. A layer too narrow to show its noise has as much as the one that shows most.
  """
  stds = [_estimate(one, batch_size) if noise is None else noise for one in spectra]
  sizes = [max(float(np.linalg.norm(one.values)), 1e-300) for one in spectra]
  counts = [max(np.sqrt(np.prod(one.shape)), 1.0) for one in spectra]  # all may be pruned
  shown = [std for std in stds if std is not None]
  stds = [max(shown, default=0.0) if std is None else std for std in stds]
  shares = [std * n / size for std, n, size in zip(stds, counts, sizes, strict=True)]
  if noise is None:
    shares = [share if share > CLEAN else 0.0 for share in shares]
  levels = []
  for share, n, size in zip(shares, counts, sizes, strict=True):
    # A layer that shows less than the rounding that is known was rounded by less.
    levels.append(Level(max(share, rounding), (share or rounding) * size / n))
  return levels


def _estimate(seen: Spectrum, rank: int) -> float | None:
  """Returns the standard deviation of an entry; 0 for none, None if it does not show."""
  rest = seen.values[rank:]
  if len(rest) < _LEAST_VALUES:
    return None
  smaller = rest[len(rest) // 2 :]
  if not np.mean(smaller**2) > (_FILLED**2) * np.mean(rest**2):
    return 0.0
  return float(np.sqrt(np.sum(rest**2) / np.prod([n - rank for n in seen.shape])))
