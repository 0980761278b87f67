"""What is left to see of a client that took several local steps before it sent anything.

With ":others" after the name of this file CIFAR-10 and the LeNet are attacked, at fewer of the
steps and learning rates.

python launch/evaluate.py --config=configs/studies/local_steps.py --workdir=runs/local_steps
"""

import ml_collections

from jaxdia.core.errors import unknown
from jaxdia.experiment.config import config_for
from jaxdia.study import study_config
from jaxdia.study.plan import Overrides

_EPOCHS = (2, 5, 10)
_RATES = (0.001, 0.01, 0.03)


def _epochs(number: int, rate: float) -> Overrides:
  return (("local.epochs", number), ("local.learning_rate", rate))


def get_config(networks: str = "mlp") -> ml_collections.ConfigDict:
  """Returns the config of the study.

  Args:
    networks: "mlp" for MNIST behind the MLP, half an hour on two CPU cores, or "others".
  """
  base = config_for("mlp", "mnist")
  base.model.dropout_rate = 0.5
  base.data.count = 8
  base.data.batch_size = 4
  base.attack.name = "ig,wiig,dia,hybrid"
  base.attack.schedule = "cosine"
  base.attack.labels = "given"
  base.attack.max_iterations = 1_000
  if networks == "mlp":
    variants = [
      _epochs(1, _RATES[0]),
      *(_epochs(number, rate) for number in _EPOCHS for rate in _RATES),
      # Four steps with an image each, and two epochs of these.
      *((*_epochs(number, 0.01), ("local.steps", 4)) for number in (1, 2)),
    ]
  elif networks == "others":
    cifar10 = (("data.source", "samples:cifar10"),)
    # A search behind convolutions needs more total variation and more iterations.
    lenet = (("model.name", "lenet"), ("attack.name", "ig,wiig,dia_tv,hybrid_tv"))
    lenet += (("attack.max_iterations", 2_000),)
    steps = [_epochs(number, 0.01) for number in (1, *_EPOCHS)]
    steps += [_epochs(5, rate) for rate in _RATES if rate != 0.01]
    variants = [(*of, *one) for of in (cifar10, lenet, (*lenet, *cifar10)) for one in steps]
  else:
    raise unknown("networks of the study:", networks, ("mlp", "others"))
  return study_config(
    "Local steps",
    "What is left to see of a client that takes several local steps?",
    base,
    variants=variants,
  )
