"""FedAvg: clients that take several local steps, each with dropout masks of its own.

python launch/attack.py --config=configs/fedavg.py
"""

import ml_collections

from jaxdia.experiment.config import config_for


def get_config(dataset: str = "mnist") -> ml_collections.ConfigDict:
  """Returns the config: two epochs of two steps, on four images."""
  config = config_for("mlp", dataset, hidden_sizes=(512, 512, 512), use_bias=False)
  config.data.count = 8
  config.data.batch_size = 4
  config.model.dropout_rate = 0.5
  config.local.epochs = 2
  config.local.steps = 2
  config.attack.name = "ig,wiig,dia,hybrid"
  config.attack.schedule = "cosine"
  config.attack.labels = "given"
  config.attack.max_iterations = 1_000
  return config
