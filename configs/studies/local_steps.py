"""What is left to see of a client that took several local steps before it sent anything.

With ":full" after the name of this file LeNet and CIFAR-10 are attacked too.

python launch/evaluate.py --config=configs/studies/local_steps.py --workdir=runs/local_steps
"""

import ml_collections

from jaxdia.core.errors import unknown
from jaxdia.experiment.config import config_for
from jaxdia.study import study_config

_EPOCHS = (2, 5, 10)
_RATES = (0.001, 0.01, 0.03)


def get_config(size: str = "small") -> ml_collections.ConfigDict:
  """Returns the config of the study.

  Args:
    size: "small" for two CPU cores and half an hour, or "full".
  """
  base = config_for("mlp", "mnist")
  base.model.dropout_rate = 0.5
  base.data.count = 8
  base.data.batch_size = 4
  base.attack.name = "ig,wiig,dia,hybrid"
  base.attack.schedule = "cosine"
  base.attack.labels = "given"
  base.attack.max_iterations = 1_000
  networks: list[tuple[tuple[str, object], ...]] = [()]
  if size == "full":
    cifar10 = (("data.source", "samples:cifar10"),)
    networks += [cifar10, (("model.name", "lenet"),), (("model.name", "lenet"), *cifar10)]
  elif size != "small":
    raise unknown("size of the study:", size, ("small", "full"))
  steps = [(("local.epochs", 1), ("local.learning_rate", _RATES[0]))]
  steps += [
    (("local.epochs", epochs), ("local.learning_rate", rate))
    for epochs in _EPOCHS
    for rate in _RATES
  ]
  # Four steps with an image each, and two epochs of these.
  steps += [
    (("local.epochs", epochs), ("local.learning_rate", 0.01), ("local.steps", 4))
    for epochs in (1, 2)
  ]
  return study_config(
    "Local steps",
    "What is left to see of a client that takes several local steps?",
    base,
    variants=[(*network, *chosen) for network in networks for chosen in steps],
  )
