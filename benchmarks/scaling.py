"""Throughput against lanes, devices, batch size, hidden width and image size.

python benchmarks/scaling.py

Each table varies one thing and keeps the others: DIA on the MLP, CIFAR-10, batch 1,
width 512, 16 lanes on each device. Devices are real ones, or on CPU as many virtual
ones as --cpu_devices. Throughput is iterations of single trials a second, on all
devices together; times are of the fastest of a few chunks, compilation apart.
"""

import jax
from absl import flags
from measuring import Table, about_device, lanes_timer, make_problems

from jaxdia.command_line import launch

_VARY = flags.DEFINE_list(
  "vary", ["lanes", "devices", "batch_size", "width", "image_size"], "Which tables."
)
_LANES = flags.DEFINE_list("lanes", ["1", "4", "16", "64", "256"], "Lanes on one device.")
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Devices, where there are so many.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "2", "4", "8", "16"], "Images of a client.")
_WIDTHS = flags.DEFINE_list("widths", ["128", "256", "512", "1024", "2048"], "Hidden units.")
_IMAGE_SIZES = flags.DEFINE_list("image_sizes", ["16", "32", "64", "128"], "Sides in pixels.")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 8, "Virtual devices made of the CPU.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "About how long each row is measured.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")

_COLUMNS = {
  "varied": "", "value": "d", "lanes": "d", "devices": "d", "ms": ".3f", "iterations/s": ",.0f",
}  # fmt: skip


def main() -> None:
  """Measures all tables and prints them as one in Markdown."""
  jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
  table = Table(about_device(), _COLUMNS)
  devices = jax.local_devices()

  def add(varied: str, value: int, lanes: int = 16, num_devices: int = 1, **problem: int) -> None:
    problem = {"batch_size": 1, "image_size": 32, "hidden_sizes": (512,) * 3} | problem
    model, observations = make_problems("mlp", "cifar10", lanes, **problem)
    timing = lanes_timer(model, observations, lanes, devices[:num_devices], _SECONDS.value)()
    table.add(
      varied=varied,
      value=value,
      lanes=lanes,
      devices=num_devices,
      ms=timing.ms,
      **{"iterations/s": 1e3 / timing.ms},
    )

  rows = {
    "lanes": (_LANES.value, lambda n: {"lanes": n}),
    "devices": (_DEVICES.value, lambda n: {"lanes": 16 * n, "num_devices": n}),
    "batch_size": (_BATCH_SIZES.value, lambda n: {"batch_size": n}),
    "width": (_WIDTHS.value, lambda n: {"hidden_sizes": (n,) * 3}),
    "image_size": (_IMAGE_SIZES.value, lambda n: {"image_size": n}),
  }
  for varied in _VARY.value:
    values, arguments = rows[varied]
    for value in map(int, values):
      if varied != "devices" or value <= len(devices):
        add(varied, value, **arguments(value))
  table.write(_OUT.value)


if __name__ == "__main__":
  launch(main)
