"""Milliseconds for an iteration of one trial, against the number of lanes.

python benchmarks/iteration.py
python benchmarks/iteration.py --cases=mlp:mnist,mlp:cifar10 --lanes=1,4,16,64,256

Each row is one compiled program: DIA on as many clients as lanes, batch 1, dropout
rate 0.5. Lanes are shared by all devices where they divide them: on CPU each core is
one, unless JAX_NUM_CPU_DEVICES says otherwise. Operations and memory are those that
XLA counts in one iteration of all lanes on one device; the rate is compared with that
of a large matrix product, measured in the same run. Times are of the fastest of a few
chunks, compilation apart.
"""

import jax
from absl import flags
from measuring import Table, about_device, cost, lanes_timer, make_problems

from jaxdia.command_line import launch

_CASES = flags.DEFINE_list(
  "cases",
  ["mlp:mnist", "mlp:cifar10", "lenet:cifar10", "resnet18:cifar10", "vit:cifar10"],
  "MODEL:DATASET, ...; vit_b16:imagenet takes minutes.",
)
_LANES = flags.DEFINE_list("lanes", ["1", "16"], "Numbers of lanes.")
_MATCHING = flags.DEFINE_list("matching", ["formed", "auto"], "Ways to compare gradients.")
_RESTARTS = flags.DEFINE_bool("restarts", False, "All lanes attack the same client.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "About how long each row is measured.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")


def main() -> None:
  """Measures all rows and prints them as a Markdown table."""
  jax.config.update("jax_enable_compilation_cache", False)  # to see how long compiling takes
  columns = {
    "model": "", "data": "", "matching": "", "lanes": "d", "ms": ".3f", "compile s": ".1f",
    "MFLOP": ".1f", "GFLOP/s": ".0f", "of matrix product": ".0%", "MiB": ".0f",
  }  # fmt: skip
  about = about_device()
  table = Table(about, columns)
  devices = jax.local_devices()
  for case in _CASES.value:
    name, dataset = case.split(":")
    for method in _MATCHING.value:
      for lanes in map(int, _LANES.value):
        model, observations = make_problems(name, dataset, 1 if _RESTARTS.value else lanes)
        used = devices if lanes % len(devices) == 0 else devices[:1]
        timing = lanes_timer(model, observations, lanes, used, _SECONDS.value, method)()
        operations, memory = cost(model, observations, lanes // len(used), method)
        rate = operations / timing.ms / 1e6
        table.add(
          **{
            "model": name,
            "data": dataset,
            "matching": method,
            "lanes": lanes,
            "ms": timing.ms,
            "compile s": timing.compile_seconds,
            "MFLOP": operations / 1e6,
            "GFLOP/s": rate,
            "of matrix product": rate / about["matrix product GFLOP/s"],
            "MiB": memory / 2**20,
          }  # fmt: skip
        )
  table.write(_OUT.value)


if __name__ == "__main__":
  launch(main)
