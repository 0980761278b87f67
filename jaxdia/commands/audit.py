"""Says what a server could see in an update that a client sent.

python launch/audit.py --config=configs/audit.py --config.model.name=nets:SmallCNN \\
    --config.before=before.safetensors --config.after=after.safetensors \\
    --config.learning_rate=0.1 --config.batch_size=4
python launch/audit.py --config=configs/audit.py --config.model.name=mlp \\
    --config.before=weights.npz --config.gradient=gradient.npz

The network is a built-in one or your own, by its import path: a module of Flax (Linen or NNX),
Equinox or PyTorch, or what makes one. Nothing of the client's data is needed. Written are
audit.json, the images that were found, and report.html, which begins with the answer. The same
command after an interruption goes on with the update that it was at.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from jaxdia import audit
from jaxdia.command_line import default_workdir, launch
from jaxdia.report import write_audit_report

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, configs/audit.py, in which every field is explained. Common fields:"
  " --config.model.name=nets:SmallCNN --config.image_shape=(32,32,3) --config.num_classes=10"
  " --config.before=FILE --config.after=FILE,... or --config.gradient=FILE,..."
  " --config.batch_size=4 --config.learning_rate=0.1 --config.statistics=cifar10"
  " --config.seconds=60 --config.truth=FILE.npz.",
  lock_config=False,
  accept_new_attributes=True,  # options of a network of the user's own; others are refused later
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results are written; by default runs/audit.")
flags.mark_flag_as_required("config")


def main() -> None:
  """Audits the updates of the config, and writes the report."""
  workdir = pathlib.Path(_WORKDIR.value or default_workdir())
  audit.run(_CONFIG.value, workdir)
  print(f"report: {write_audit_report(workdir)}")


def run() -> None:
  """Parses the flags and runs the command; see `jaxdia.command_line.launch`."""
  launch(main, _CONFIG)
