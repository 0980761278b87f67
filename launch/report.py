"""Writes one page about finished results: report.html in their folder.

python launch/report.py --workdir=runs/quickstart

The folder is the work directory of an experiment or of a study. The page needs no
other file and no network: it can be mailed, printed, and read on a phone.
"""

import pathlib

from absl import flags

from jaxdia.command_line import launch
from jaxdia.reporting.report import write_report

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Work directory of a finished experiment or of a study."
)
flags.mark_flag_as_required("workdir")


def main() -> None:
  """Writes the report of the work directory."""
  print(f"report: {write_report(pathlib.Path(_WORKDIR.value))}")


if __name__ == "__main__":
  launch(main)
