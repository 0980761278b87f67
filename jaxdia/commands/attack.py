"""Attacks client gradients as a config says, and writes what was reconstructed.

python launch/attack.py --config=configs/quickstart.py
python launch/attack.py --config=configs/mlp.py:mnist --workdir=runs/mnist
python launch/attack.py --config=configs/mlp.py:mnist --workdir=runs/ig \\
    --config.attack.name=ig --config.model.dropout_rate=0.5

Any field of the config can be overridden as above. A Flax network of your own, here the class
SmallCNN in the file nets.py of the current folder, is attacked with its arguments:

python launch/attack.py --config=configs/own_model.py:mnist \\
    --config.model.name=nets:SmallCNN --config.model.num_filters=8

The same command after an interruption goes on where it was.
"""

from absl import flags
from ml_collections import config_flags

from jaxdia import experiment
from jaxdia.command_line import cluster_flag, default_workdir, launch, where

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with its data set after a colon where it takes one:"
  " configs/{mlp,lenet,convnet,resnet18,vit,vit_b16,own_model}.py:{mnist,cifar10,imagenet} or"
  " configs/quickstart.py. Common fields: --config.attack.name=ig,wiig,dia,closed_form,hybrid"
  " --config.attack.restarts=4 --config.attack.max_iterations=2000"
  " --config.data.source=npz:PATH --config.data.count=16 --config.data.batch_size=4"
  " --config.model.dropout_rate=0.5 --config.seed=1.",
  lock_config=False,
  accept_new_attributes=True,  # options of a network of the user's own; others are refused later
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results are written; by default runs/NAME of the config."
)
_CLUSTER = cluster_flag()
flags.mark_flag_as_required("config")


def main() -> None:
  """Runs the experiment of the config in the work directory."""
  experiment.run(_CONFIG.value, _WORKDIR.value or default_workdir(), cluster=where(_CLUSTER))


def run() -> None:
  """Parses the flags and runs the command; see `jaxdia.command_line.launch`."""
  launch(main, _CONFIG)
