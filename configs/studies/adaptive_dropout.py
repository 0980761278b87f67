"""Whether dropout protects if its rate is not told, or its masks are drawn anew within the step.

python launch/evaluate.py --config=configs/studies/adaptive_dropout.py --workdir=runs/adaptive_dropout
"""  # noqa: E501

import ml_collections

from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def _drawn(lowest: float, highest: float, draws: int) -> tuple[tuple[str, float], ...]:
  fields = {"lowest": lowest, "highest": highest, "draws": draws}
  return tuple((f"defence.{field}", value) for field, value in fields.items())


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of the study."""
  base = config_for("mlp", "mnist")
  base.data.count = 8
  base.model.dropout_rate = 0.5  # that attacks assume
  base.defence.name = "adaptive_dropout"
  base.attack.max_iterations = 2_000
  return study_config(
    "Adaptive dropout",
    "Does dropout protect if nobody is told its rate, or if masks are drawn several times a step?",
    base,
    variants=[
      _drawn(0.5, 0.5, 1),
      _drawn(0.25, 0.75, 1),
      _drawn(0.1, 0.9, 1),
      _drawn(0.5, 0.5, 2),
      _drawn(0.5, 0.5, 4),
      _drawn(0.5, 0.5, 16),
    ],
    grid=[("attack.name", ("ig", "dia"))],
  )
