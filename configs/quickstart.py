"""IG, WIIG and DIA on four MNIST digits behind dropout of rate 0.5, in a minute.

python launch/attack.py --config=configs/quickstart.py
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "mnist") -> ml_collections.ConfigDict:
  """Returns the config; its trials are shorter than the paper's."""
  config = config_for("mlp", dataset, hidden_sizes=(512, 512, 512), use_bias=False)
  config.data.count = 4
  config.model.dropout_rate = 0.5
  config.attack.name = "ig,wiig,dia"
  config.attack.max_iterations = 2_000
  return config
