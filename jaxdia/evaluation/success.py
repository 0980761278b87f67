"""How many images an attack got, and how sure the averages are."""

from collections.abc import Sequence

import numpy as np

# SSIM from which on a person recognises an image, and from which on it is nearly exact.
RECOGNISABLE_SSIM, NEARLY_EXACT_SSIM = SSIM_LEVELS = (0.6, 0.9)
# Thresholds of the curves, from easy to hard, and whether a larger value is a better image.
THRESHOLDS = {
  "ssim": (tuple(round(0.05 * i, 2) for i in range(1, 20)) + (0.99,), True),
  "psnr": (tuple(float(n) for n in range(10, 61, 5)), True),
  "lpips": (tuple(round(0.7 - 0.05 * i, 2) for i in range(14)) + (0.01,), False),
}
_RESAMPLES = 2_000


def success_curve(metric: str, values: Sequence[float | None], attempted: int) -> dict[str, list]:
  """Returns the attack success rate as a function of what counts as a success.

  Args:
    metric: "ssim", "psnr" or "lpips".
    values: of each image; None, for one without a score, is no success.
    attempted: images that were to be attacked.

  Returns:
    `thresholds`, and `rate`: the share of the attempted images that reach each.
  """
  thresholds, larger = THRESHOLDS[metric]
  scores = np.array([v for v in values if v is not None], np.float64)
  hits = [np.sum(scores >= t if larger else scores <= t) for t in thresholds]
  return {"thresholds": list(thresholds), "rate": [float(n) / attempted for n in hits]}


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
  """Returns a percentile bootstrap interval of a mean, the same whenever it is asked.

  Args:
    values: at least one, of independent images.
    level: share of the resampled means that it holds.

  Returns:
    Its ends.
  """
  values = np.asarray(values, np.float64)
  draws = np.random.default_rng(0).integers(values.size, size=(_RESAMPLES, values.size))
  means = np.mean(values[draws], axis=1)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
