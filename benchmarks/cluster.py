"""A cluster of processes on this machine against one process on one core.

python benchmarks/cluster.py

Each row is the same experiment by the launcher, in a new folder, with what is compiled in a cache:
without a cluster on one core, and with as many workers as named, which share the cores. Efficiency
is the rate by that of one core, and by the cores that the workers have. The time in which a run is
begun and ended is apart: that of the same command where all is finished. The last lines are what
one part costs by itself: bytes that go to a worker, and bytes and seconds back.
"""

import contextlib
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time

from absl import flags
from measuring import Table, about_device

from jaxdia.command_line import launch
from jaxdia.core.machine import cores
from jaxdia.experiment.clients import Clients
from jaxdia.experiment.cluster import Cluster
from jaxdia.experiment.config import config_for, validate
from jaxdia.experiment.parts import Part, run_part

_ATTACKS = flags.DEFINE_list("attacks", ["dia:128:1000", "closed_form:256:0"], "NAME:IMAGES:STEPS.")
_WORKERS = flags.DEFINE_list("workers", ["1", "2", "4"], "Numbers of workers.")
_LANES = flags.DEFINE_integer("lanes", 4, "Of each device, so that all rows compute the same.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")

_ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
  """Measures all rows and prints them as a Markdown table, and what a part costs."""
  columns = {
    "attack": "", "images": "d", "workers": "d", "cores": "d", "seconds": ".1f",
    "begin and end s": ".1f", "images/s": ".2f", "efficiency": ".0%",
  }  # fmt: skip
  table = Table(about_device(), columns)
  for described in _ATTACKS.value:
    name, count, steps = described.split(":")
    alone = None
    for workers in [0, *map(int, _WORKERS.value)]:
      used = min(max(workers, 1), cores())
      with tempfile.TemporaryDirectory() as folder:
        _run(name, "8", steps, workers, folder + "/warm")
        seconds = _run(name, count, steps, workers, folder + "/work")
        rest = _run(name, count, steps, workers, folder + "/work")
      rate = int(count) / (seconds - rest)
      alone = alone or rate
      table.add(
        **{
          "attack": name,
          "images": int(count),
          "workers": workers,
          "cores": used,
          "seconds": seconds,
          "begin and end s": rest,
          "images/s": rate,
          "efficiency": rate / alone / used,
        }
      )
  table.write(_OUT.value)
  _measure_part()


def _run(name: str, count: str, steps: str, workers: int, workdir: str) -> float:
  """Returns seconds that the launcher takes; without workers, and with one, on one core."""
  arguments = [
    "--config=configs/mlp.py:mnist",
    f"--config.attack.name={name}",
    "--config.data.count=4",
    f"--config.data.mask_seeds={int(count) // 4}",
    f"--config.engine.lanes={_LANES.value}",
    f"--workdir={workdir}",
  ]
  if int(steps):
    arguments.append(f"--config.attack.max_iterations={steps}")
  if workers:
    arguments.append(f"--cluster=local:{workers}")
  command = [sys.executable, "launch/attack.py", *arguments]
  mine = os.sched_getaffinity(0)
  try:
    if workers < 2:
      os.sched_setaffinity(0, sorted(mine)[:1])  # which a process that is started has too
    start = time.perf_counter()
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
    return time.perf_counter() - start
  finally:
    os.sched_setaffinity(0, mine)


def _measure_part() -> None:
  """Prints what a part is made of, and what it takes besides the work."""
  config = config_for("mlp", "mnist")
  config.attack.name = "closed_form"
  config.data.count = 16
  settings = validate(config)
  numbers = tuple(range(16))
  digests = Clients(settings.clients).digests
  part = Part("closed_form", {0: settings}, {0: digests}, {0: numbers}, {0: {}}, {0: 0}, 0)
  run_part(part, lambda share: None)  # compiles
  start = time.perf_counter()
  done = run_part(part, lambda share: None)
  here = time.perf_counter() - start
  there = []
  with contextlib.closing(Cluster("local:1", print)) as cluster:
    for _ in range(3):
      start = time.perf_counter()
      list(cluster.run(iter([part]), lambda running: None))
      there.append(time.perf_counter() - start)
  print(
    f"\na part of 16 closed forms: {len(pickle.dumps(part)):,} bytes to a worker,"
    f" {len(pickle.dumps(done)):,} bytes back; {here:.2f} s in this process,"
    f" {min(there):.2f} s by a worker"
  )


if __name__ == "__main__":
  launch(main)
