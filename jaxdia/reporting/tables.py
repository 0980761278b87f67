"""Numbers for people: summaries of results, and the table at the end of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxdia.evaluation import SSIM_LEVELS, THRESHOLDS, bootstrap_interval, success_curve

METRICS = (
  *("mse_normalized", "mse", "psnr", "ssim", "lpips", "mse_scaled", "psnr_scaled", "ssim_scaled"),
  *("mask_accuracy", "label_accuracy", "identified"),
)
_COSTS = (
  *("objective", "gradient_distance", "iterations", "seconds", "gradient_evaluations"),
  *(
    f"{what}_to_ssim_{level}"
    for level in SSIM_LEVELS
    for what in ("iterations", "seconds", "gradient_evaluations")
  ),
)
_BY_SITE = ("accuracy", "auc", "undecided", "dropped")


def summarize(rows: Sequence[dict[str, Any]], attempted: int) -> dict[str, Any]:
  """Summarises the results of one attack.

  Args:
    rows: one dictionary an image, as in results.jsonl.
    attempted: number of images that were to be attacked.

  Returns:
    The counts, and for each metric mean, std, median, min and max over the
    `count` images that have it, and the ends of a bootstrap interval of the mean, `ci95`. A
    failed image has no metrics, one to which no closed form applies none of its image.
    `success`: curves of the share of all attempted images; `iip`; `oracle`: what the
    best restart of each batch by the truth would have got, if there were several.
  """
  failed, not_applicable = (
    sum(row["status"] == status for row in rows) for status in ("failed", "not_applicable")
  )
  return {
    "attempted": attempted,
    "finished": len(rows) - failed - not_applicable,
    "failed": failed,
    "not_applicable": not_applicable,
    "metrics": {
      name: statistics
      for name in METRICS + _COSTS
      if (statistics := _statistics((_unit(row, name), row.get(name)) for row in rows))
    },
    "success": {
      metric: success_curve(metric, [row.get(metric) for row in rows], attempted)
      for metric in THRESHOLDS
      if any(row.get(metric) is not None for row in rows)
    },
    "iip": _mean([row.get("identified") for row in rows]),
    "oracle": {
      metric: statistics
      for metric in ("mse_normalized", "ssim")
      if (
        statistics := _statistics(
          (_unit(row, metric), row["oracle"][metric]) for row in rows if row.get("oracle")
        )
      )
    },
  } | {f"mask_{name}_by_site": _mean_by_site(rows, f"mask_{name}_by_site") for name in _BY_SITE}


def _mean(values):
  values = [value for value in values if value is not None]
  return float(np.mean(values)) if values else None


def _unit(row, name):
  """Returns of what a number is one: an image, whatever its masks, or for costs a trial."""
  if name in _COSTS:
    return row.get("batch"), row.get("mask_seed")
  return row.get("victim")


def _statistics(pairs):
  pairs = [(unit, value) for unit, value in pairs if value is not None]
  if not pairs:
    return None
  values = np.asarray([value for _, value in pairs], np.float64)
  functions = {"mean": np.mean, "std": np.std, "median": np.median, "min": np.min, "max": np.max}
  found = {name: float(f(values)) for name, f in functions.items()}
  # Numbers of one unit are not independent, so they are averaged before they are resampled.
  means = pd.Series(values).groupby([str(unit) for unit, _ in pairs]).mean()
  return found | {"count": values.size, "ci95": list(bootstrap_interval(means.to_numpy()))}


def _mean_by_site(rows, column):
  sites = [row[column] for row in rows if row.get(column)]
  names = dict.fromkeys(site for row in sites for site in row)
  return {name: float(np.mean([row[name] for row in sites if name in row])) for name in names}


def table(summaries: dict[str, dict[str, Any]]) -> str:
  """Returns the table that a run ends with.

  Args:
    summaries: of `summarize`, by attack.
  """
  columns = {  # heading -> metric, statistic, format
    "MSE (median)": ("mse_normalized", "median", "{:.2e}"),
    "MSE (worst)": ("mse_normalized", "max", "{:.2e}"),
    "PSNR dB": ("psnr", "mean", "{:.1f}"),
    "SSIM": ("ssim", "mean", "{:.3f}"),
    "LPIPS": ("lpips", "mean", "{:.3f}"),
    "masks right": ("mask_accuracy", "mean", "{:.1%}"),
    "labels right": ("label_accuracy", "mean", "{:.1%}"),
    "iterations": ("iterations", "mean", "{:.0f}"),
  }
  frame = pd.DataFrame(
    {
      heading: {
        attack: form.format(summary["metrics"][metric][statistic])
        if metric in summary["metrics"]
        else "-"
        for attack, summary in summaries.items()
      }
      for heading, (metric, statistic, form) in columns.items()
    }
  )
  frame["images"] = [f"{s['finished']}/{s['attempted']}" for s in summaries.values()]
  frame.index = [attack.upper() for attack in summaries]
  return frame.loc[:, (frame != "-").any()].to_string()


def line(about: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
  """Returns one attack's line in the table of a study.

  Args:
    about: what tells it from the others.
    summary: of `summarize`.
  """
  counts = {name: summary[name] for name in ("attempted", "finished", "failed", "not_applicable")}
  columns = {  # heading -> metric, statistic
    "mse_median": ("mse_normalized", "median"),
    "mse_mean": ("mse_normalized", "mean"),
    "mse_std": ("mse_normalized", "std"),
    "mse_best": ("mse_normalized", "min"),
    "mse_worst": ("mse_normalized", "max"),
    "ssim_mean": ("ssim", "mean"),
    "ssim_median": ("ssim", "median"),
    "ssim_worst": ("ssim", "min"),
    "ssim_best": ("ssim", "max"),
    "lpips_mean": ("lpips", "mean"),
    "masks_right": ("mask_accuracy", "mean"),
    "labels_right": ("label_accuracy", "mean"),
    "iterations": ("iterations", "median"),
    "seconds": ("seconds", "median"),
  }
  metrics = summary["metrics"]
  values = {
    heading: metrics[metric][statistic] if metric in metrics else None
    for heading, (metric, statistic) in columns.items()
  }
  low, high = metrics["ssim"]["ci95"] if "ssim" in metrics else (None, None)
  values |= {"ssim_ci95_low": low, "ssim_ci95_high": high, "iip": summary["iip"]}
  curve = summary["success"].get("ssim", {"thresholds": [], "rate": []})
  rates = dict(zip(curve["thresholds"], curve["rate"], strict=True))
  values |= {f"success_ssim_{level}": rates.get(level, 0.0) for level in SSIM_LEVELS}
  return about | counts | values


def markdown(frame: pd.DataFrame) -> str:
  """Returns a table in Markdown, numbers with three digits.

  Args:
    frame: without a meaningful index.
  """

  def cell(value):
    if value is None or (isinstance(value, float) and np.isnan(value)):
      return "-"
    text = str(value)
    if isinstance(value, float):
      text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("|", "\\|").replace("\n", " ")

  lines = [list(frame.columns), ["---"] * len(frame.columns)]
  lines += [[cell(value) for value in row] for row in frame.itertuples(index=False)]
  return "".join(f"| {' | '.join(row)} |\n" for row in lines)
