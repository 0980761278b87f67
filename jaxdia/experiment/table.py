"""Tables for people: at the end of a run, in Markdown, and the list of all metrics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxdia import evaluation
from jaxdia.experiment.schema import AttackSummary


def table(summaries: Mapping[str, AttackSummary]) -> str:
  """Returns the table that a run ends with.

  Args:
    summaries: by attack.
  """
  columns = {
    metric.heading(column): [
      format_number(metric.name, column.statistic, summary.number(metric.name, column.statistic))
      for summary in summaries.values()
    ]
    for metric, column in evaluation.columns("run")
  }
  columns["images"] = [f"{s.finished}/{s.attempted}" for s in summaries.values()]
  frame = pd.DataFrame(columns, index=[attack.upper() for attack in summaries])
  return frame.loc[:, (frame != "–").any()].to_string()


def format_number(metric: str, statistic: str, value: float | None) -> str:
  """Returns a statistic of a metric as people read it.

  Args:
    metric: its name.
    statistic: such as "median".
    value: a dash is written if None.
  """
  if value is None:
    return "–"
  form = evaluation.find(metric.removeprefix("oracle.")).format
  if statistic.startswith("success_at_"):
    form = "{:.1%}"
  return ("{:,.0f}" if statistic == "count" else form).format(value)


def markdown_row(cells: Iterable[Any]) -> str:
  """Returns one line of a Markdown table: numbers with three digits, a dash for what is missing."""
  return f"| {' | '.join(map(_cell, cells))} |\n"


def markdown(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
  """Returns a table in Markdown.

  Args:
    headings: of the columns.
    rows: of cells; see `markdown_row`.
  """
  return "".join(map(markdown_row, [headings, ["---"] * len(headings), *rows]))


def metrics_markdown() -> str:
  """Returns the registry as a table in Markdown, which `docs/outputs.md` shows."""
  better = {True: "more", False: "less", None: ""}
  return markdown(
    ("field", "is called", "of one", "better for the attacker", "meaning"),
    (
      (f"`{m.name}`", m.title, m.of, better[m.larger_is_better], m.meaning)
      for m in evaluation.REGISTRY.values()
    ),
  )


def _cell(value: Any) -> str:
  if value is None or (isinstance(value, float) and np.isnan(value)):
    return "-"
  text = str(value)
  if isinstance(value, float):
    text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
  return text.replace("|", "\\|").replace("\n", " ")
