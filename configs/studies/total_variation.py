"""DIA behind convolutions, with more total variation than in the paper.

python launch/evaluate.py --config=configs/studies/total_variation.py --workdir=runs/total_variation
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("lenet", "cifar10")
  base.model.dropout_rate = 0.5
  base.data.count = 8
  base.data.offset = 8  # the weight of dia_tv was chosen on the first 8
  base.attack.max_iterations = 5_000
  return study_config(
    "Total variation",
    "Behind convolutions the image and the first mask trade off: does a smoother image help?",
    base,
    variants=[(("attack.schedule", schedule),) for schedule in ("plateau", "cosine")],
    grid=[("attack.tv_weight", (1e-5, 1e-3, 3e-3, 1e-2, 1e-1))],
  )
