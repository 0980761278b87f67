"""Runs a study: a grid of experiments, as a config says.

python launch/evaluate.py --config=configs/studies/dropout_rate.py --dry_run
python launch/evaluate.py --config=configs/studies/dropout_rate.py --workdir=runs/dropout_rate

A larger version is the same config with other arguments, for what it does not vary itself, such as
--config.base.data.source=tfds:mnist/test --config.base.data.count=128. The same
command after an interruption goes on where it was. A cell that fails is recorded
with its reason and the others go on; then the exit code is 3.
"""

import sys

from absl import flags
from ml_collections import config_flags

from jaxdia import study
from jaxdia.command_line import cluster_flag, default_workdir, launch, where

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file of the study: one of configs/studies/. Fields of the experiments are"
  " --config.base.data.count=128, --config.base.attack.max_iterations=2000 and so on.",
  lock_config=False,
  accept_new_attributes=True,  # options of a network of the user's own; others are refused later
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results are written; by default runs/NAME of the config."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the cells and what they may cost, and end.")
_CLUSTER = cluster_flag()
flags.mark_flag_as_required("config")


def main() -> int:
  """Runs the study of the config in the work directory."""
  if _DRY_RUN.value:
    print(study.describe(_CONFIG.value))
    return 0
  failures = study.run(_CONFIG.value, _WORKDIR.value or default_workdir(), cluster=where(_CLUSTER))
  for name, reason in failures.items():
    print(f"failed: {name}: {reason}", file=sys.stderr)
  return 3 if failures else 0


def run() -> None:
  """Parses the flags and runs the command; see `jaxdia.command_line.launch`."""
  launch(main, _CONFIG)
