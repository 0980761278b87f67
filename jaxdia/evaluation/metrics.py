"""The registry of metrics: one entry brings a metric into all results, tables and pages."""

import dm_pix
import jax
import jax.numpy as jnp

from jaxdia.evaluation.lpips import lpips
from jaxdia.evaluation.matching import identified
from jaxdia.evaluation.metric import TABLES, Column, Metric, compiled
from jaxdia.evaluation.success import NEARLY_EXACT_SSIM, RECOGNISABLE_SSIM, SSIM_LEVELS

# A mean squared error of 1e-15 on pixels is as good as equality in float32.
_MAX_PSNR = 150.0
_PAGES = ("report", "published")
_GAINS = ("study", *_PAGES)


@compiled
def mse(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns f[B], the mean squared error of each image; f[B, H, W, C] both."""
  return dm_pix.mse(a, b)


@compiled
def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns f[B] in dB, the peak signal-to-noise ratio of pixels in [0, 1].

  Args:
    a: f[B, H, W, C].
    b: f[B, H, W, C].

  Returns:
    f[B], at most 150, which is what equal images get.
  """
  return jnp.minimum(dm_pix.psnr(a, b), _MAX_PSNR)


@compiled
def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns f[B], the structural similarity of pixels in [0, 1].

  Args:
    a: f[B, H, W, C].
    b: f[B, H, W, C].

  Returns:
    f[B]. The window is 11 pixels wide as usual or, on smaller images, the
    largest odd number that fits.
  """
  side = min(11, *a.shape[1:3])
  return dm_pix.ssim(a, b, filter_size=side - 1 + side % 2)


def _everywhere(statistic: str, key: str, heading: str) -> Column:
  return Column(statistic, key, heading, TABLES)


def _until(what: str, level: float) -> Metric:
  """Returns the metric of what a search took until it first was so close."""
  label, form = what.replace("_", " "), "{:.3g}" if what == "seconds" else "{:,.0f}"
  return Metric(
    name=f"{what}_to_ssim_{level}",
    label=f"{label} to SSIM {level}",
    meaning=f"of the search until the SSIM first was {level}, of the images that got there",
    format=form,
    unit="s" if what == "seconds" else "",
    larger_is_better=False,
    columns=(),
  )


_METRICS = (
  Metric(
    name="images",
    label="images",
    meaning="that were attempted, finished, failed, or not applicable",
    format="{:,.0f}",
    of="attack",
    columns=(
      Column("attempted", "attempted", "attempted", ("study", "report")),
      Column("finished", "finished", "finished", ("study", "report")),
      Column("failed", "failed", "failed", ("report",)),
      Column("not_applicable", "not_applicable", "not applicable", ("report",)),
    ),
  ),
  Metric(
    name="mse_normalized",
    label="MSE, normalised",
    meaning="mean squared error on pixels scaled to mean 0 and deviation 1, as in the DIA paper; 0"
    " is an exact copy, and a flat guess gets about 1 or less",
    format="{:.2e}",
    larger_is_better=False,
    function=lambda pairs: mse(*pairs.normalized),
    columns=(
      _everywhere("median", "mse_median", "MSE (median)"),
      Column("mean", "mse_mean"),
      Column("std", "mse_std"),
      Column("min", "mse_best", "MSE (least)", _GAINS),
      Column("max", "mse_worst", "MSE (most)", ("run", "study", "published")),
    ),
  ),
  Metric(
    name="mse",
    label="MSE, pixels",
    meaning="mean squared error on pixels from 0 to 1; 0 is exact",
    format="{:.2e}",
    larger_is_better=False,
    function=lambda pairs: mse(*pairs.pixels),
    columns=(),
  ),
  Metric(
    name="psnr",
    label="PSNR, dB",
    meaning="signal-to-noise ratio in decibels; above 30 is hard to tell apart",
    format="{:.1f}",
    unit="dB",
    larger_is_better=True,
    function=lambda pairs: psnr(*pairs.pixels),
    thresholds=tuple(float(n) for n in range(10, 61, 5)),
    columns=(Column("mean", "psnr_mean", "PSNR dB", ("run",)),),
  ),
  Metric(
    name="ssim",
    label="SSIM",
    meaning="structural similarity: how alike patterns of light and dark are; 1 is an exact copy,"
    " about 0 is unrelated",
    format="{:.3f}",
    larger_is_better=True,
    function=lambda pairs: ssim(*pairs.pixels),
    thresholds=tuple(round(0.05 * i, 2) for i in range(1, 20)) + (0.99,),
    columns=(
      Column("mean", "ssim_mean", "SSIM", ("run",)),
      Column("median", "ssim_median", "SSIM (median)", _GAINS),
      Column("min", "ssim_worst"),
      Column("max", "ssim_best", "SSIM (most)", _GAINS),
      Column("ci95_low", "ssim_ci95_low"),
      Column("ci95_high", "ssim_ci95_high"),
      Column(
        f"success_at_{RECOGNISABLE_SSIM}",
        f"success_ssim_{RECOGNISABLE_SSIM}",
        f"SSIM ≥ {RECOGNISABLE_SSIM}",
        _GAINS,
      ),
      Column(f"success_at_{NEARLY_EXACT_SSIM}", f"success_ssim_{NEARLY_EXACT_SSIM}"),
    ),
  ),
  Metric(
    name="lpips",
    label="LPIPS",
    meaning="distance as a trained network perceives it; 0 is exact, above 0.5 unlike",
    format="{:.3f}",
    larger_is_better=False,
    function=lambda pairs: lpips(*pairs.pixels),
    thresholds=tuple(round(0.7 - 0.05 * i, 2) for i in range(14)) + (0.01,),
    columns=(Column("mean", "lpips_mean", "LPIPS", ("run",)),),
  ),
  Metric(
    name="mse_scaled",
    label="MSE, rescaled",
    meaning="of pixels, once both images are stretched to reach from 0 to 1",
    format="{:.2e}",
    larger_is_better=False,
    function=lambda pairs: mse(*pairs.scaled),
    columns=(),
  ),
  Metric(
    name="psnr_scaled",
    label="PSNR, rescaled, dB",
    meaning="of images stretched likewise",
    format="{:.1f}",
    unit="dB",
    larger_is_better=True,
    function=lambda pairs: psnr(*pairs.scaled),
    columns=(),
  ),
  Metric(
    name="ssim_scaled",
    label="SSIM, rescaled",
    meaning="of images stretched likewise",
    format="{:.3f}",
    larger_is_better=True,
    function=lambda pairs: ssim(*pairs.scaled),
    columns=(),
  ),
  Metric(
    name="identified",
    label="identified",
    meaning="whether the nearest image of the pool is the own original",
    format="{:.1%}",
    larger_is_better=True,
    function=lambda pairs: (
      None if pairs.pool is None else identified(pairs.reconstructions, pairs.originals, pairs.pool)
    ),
    columns=(),
  ),
  Metric(
    name="iip",
    label="IIP",
    meaning="image identification precision: share of reconstructions whose nearest image of a"
    " pool, by squared error, is their own original; pure chance gives one over the pool's size",
    format="{:.1%}",
    larger_is_better=True,
    of="attack",
    columns=(Column("value", "iip", "IIP", _PAGES),),
  ),
  Metric(
    name="pool",
    label="pool",
    meaning="number of images from which IIP picks",
    format="{:,.0f}",
    of="attack",
    columns=(Column("value", "pool", "IIP pool", ("report",)),),
  ),
  Metric(
    name="mask_accuracy",
    label="masks right",
    meaning="share of the client's dropout mask, kept or dropped, that the attack found; a guess"
    " already gets much of it",
    format="{:.1%}",
    larger_is_better=True,
    columns=(_everywhere("mean", "masks_right", "masks right"),),
  ),
  Metric(
    name="label_accuracy",
    label="labels right",
    meaning="share of labels that the attack found; trivial if they were given",
    format="{:.1%}",
    larger_is_better=True,
    columns=(Column("mean", "labels_right", "labels right", ("run", *_PAGES)),),
  ),
  Metric(
    name="objective",
    label="objective",
    meaning="what the search made small; known to the attacker",
    format="{:.2e}",
    larger_is_better=False,
    of="trial",
    columns=(),
  ),
  Metric(
    name="gradient_distance",
    label="gradient distance",
    meaning="between the client's gradient and that of the reconstruction; known to the attacker",
    format="{:.2e}",
    larger_is_better=False,
    of="trial",
    columns=(),
  ),
  Metric(
    name="iterations",
    label="iterations",
    meaning="steps of the search until it ended",
    format="{:,.0f}",
    of="trial",
    columns=(_everywhere("median", "iterations", "iterations"),),
  ),
  Metric(
    name="seconds",
    label="seconds",
    meaning="that the result took, compiling apart; other trials ran at the same time",
    unit="s",
    larger_is_better=False,
    of="trial",
    columns=(Column("median", "seconds", "seconds", _PAGES),),
  ),
  Metric(
    name="gradient_evaluations",
    label="gradient evaluations",
    meaning="that all restarts made; those of a line search are not told",
    format="{:,.0f}",
    larger_is_better=False,
    of="trial",
    columns=(),
  ),
  *(
    _until(what, level)
    for level in SSIM_LEVELS
    for what in ("iterations", "seconds", "gradient_evaluations")
  ),
  Metric(
    name="mask_accuracy_by_site",
    label="right, of a site",
    meaning="share of the mask of one dropout site that the attack found",
    format="{:.1%}",
    larger_is_better=True,
    of="site",
    columns=(),
  ),
  Metric(
    name="mask_auc_by_site",
    label="AUC, of a site",
    meaning="chance that a kept entry looks more kept than a dropped one",
    format="{:.3f}",
    larger_is_better=True,
    of="site",
    columns=(),
  ),
  Metric(
    name="mask_undecided_by_site",
    label="undecided, of a site",
    meaning="share of a searched mask that is neither near 0 nor near 1",
    format="{:.1%}",
    of="site",
    columns=(),
  ),
  Metric(
    name="mask_dropped_by_site",
    label="dropped, of a site",
    meaning="share that the searched mask drops, to compare with the rate",
    format="{:.1%}",
    of="site",
    columns=(),
  ),
  Metric(
    name="run_seconds",
    label="run, s",
    meaning="seconds that all searches of an attack took",
    unit="s",
    of="attack",
    columns=(),
  ),
  Metric(
    name="compile_seconds",
    label="compile, s",
    meaning="seconds of compiling before them",
    unit="s",
    of="attack",
    columns=(),
  ),
)
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
    for column in metric.columns
    if table is None or table in column.tables
  ]
