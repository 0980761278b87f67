"""DIA with masks that are kept as they were drawn, searched, or rounded at the end.

python launch/evaluate.py --config=configs/studies/masks.py --workdir=runs/masks
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.model.dropout_rate = 0.5
  base.attack.max_iterations = 6_000
  base.attack.tolerance = 0.0  # else a trial may end before its masks are rounded
  return study_config(
    "Masks",
    "What does it take to search the masks: must they move at all, and must they end at 0 and 1?",
    base,
    variants=[
      (("attack.round_masks_after", 0),),
      (("attack.round_masks_after", None),),
      (("attack.round_masks_after", 4_000),),
    ],
  )
