"""Does a larger batch hide its images? DIA and the closed form for batches of 1 to 16.

python launch/evaluate.py --config=configs/studies/batch_size.py --workdir=runs/batch_size
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.attack.name = "dia,closed_form"
  base.attack.max_iterations = 5_000
  base.model.dropout_rate = 0.5
  return study_config(
    "Batch size",
    "Does it protect the images of a client if it takes the gradient of many of them at once?",
    base,
    grid=[("data.batch_size", (1, 2, 4, 8, 16))],
  )
