"""What defences are worth against an attacker who knows them, and one who does not.

python launch/evaluate.py --config=configs/studies/defences.py --workdir=runs/defences
"""

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config
from jaxdia.study.plan import Overrides


def _defence(name: str, **settings) -> Overrides:
  fields = {"name": name} | settings
  return tuple((f"defence.{field}", value) for field, value in fields.items())


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.data.count = 8
  base.model.dropout_rate = 0.5
  base.attack.max_iterations = 2_000
  return study_config(
    "Defences",
    "What is a defence worth if the attacker knows it, and what if it does not?",
    base,
    variants=[
      _defence("none"),
      _defence("clipping,gaussian_noise", max_norm=1.0, std=1e-3),
      _defence("gaussian_noise", std=0.3, relative=True),
      _defence("gaussian_noise", std=3.0, relative=True),
      _defence("top_k", share=0.1),
      _defence("top_k", share=0.01),
      _defence("percentile", percentile=50.0, gamma=0.01),
      _defence("quantisation", bits=8),
      _defence("rounding", dtype="bfloat16"),
      _defence("soteria", pruned=0.5),
      _defence("dp_sgd", max_norm=1.0, noise_multiplier=1e-3),
    ],
    grid=[("attack.defence", ("known", "ignored"))],
  )
