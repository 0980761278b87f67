"""The effect of dropout on IG, WIIG and DIA, for each architecture.

The ViT, and the ResNet, which is a narrow one, are attacked on fewer images and more briefly.

python launch/evaluate.py --config=configs/studies/architectures.py --workdir=runs/architectures
"""

import ml_collections

from jaxdia.config import config_for
from jaxdia.study import study_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.attack.name = "ig,wiig,dia"
  base.attack.max_iterations = 3_000
  base.data.count = 8
  small = (("data.count", 2), ("attack.max_iterations", 1_500))
  return study_config(
    "Architectures",
    "For which kinds of network does dropout keep images from the server?",
    base,
    variants=[
      (("model.name", "mlp"),),
      (("model.name", "lenet"),),
      (
        *(("model.name", "resnet18"), ("model.width", 16), ("model.groups", 8)),
        *(("data.count", 2), ("attack.max_iterations", 500)),
      ),
      (("model.name", "vit"), *small),
    ],
    grid=[("model.dropout_rate", (0.0, 0.5))],
  )
