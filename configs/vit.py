"""The paper's vision transformer: patch 4, width 256, 4 blocks, 16 heads, 17 dropout sites.

python launch/attack.py --config=configs/vit.py:cifar10
"""

import ml_collections

from jaxdia.core.errors import InputError
from jaxdia.experiment.config import config_for


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
  """Returns the config for mnist, fashion_mnist, cifar10 or cifar100."""
  if dataset == "imagenet":
    raise InputError("patches of 4 pixels are too many at 224; use configs/vit_b16.py:imagenet.")
  return config_for("vit", dataset, patch_size=4, width=256, depth=4, num_heads=16, mlp_size=256)
