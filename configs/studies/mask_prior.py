"""The weight of the mask prior in DIA: four decades, and none.

python launch/evaluate.py --config=configs/studies/mask_prior.py --workdir=runs/mask_prior
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.model.dropout_rate = 0.5
  return study_config(
    "Mask prior",
    "Does DIA need to be told how many units were dropped?",
    base,
    grid=[("attack.mask_weight", (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1))],
  )
