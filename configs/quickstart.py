"""IG, WIIG and DIA on four MNIST digits behind dropout of rate 0.5, in a minute.

python launch/attack.py --config=configs/quickstart.py
"""

import ml_collections

from jaxdia.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; its trials are shorter than the paper's."""
  config = default_config()
  config.data.count = 4
  config.model.dropout_rate = 0.5
  config.attack.name = "ig,wiig,dia"
  config.attack.max_iterations = 2_000
  return config
