"""What matching recovered features is worth to a search.

python benchmarks/features.py

The closed form recovers masks and features of a LeNet; its image is not used. DIA with
those masks, from random images, then searches with and without the distance of
features in its objective.
"""

import jax
import numpy as np
from absl import flags
from measuring import Table, about_device

from jaxdia import attacks, closed_form, engine, evaluation
from jaxdia.command_line import launch
from jaxdia.experiment import Clients
from jaxdia.experiment.config import config_for, validate

_WEIGHTS = flags.DEFINE_list("weights", ["0", "0.1", "1", "10"], "attack.feature_weight.")
_DATASET = flags.DEFINE_string("dataset", "cifar10", "Of the samples.")
_COUNT = flags.DEFINE_integer("count", 8, "Images.", lower_bound=1)
_RATE = flags.DEFINE_float("rate", 0.5, "Dropout rate.")
_ITERATIONS = flags.DEFINE_integer("max_iterations", 3_000, "Of each trial.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")


def main() -> None:
  """Measures all weights and prints them as a Markdown table."""
  config = config_for("lenet", _DATASET.value)
  config.data.count, config.model.dropout_rate = _COUNT.value, _RATE.value
  settings = validate(config)
  clients = Clients(settings.clients)
  model, observations = clients.model, clients.unlabelled
  statistics = clients.data.statistics
  parts = []
  for observation in observations:
    found = closed_form.recover(jax.random.key(0), model, observation).parts
    nothing = np.full_like(found.verdict, closed_form.Verdict.NOT_APPLICABLE)
    parts.append(found._replace(verdict=nothing))
  columns = {"feature weight": "g", "median SSIM": ".3f", "median MSE": ".3g", "better": "d"}
  table = Table(about_device(), columns)
  first = None
  for weight in map(float, _WEIGHTS.value):
    attack = attacks.hybrid(model, feature_weight=weight, max_iterations=_ITERATIONS.value)
    task = engine.Task(jax.random.key(1), attack, observations, parts=parts)
    trials = sorted(engine.run([task]), key=lambda t: t.job)
    scores = [
      evaluation.evaluate(
        model, clients.secrets[t.job.observation], t.candidate, statistics
      ).scores[0]
      for t in trials
    ]
    ssim = np.array([score["ssim"] for score in scores])
    first = ssim if first is None else first
    table.add(
      **{
        "feature weight": weight,
        "median SSIM": float(np.median(ssim)),
        "median MSE": float(np.median([score["mse_normalized"] for score in scores])),
        "better": int(np.sum(ssim > first)),
      }
    )
  table.write(_OUT.value)


if __name__ == "__main__":
  launch(main)
