"""Writes one page about finished results: report.html in their folder.

python launch/report.py --workdir=runs/quickstart

The folder is the work directory of an experiment or of a study. The page needs no
other file and no network: it can be mailed, printed, and read on a phone.
"""

import pathlib

from absl import flags

from jaxdia.command_line import launch
from jaxdia.report import publish, write_report, write_scalars

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Work directory of a finished experiment or of a study."
)
_TENSORBOARD = flags.DEFINE_bool(
  "tensorboard", False, "Also write scalars into the folder tensorboard/ there; needs tensorboardX."
)
_PUBLISH = flags.DEFINE_string(
  "publish", None, "Also write the study's table and figures here: FOLDER/NAME.md and beside it."
)
flags.mark_flag_as_required("workdir")


def main() -> None:
  """Writes the report of the work directory."""
  workdir = pathlib.Path(_WORKDIR.value)
  print(f"report: {write_report(workdir)}")
  if _PUBLISH.value:
    target = pathlib.Path(_PUBLISH.value.removesuffix(".md"))
    print(f"table: {publish(workdir, target.parent, target.name)}")
  if _TENSORBOARD.value:
    print(f"scalars: tensorboard --logdir={write_scalars(workdir)}")


def run() -> None:
  """Parses the flags and runs the command; see `jaxdia.command_line.launch`."""
  launch(main)
