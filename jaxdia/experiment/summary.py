"""What the rows of an attack say together."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxdia import evaluation
from jaxdia.evaluation import Metric
from jaxdia.experiment.schema import AttackSummary, Curve, MetricSummary, Row


def summarize(rows: Sequence[Row], attempted: int, **more: Any) -> AttackSummary:
  """Summarises the results of one attack.

  Args:
    rows: one an image.
    attempted: number of images that were to be attacked.
    **more: fields of the summary that rows do not tell: told, defence, pool, accuracy,
      epsilon, run_seconds, compile_seconds, scoring_seconds.

  Returns:
    The counts, and for each metric mean, std, median, min and max over the
    `count` images that have it, and the ends of a bootstrap interval of the mean, `ci95`. A
    failed image has no metrics, one to which no closed form applies none of its image.
  """
  failed, not_applicable = (
    sum(row.status == status for row in rows) for status in ("failed", "not_applicable")
  )
  registry = evaluation.REGISTRY.values()
  metrics = {
    m.name: _statistics(m, rows, lambda row, m=m: row.score(m.name))
    for m in registry
    if m.of in ("image", "trial")
  }
  oracle = {
    name: _statistics(evaluation.find(name), rows, lambda row, n=name: (row.oracle or {}).get(n))
    for name in ("mse_normalized", "ssim")
  }
  identified = metrics["identified"]
  return AttackSummary(
    attempted=attempted,
    finished=len(rows) - failed - not_applicable,
    failed=failed,
    not_applicable=not_applicable,
    metrics={name: found for name, found in metrics.items() if found},
    success={
      m.name: Curve(
        thresholds=list(m.thresholds),
        rate=evaluation.success_rates(
          [row.score(m.name) for row in rows], attempted, m.thresholds, m.larger_is_better
        ),
      )
      for m in registry
      if m.thresholds and metrics[m.name]
    },
    iip=identified and identified.mean,
    oracle={name: found for name, found in oracle.items() if found},
    **{m.name: _mean_by_site(row.scores.get(m.name) for row in rows) for m in registry
       if m.of == "site"},
    **more,
  )  # fmt: skip


def _statistics(
  metric: Metric, rows: Sequence[Row], score: Callable[[Row], float | None]
) -> MetricSummary | None:
  """Returns the statistics of one number a row, or None if no row has it."""
  rows = [row for row in rows if score(row) is not None]
  if not rows:
    return None
  values = np.asarray([score(row) for row in rows], np.float64)
  functions = {"mean": np.mean, "std": np.std, "median": np.median, "min": np.min, "max": np.max}
  # Numbers of one unit are not independent, so they are averaged before they are resampled.
  trial = metric.of == "trial"
  units = [str((row.client, row.mask_seed) if trial else row.image) for row in rows]
  means = pd.Series(values).groupby(units).mean()
  return MetricSummary(
    **{name: float(f(values)) for name, f in functions.items()},
    count=values.size,
    ci95=evaluation.bootstrap_interval(np.asarray(means)),
  )


def _mean_by_site(rows: Iterable[Any]) -> dict[str, float]:
  """Returns means over the rows that have a site; a row may be None."""
  return pd.DataFrame([row for row in rows if row]).mean().to_dict()
