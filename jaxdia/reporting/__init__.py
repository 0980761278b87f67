"""Progress, tables and pictures of a run."""

from jaxdia.reporting.grid import write_grid
from jaxdia.reporting.progress import ProgressReport, StudyProgress, duration
from jaxdia.reporting.publish import publish
from jaxdia.reporting.report import write_report
from jaxdia.reporting.results import Cell, read_experiment
from jaxdia.reporting.scalars import write_scalars
from jaxdia.reporting.tables import METRICS, line, markdown, summarize, table

__all__ = [
  "METRICS",
  "Cell",
  "ProgressReport",
  "StudyProgress",
  "duration",
  "line",
  "markdown",
  "publish",
  "read_experiment",
  "summarize",
  "table",
  "write_grid",
  "write_report",
  "write_scalars",
]
