"""Labels given to DIA, read from the gradient, or searched, for batches of 1 and 4.

python launch/evaluate.py --config=configs/studies/labels.py --workdir=runs/labels
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.model.dropout_rate = 0.5
  base.attack.max_iterations = 5_000
  return study_config(
    "Labels",
    "What is it worth to DIA to be told the labels?",
    base,
    grid=[("attack.labels", ("given", "recovered", "free")), ("data.batch_size", (1, 4))],
  )
