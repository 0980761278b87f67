"""Attacks the gradients of clients that train a language model, and writes what was read.

python launch/text.py --config=configs/text.py
python launch/text.py --config=configs/text.py:gpt --config.data.batch_size=8 \\
    --config.data.length=16 --config.model.dropout_rate=0.25
python launch/text.py --config=configs/text.py --config.data.source=text:letters.txt \\
    --config.attack.name=tokens,dager,dia

Written are results.jsonl, summary.json, and report.html, with texts side by side. The same command
after an interruption goes on with the client that it was at.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from jaxdia.command_line import default_workdir, launch
from jaxdia.experiment.text import run_text
from jaxdia.report.text import write_text_report

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, configs/text.py:{bert,gpt}. Common fields: --config.attack.name=tokens,dager,dia"
  " --config.data.source=text:FILE --config.data.count=16 --config.data.batch_size=4"
  " --config.data.length=32 --config.model.dropout_rate=0.1 --config.model.width=768"
  " --config.frozen_embedding=False --config.defence.name=gaussian_noise --config.seed=1.",
  lock_config=False,
  accept_new_attributes=True,  # fields of a defence; others are refused later
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results are written; by default runs/text.")
flags.mark_flag_as_required("config")


def main() -> None:
  """Runs the experiment of the config, and writes the report."""
  workdir = pathlib.Path(_WORKDIR.value or default_workdir())
  run_text(_CONFIG.value, workdir)
  print(f"report: {write_text_report(workdir)}")


def run() -> None:
  """Parses the flags and runs the command; see `jaxdia.command_line.launch`."""
  launch(main, _CONFIG)
