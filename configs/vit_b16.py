"""ViT-B/16 at 224 pixels: 86 million parameters, 49 dropout sites.

python launch/attack.py --config=configs/vit_b16.py:imagenet
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "imagenet") -> ml_collections.ConfigDict:
  """Returns the config for imagenet, or for a smaller data set scaled up to 224 pixels."""
  config = config_for("vit_b16", dataset)
  config.data.image_size = 224
  config.data.count = 1  # an iteration takes about three seconds on two CPU cores
  return config
