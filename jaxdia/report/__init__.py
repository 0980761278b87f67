"""Pages and files made of finished results alone."""

from jaxdia.report.audit import write_audit_report
from jaxdia.report.page import write_report
from jaxdia.report.publish import publish
from jaxdia.report.results import CellResults, read_experiment, read_study
from jaxdia.report.scalars import write_scalars

__all__ = [
  "CellResults",
  "publish",
  "read_experiment",
  "read_study",
  "write_audit_report",
  "write_report",
  "write_scalars",
]
