"""A plain deep ConvNet: eight 3x3 convolutions, two poolings with dropout, a classifier.

python launch/attack.py --config=configs/convnet.py:cifar10
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
  """Returns the config for mnist, fashion_mnist, cifar10, cifar100 or imagenet."""
  return config_for("convnet", dataset, width=64, groups=32, activation="relu", pool="max")
