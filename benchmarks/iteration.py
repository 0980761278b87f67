"""Milliseconds for an iteration of one trial, against the number of lanes.

python benchmarks/iteration.py --cases=mlp:mnist,mlp:cifar10,vit:cifar10 --lanes=1,4,16,64

Each row is one compiled program on one device: DIA on as many victims as lanes,
batch 1, dropout rate 0.5. Floating-point operations are counted by XLA in one step
of one trial; the rate is compared with that of a large matrix product, measured in
the same run. Times are of the fastest of a few chunks, compilation apart.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from jaxdia import attacks, data, matching, models
from jaxdia.client import observe
from jaxdia.engine.lanes import create_program

_CASES = flags.DEFINE_list("cases", ["mlp:mnist", "mlp:cifar10"], "MODEL:DATASET, ...")
_LANES = flags.DEFINE_list("lanes", ["1", "4", "16", "64"], "Numbers of lanes.")
_MATCHING = flags.DEFINE_list("matching", ["formed", "auto"], "Ways to compare gradients.")
_RESTARTS = flags.DEFINE_bool("restarts", False, "All lanes attack the same victim.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "About how long each row is measured.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")


@dataclasses.dataclass(frozen=True)
class Row:
  """One measurement; times in milliseconds, rates in 10^9 operations a second."""

  model: str
  dataset: str
  matching: str
  lanes: int
  ms_per_iteration: float
  compile_seconds: float
  mflop_per_iteration: float
  gflops: float
  share_of_matrix_product: float


def matrix_product_rate(size: int = 2048) -> float:
  """Returns the operations a second of a float32 matrix product."""
  a = jax.random.normal(jax.random.key(0), (size, size))
  product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
  product(a).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    product(a).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)


def measure(name: str, dataset: str, method: str, lanes: int, peak: float) -> Row:
  """Measures one program.

  Args:
    name: of the network.
    dataset: of the samples.
    method: way to compare gradients.
    lanes: number of trials at once.
    peak: operations a second of a matrix product.
  """
  size = 224 if dataset == "imagenet" else None
  victims = data.load(
    f"samples:{dataset}", 1 if _RESTARTS.value else min(lanes, 20), image_size=size
  )
  images = data.normalize(victims.images, victims.statistics)
  model = models.create(name, images.shape[1:], victims.num_classes, 0.5)
  params = jax.jit(model.init)(jax.random.key(0))
  observations = [
    observe(jax.random.key(i), model, params, images[i : i + 1], victims.labels[i : i + 1])[0]
    for i in range(len(images))
  ]
  observations = matching.prepare_alike(model, observations, method)
  attack = attacks.dia(model, tolerance=0.0)
  program = create_program(attack, observations[0], None, lanes, jax.local_devices()[:1])
  state = program.empty()
  for lane in range(lanes):
    observation = observations[lane % len(observations)]
    state = program.load(state, 0, lane, jax.random.key(lane), observation, None)
  start = time.perf_counter()
  state, _ = program.advance(state, 0)
  compile_seconds = time.perf_counter() - start
  steps, times = 1, []
  deadline = time.perf_counter() + _SECONDS.value
  while not times or time.perf_counter() < deadline:
    start = time.perf_counter()
    state, _ = program.advance(state, steps)
    seconds = time.perf_counter() - start
    times.append(seconds / steps)
    steps = max(1, int(_SECONDS.value / 4 / times[-1]))
  seconds = min(times) / lanes
  operations = _count_operations(attack, observations[0])
  return Row(
    name,
    dataset,
    method,
    lanes,
    1e3 * seconds,
    compile_seconds,
    operations / 1e6,
    operations / seconds / 1e9,
    operations / seconds / peak,
  )


def _count_operations(attack, observation) -> float:
  state = jax.eval_shape(attack.init, jax.random.key(0), observation)
  return jax.jit(attack.step).lower(observation, state).compile().cost_analysis()["flops"]


def main(argv: list[str]) -> None:
  """Measures all rows and prints them as a Markdown table."""
  del argv
  peak = matrix_product_rate()
  device = jax.local_devices()[0]
  print(f"{device.platform} ({device.device_kind}), matrix product {peak / 1e9:.0f} GFLOP/s\n")
  print(
    "| model | data | matching | lanes | ms | compile s | MFLOP | GFLOP/s | of matrix product |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  rows = []
  for case in _CASES.value:
    for method in _MATCHING.value:
      for lanes in map(int, _LANES.value):
        row = measure(*case.split(":"), method, lanes, peak)
        rows.append(row)
        print(
          f"| {row.model} | {row.dataset} | {row.matching} | {row.lanes} |"
          f" {row.ms_per_iteration:.3f} | {row.compile_seconds:.1f} |"
          f" {row.mflop_per_iteration:.1f} | {row.gflops:.0f} |"
          f" {row.share_of_matrix_product:.0%} |",
          flush=True,
        )
  if _OUT.value:
    content = {"device": device.device_kind, "matrix_product_gflops": peak / 1e9}
    content["rows"] = [dataclasses.asdict(row) for row in rows]
    pathlib.Path(_OUT.value).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
