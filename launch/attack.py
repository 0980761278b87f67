"""Attacks client gradients as a config says, and writes what was reconstructed.

  python launch/attack.py --config=configs/quickstart.py
  python launch/attack.py --config=configs/mlp.py:mnist --workdir=runs/mnist
  python launch/attack.py --config=configs/mlp.py:mnist --workdir=runs/ig \\
      --config.attack.name=ig --config.model.dropout_rate=0.5

Any field of the config can be overridden as above; --help lists the common ones.
The same command after an interruption goes on where it was.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxdia import experiment
from jaxdia.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with its data set after a colon where it takes one:"
  " configs/{mlp,lenet,resnet18,vit,vit_b16}.py:{mnist,cifar10,imagenet} or"
  " configs/quickstart.py. Common fields: --config.attack.name=ig,wiig,dia"
  " --config.attack.restarts=4 --config.attack.max_iterations=2000 --config.data.count=16"
  " --config.data.source=npz:PATH --config.data.batch_size=4 --config.model.dropout_rate=0.5"
  " --config.seed=1.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results are written; runs/NAME of the config by default."
)


def main(argv: list[str]) -> None:
  """Runs the experiment; a fault of the input ends it with one line and exit code 2."""
  logging.set_verbosity(logging.WARNING)  # JAX tells of each backend that is not there
  try:
    if len(argv) > 1:
      raise InputError(f"unknown arguments {argv[1:]}; settings are given as --config.FIELD=VALUE.")
    experiment.run(_CONFIG.value, _WORKDIR.value or _default_workdir())
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(130)


def _default_workdir() -> str:
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  name = path.replace("\\", "/").rsplit("/", 1)[-1]
  return "runs/" + name.replace(".py", "").replace(":", "_")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
