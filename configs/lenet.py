"""A LeNet-style network: three 5x5 convolutions, GELU, one hidden dense layer.

python launch/attack.py --config=configs/lenet.py:cifar10
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
  """Returns the config for mnist, fashion_mnist, cifar10, cifar100 or imagenet."""
  return config_for("lenet", dataset, channels=12, hidden_size=256)
