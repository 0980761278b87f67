"""A network of your own, by its import path; until one is named, the MLP.

It is a class of modules of Flax Linen, Flax NNX, Equinox or PyTorch, or a function that returns a
module or a `jaxdia.models.DropoutModel`. Options are its arguments; `num_classes` and
`dropout_rate` are passed if it takes them. The current folder and installed packages are searched.

python launch/attack.py --config=configs/own_model.py:mnist \\
    --config.model.name=nets:SmallCNN --config.model.num_filters=8
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "mnist") -> ml_collections.ConfigDict:
  """Returns the config for mnist, fashion_mnist, cifar10, cifar100 or imagenet."""
  return config_for("mlp", dataset)
