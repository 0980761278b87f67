"""What it costs to keep images while a reconstruction forms.

python benchmarks/recording.py

Each row times DIA twice, in turns on the same clients: as it is run by the launcher,
which keeps the best images after 36 numbers of iterations, and without.
"""

import jax
from absl import flags
from measuring import Table, about_device, lanes_timer, make_problems

from jaxdia.attacks import AttackSettings
from jaxdia.command_line import launch
from jaxdia.engine import recorded_iterations

_CASES = flags.DEFINE_list("cases", ["mlp:mnist", "mlp:cifar10", "vit:cifar10"], "MODEL:DATASET.")
_LANES = flags.DEFINE_integer("lanes", 8, "Trials at once.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "About how long each timing takes.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each; the least counts.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")


def main() -> None:
  """Measures all rows and prints them as a Markdown table."""
  columns = {
    "model": "",
    "data": "",
    "lanes": "d",
    "ms": ".4f",
    "ms recorded": ".4f",
    "cost": ".1%",
  }
  table = Table(about_device(), columns)
  devices = jax.local_devices()
  recorded = recorded_iterations(AttackSettings().max_iterations)
  for case in _CASES.value:
    name, dataset = case.split(":")
    model, observations = make_problems(name, dataset, _LANES.value)
    used = devices if _LANES.value % len(devices) == 0 else devices[:1]
    timers = [
      lanes_timer(model, observations, _LANES.value, used, _SECONDS.value, recorded=r)
      for r in ((), recorded)
    ]
    rounds = [[timer().ms for timer in timers] for _ in range(_ROUNDS.value)]
    plain, with_images = (min(times) for times in zip(*rounds, strict=True))
    table.add(
      **{
        "model": name,
        "data": dataset,
        "lanes": _LANES.value,
        "ms": plain,
        "ms recorded": with_images,
        "cost": with_images / plain - 1,
      }
    )
  table.write(_OUT.value)


if __name__ == "__main__":
  launch(main)
