"""Depth and width of the MLP, attacked by WIIG and DIA.

python launch/evaluate.py --config=configs/studies/depth_and_width.py --workdir=runs/depth_and_width
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.attack.name = "wiig,dia"
  base.attack.max_iterations = 5_000
  base.model.dropout_rate = 0.5
  base.data.count = 8
  sizes = [(512,) * depth for depth in (1, 2, 3, 5)] + [(width,) * 3 for width in (64, 128, 1024)]
  return study_config(
    "Depth and width",
    "Is a deeper or a narrower network safer?",
    base,
    grid=[("model.hidden_sizes", sizes)],
  )
