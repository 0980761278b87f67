"""Progress, tables and pictures of a run."""

from jaxdia.reporting.grid import write_grid
from jaxdia.reporting.progress import ProgressReport
from jaxdia.reporting.tables import METRICS, summarize, table

__all__ = ["METRICS", "ProgressReport", "summarize", "table", "write_grid"]
