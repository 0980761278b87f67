"""What protection costs: accuracy against leakage, over dropout, noise, pruning and training.

python launch/evaluate.py --config=configs/studies/privacy_utility.py --workdir=runs/privacy_utility
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config
from jaxdia.study.plan import Overrides


def _defence(name: str, **settings: float) -> Overrides:
  fields = {"name": name} | settings
  return tuple((f"defence.{field}", value) for field, value in fields.items())


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist", hidden_sizes=(128, 128))
  base.data.source = "sklearn:digits/test"
  base.data.count = 8
  base.data.batch_size = 4
  base.training.source = "sklearn:digits/train"
  base.training.test_source = "sklearn:digits/test"
  base.training.steps = 1_000
  base.attack.name = "ig,dia,hybrid"
  base.attack.max_iterations = 2_000
  return study_config(
    "Privacy and utility",
    "What does a defence cost in accuracy, and what can still be seen?",
    base,
    variants=[
      _defence("none"),
      _defence("gaussian_noise", std=0.3, relative=True),
      _defence("gaussian_noise", std=3.0, relative=True),
      _defence("top_k", share=0.01),
      _defence("dp_sgd", max_norm=1.0, noise_multiplier=0.1),
      _defence("dp_sgd", max_norm=1.0, noise_multiplier=0.3),
      _defence("dp_sgd", max_norm=1.0, noise_multiplier=1.0),
    ],
    grid=[
      ("model.dropout_rate", (0.0, 0.25, 0.5)),
      ("training.attacked_after", (0, 100, 1_000)),
    ],
  )
