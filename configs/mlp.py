"""The paper's MLP: 512-512-512 without biases, GELU.

python launch/attack.py --config=configs/mlp.py:mnist
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "mnist") -> ml_collections.ConfigDict:
  """Returns the config for mnist, fashion_mnist, cifar10, cifar100 or imagenet."""
  return config_for("mlp", dataset, hidden_sizes=(512, 512, 512), use_bias=False)
