"""How many images an attack got, and how sure the averages are."""

from collections.abc import Sequence

import numpy as np

# SSIM from which on a person recognises an image, and from which on it is nearly exact.
RECOGNISABLE_SSIM, NEARLY_EXACT_SSIM = SSIM_LEVELS = (0.6, 0.9)
_RESAMPLES = 2_000


def success_rates(
  values: Sequence[float | None],
  attempted: int,
  thresholds: Sequence[float],
  larger_is_better: bool | None,
) -> list[float]:
  """Returns the attack success rate as a function of what counts as a success.

  Args:
    values: of each image; None, for one without a score, is no success.
    attempted: images that were to be attacked.
    thresholds: of the metric.
    larger_is_better: whether a success is at or above a threshold, else at or below it.

  Returns:
    The share of the attempted images that reach each threshold.
  """
  scores = np.array([v for v in values if v is not None], np.float64)
  hits = [np.sum(scores >= t if larger_is_better else scores <= t) for t in thresholds]
  return [float(n) / attempted for n in hits]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns a 95% percentile bootstrap interval of a mean, the same whenever it is asked.

  Args:
    values: at least one, of independent images.

  Returns:
    Its ends.
  """
  found = np.asarray(values, np.float64)
  draws = np.random.default_rng(0).integers(found.size, size=(_RESAMPLES, found.size))
  means = np.mean(found[draws], axis=1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)
