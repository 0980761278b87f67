"""How much dropout does it take? IG, WIIG, DIA and the closed form at rates from 0 to 0.75.

python launch/evaluate.py --config=configs/studies/dropout_rate.py --workdir=runs/dropout_rate
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.attack.name = "ig,wiig,dia,closed_form"
  return study_config(
    "Dropout rate",
    "Does more dropout protect the images of a client?",
    base,
    grid=[("model.dropout_rate", (0.0, 0.1, 0.25, 0.5, 0.75))],
  )
