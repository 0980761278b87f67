"""ResNet-18 with group normalisation and dropout before the classifier.

python launch/attack.py --config=configs/resnet18.py:cifar10
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
  """Returns the config for mnist, fashion_mnist, cifar10, cifar100 or imagenet."""
  return config_for("resnet18", dataset, width=64, groups=32)
