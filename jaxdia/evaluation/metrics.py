"""The registry of metrics: one entry brings a metric into all results, tables and pages."""

import dataclasses

import dm_pix
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.core.types import Array, Images
from jaxdia.evaluation.lpips import lpips
from jaxdia.evaluation.matching import identified
from jaxdia.evaluation.metric import TABLES, Column, Metric, Pairs, compiled
from jaxdia.evaluation.success import SSIM_LEVELS

# A mean squared error of 1e-15 on pixels is as good as equality in float32.
_MAX_PSNR = 150.0
_PAGES = ("report", "published")
_WIDE = ("study", *_PAGES)


@compiled
def mse(a: Images, b: Images) -> Float[Array, " batch"]:
  """Returns f[B], the mean squared error of each image; f[B, H, W, C] both."""
  return jnp.asarray(dm_pix.mse(a, b))


@compiled
def psnr(a: Images, b: Images) -> Float[Array, " batch"]:
  """Returns f[B] in dB, the peak signal-to-noise ratio of pixels in [0, 1].

  Args:
    a: f[B, H, W, C].
    b: f[B, H, W, C].

  Returns:
    f[B], at most 150, which is what equal images get.
  """
  return jnp.minimum(dm_pix.psnr(a, b), _MAX_PSNR)


@compiled
def ssim(a: Images, b: Images) -> Float[Array, " batch"]:
  """Returns f[B], the structural similarity of pixels in [0, 1].

  Args:
    a: f[B, H, W, C].
    b: f[B, H, W, C].

  Returns:
    f[B]. The window is 11 pixels wide as usual or, on smaller images, the
    largest odd number that fits.
  """
  side = min(11, *a.shape[1:3])
  return jnp.asarray(dm_pix.ssim(a, b, filter_size=side - 1 + side % 2))


def _identified(pairs: Pairs) -> np.ndarray | None:
  if pairs.pool is None:
    return None
  return identified(pairs.reconstructions, pairs.originals, pairs.pool)


# fmt: off
_COSTS = (
  Metric(
    name="iterations", label="iterations", format="{:,.0f}", of="trial",
    meaning="steps of the search until it ended",
    columns=(Column("median", "iterations", "iterations", TABLES),),
  ),
  Metric(
    name="seconds", label="time", unit="s", of="trial", larger_is_better=False,
    meaning="that the result took, compiling apart; other trials ran at the same time",
    columns=(Column("median", "seconds", "time", _PAGES),),
  ),
  Metric(
    name="gradient_evaluations", label="gradient evaluations", format="{:,.0f}", of="trial",
    meaning="that all restarts made; those of a line search are not told",
    larger_is_better=False, columns=(),
  ),
)


def _until(cost: Metric, level: float) -> Metric:
  """Returns the metric of what a search took until it first was so close."""
  return dataclasses.replace(
    cost, name=f"{cost.name}_to_ssim_{level}", label=f"{cost.label} to SSIM {level}",
    meaning=f"of the search until the SSIM first was {level}, of the images that got there",
    larger_is_better=False, columns=(),
  )


_METRICS = (
  Metric(
    name="images", label="images", format="{:,.0f}", of="attack",
    meaning="that were attempted, finished, failed, or not applicable",
    columns=(
      Column("attempted", "attempted", "attempted", ("study", "report")),
      Column("finished", "finished", "finished", ("study", "report")),
      Column("failed", "failed", "failed", ("report",)),
      Column("not_applicable", "not_applicable", "not applicable", ("report",)),
    ),
  ),
  Metric(
    name="mse_normalized", label="MSE, normalised", format="{:.2e}", larger_is_better=False,
    meaning="mean squared error on pixels scaled to mean 0 and deviation 1, as in the DIA paper; 0"
    " is an exact copy, and a flat guess gets about 1 or less",
    function=lambda pairs: mse(*pairs.normalized),
    columns=(
      Column("median", "mse_median", "MSE (median)", TABLES),
      Column("mean", "mse_mean"),
      Column("std", "mse_std"),
      Column("min", "mse_best", "MSE (least)", _WIDE),
      Column("max", "mse_worst", "MSE (most)", ("run", "study", "published")),
    ),
  ),
  Metric(
    name="mse", label="MSE, pixels", format="{:.2e}", larger_is_better=False,
    meaning="mean squared error on pixels from 0 to 1; 0 is exact",
    function=lambda pairs: mse(*pairs.pixels), columns=(),
  ),
  Metric(
    name="psnr", label="PSNR", format="{:.1f}", unit="dB", larger_is_better=True,
    meaning="signal-to-noise ratio in decibels; above 30 is hard to tell apart",
    function=lambda pairs: psnr(*pairs.pixels),
    thresholds=tuple(float(n) for n in range(10, 61, 5)),
    columns=(Column("mean", "psnr_mean", "PSNR", ("run",)),),
  ),
  Metric(
    name="ssim", label="SSIM", format="{:.3f}", larger_is_better=True,
    meaning="structural similarity: how alike patterns of light and dark are; 1 is an exact copy,"
    " about 0 is unrelated",
    function=lambda pairs: ssim(*pairs.pixels),
    thresholds=tuple(round(0.05 * i, 2) for i in range(1, 20)) + (0.99,),
    columns=(
      Column("mean", "ssim_mean", "SSIM", ("run",)),
      Column("median", "ssim_median", "SSIM (median)", _WIDE),
      Column("min", "ssim_worst"),
      Column("max", "ssim_best", "SSIM (most)", _WIDE),
      Column("ci95_low", "ssim_ci95_low"),
      Column("ci95_high", "ssim_ci95_high"),
      *(
        Column(f"success_at_{level}", f"success_ssim_{level}", f"SSIM ≥ {level}", tables)
        for level, tables in zip(SSIM_LEVELS, (_WIDE, ()), strict=True)
      ),
    ),
  ),
  Metric(
    name="lpips", label="LPIPS", format="{:.3f}", larger_is_better=False,
    meaning="distance as a trained network perceives it; 0 is exact, above 0.5 unlike",
    function=lambda pairs: lpips(*pairs.pixels),
    thresholds=tuple(round(0.7 - 0.05 * i, 2) for i in range(14)) + (0.01,),
    columns=(Column("mean", "lpips_mean", "LPIPS", ("run",)),),
  ),
  Metric(
    name="mse_scaled", label="MSE, rescaled", format="{:.2e}", larger_is_better=False,
    meaning="of pixels, once both images are stretched to reach from 0 to 1",
    function=lambda pairs: mse(*pairs.scaled), columns=(),
  ),
  Metric(
    name="psnr_scaled", label="PSNR, rescaled", format="{:.1f}", unit="dB",
    meaning="of images stretched likewise", larger_is_better=True,
    function=lambda pairs: psnr(*pairs.scaled), columns=(),
  ),
  Metric(
    name="ssim_scaled", label="SSIM, rescaled", format="{:.3f}", larger_is_better=True,
    meaning="of images stretched likewise",
    function=lambda pairs: ssim(*pairs.scaled), columns=(),
  ),
  Metric(
    name="identified", label="identified", format="{:.1%}", larger_is_better=True,
    meaning="whether the nearest image of the pool is the own original",
    function=_identified, columns=(),
  ),
  Metric(
    name="iip", label="IIP", format="{:.1%}", of="attack", larger_is_better=True,
    meaning="image identification precision: share of reconstructions whose nearest image of a"
    " pool, by squared error, is their own original; pure chance gives one over the pool's size",
    columns=(Column("value", "iip", "IIP", _PAGES),),
  ),
  Metric(
    name="pool", label="pool", format="{:,.0f}", of="attack",
    meaning="number of images from which IIP picks",
    columns=(Column("value", "pool", "IIP pool", ("report",)),),
  ),
  Metric(
    name="accuracy", label="test accuracy", format="{:.1%}", of="attack", larger_is_better=True,
    meaning="share of images for tests that the network classifies rightly after its training",
    columns=(Column("value", "test_accuracy", "test accuracy", TABLES),),
  ),
  Metric(
    name="epsilon", label="ε", format="{:.3g}", of="attack", larger_is_better=False,
    meaning="ε of the differential privacy of an image in the whole training, at δ = 1e-5",
    columns=(Column("value", "epsilon", "ε", TABLES),),
  ),
  Metric(
    name="mask_accuracy", label="masks right", format="{:.1%}", larger_is_better=True,
    meaning="share of the client's dropout mask, kept or dropped, that the attack found; a guess"
    " already gets much of it",
    columns=(Column("mean", "masks_right", "masks right", TABLES),),
  ),
  Metric(
    name="label_accuracy", label="labels right", format="{:.1%}", larger_is_better=True,
    meaning="share of labels that the attack found; trivial if they were given",
    columns=(Column("mean", "labels_right", "labels right", ("run", *_PAGES)),),
  ),
  Metric(
    name="objective", label="objective", format="{:.2e}", of="trial", larger_is_better=False,
    meaning="what the search made small; known to the attacker", columns=(),
  ),
  Metric(
    name="gradient_distance", label="gradient distance", format="{:.2e}", of="trial",
    meaning="between the client's gradient and that of the reconstruction; known to the attacker",
    larger_is_better=False, columns=(),
  ),
  *_COSTS,
  *(_until(cost, level) for cost in _COSTS for level in SSIM_LEVELS),
  Metric(
    name="mask_accuracy_by_site", label="right, of a site", format="{:.1%}", of="site",
    meaning="share of the mask of one dropout site that the attack found",
    larger_is_better=True, columns=(),
  ),
  Metric(
    name="mask_auc_by_site", label="AUC, of a site", format="{:.3f}", of="site",
    meaning="chance that a kept entry looks more kept than a dropped one",
    larger_is_better=True, columns=(),
  ),
  Metric(
    name="mask_undecided_by_site", label="undecided, of a site", format="{:.1%}", of="site",
    meaning="share of a searched mask that is neither near 0 nor near 1", columns=(),
  ),
  Metric(
    name="mask_dropped_by_site", label="dropped, of a site", format="{:.1%}", of="site",
    meaning="share that the searched mask drops, to compare with the rate", columns=(),
  ),
  Metric(
    name="run_seconds", label="run", unit="s", of="attack",
    meaning="seconds that all searches of an attack took", columns=(),
  ),
  Metric(
    name="compile_seconds", label="compile", unit="s", of="attack",
    meaning="seconds of compiling, for the searches and for scoring", columns=(),
  ),
  Metric(
    name="scoring_seconds", label="scoring", unit="s", of="attack",
    meaning="seconds that it took to compare what was found with the originals", columns=(),
  ),
)
# fmt: on
# In the order in which results and tables show them.
REGISTRY: dict[str, Metric] = {metric.name: metric for metric in _METRICS}


def find(name: str) -> Metric:
  """Returns a metric by its name; one of older or other results goes by its name alone."""
  known = REGISTRY.get(name)
  return known or Metric(
    name=name, label=name.replace("_", " "), meaning="of results made elsewhere"
  )


def columns(table: str | None = None) -> list[tuple[Metric, Column]]:
  """Returns the columns of a table with their metrics.

  Args:
    table: one of TABLES; all columns that there are if None.
  """
  return [
    (metric, column)
    for metric in REGISTRY.values()
    for column in metric.columns or ()
    if table is None or table in column.tables
  ]
