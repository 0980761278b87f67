"""Numbers for people: summaries of results, and the table at the end of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

METRICS = ("mse_normalized", "mse", "psnr", "ssim", "lpips", "mask_accuracy", "label_accuracy")
_COSTS = ("objective", "gradient_distance", "iterations", "seconds")


def summarize(rows: Sequence[dict[str, Any]], attempted: int) -> dict[str, Any]:
  """Summarises the results of one attack.

  Args:
    rows: one dictionary an image, as in results.jsonl.
    attempted: number of images that were to be attacked.

  Returns:
    The counts, and for each metric mean, std, median, min and max over the
    `count` images that have it. A failed image has no metrics, one to which no closed
    form applies none of its image.
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
      if (statistics := _statistics([row[name] for row in rows]))
    },
    "mask_accuracy_by_site": _mean_by_site(rows),
  }


def _statistics(values):
  values = np.asarray([value for value in values if value is not None], np.float64)
  if not values.size:
    return None
  functions = {"mean": np.mean, "std": np.std, "median": np.median, "min": np.min, "max": np.max}
  return {name: float(f(values)) for name, f in functions.items()} | {"count": values.size}


def _mean_by_site(rows):
  sites = [row["mask_accuracy_by_site"] for row in rows if row["mask_accuracy_by_site"]]
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
