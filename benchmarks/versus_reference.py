"""This library against the authors' PyTorch code, in one run on the same problems.

pip install torch munch einops pyyaml
git clone https://github.com/dAI-SY-Group/DropoutInversionAttack
python benchmarks/versus_reference.py --reference=DropoutInversionAttack

Both get the same victims (the authors'), weights, client masks, starting points and
settings: DIA, batch 1, dropout 0.5. The reference runs in a process of its own:
"shipped"; "lean", without the derivatives by the model's own weights, which it
computes in every iteration and never uses; and "kept", lean with an allocator that
keeps the memory that it frees, which helps where large arrays come and go. Times are
of iterations alone, without start and compilation: of the reference the mean of a
run, of this library that of a chunk; the programs take turns, and the least of
--rounds counts. The objectives of the first iterations are compared too, as a check
that both do the same.

With --solve=N the attacks also run to the end, objective 1e-5: the reference on the
first --solve_reference victims one after another, this library on N victims
together. Told are the time, the worst error at the end, and the time after which
the mean squared error, in normalised space, first was below --mse (here in a run of
its own, with a lane for each victim); the times of the reference are scaled from its
victims to N.
"""

import time

import jax
import numpy as np
from absl import flags
from authors_code import Remote, Run
from measuring import Table, about_device, fill_lanes, lanes_timer

from jaxdia import attacks, engine, models
from jaxdia.client import observe
from jaxdia.command_line import launch
from jaxdia.data import statistics_of

_REFERENCE = flags.DEFINE_string("reference", None, "Checkout of the authors' code.", required=True)
_CASES = flags.DEFINE_list("cases", ["mlp:mnist", "mlp:cifar10", "vit:cifar10"], "MODEL:DATASET")
_LANES = flags.DEFINE_list("lanes", ["1", "4", "64"], "Numbers of lanes; for a ViT those up to 4.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is timed.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "About how long each timing takes.")
_SOLVE = flags.DEFINE_integer("solve", 0, "Victims on which the attacks run to the end.")
_SOLVE_REFERENCE = flags.DEFINE_integer("solve_reference", 4, "Those that the reference gets.")
_MSE = flags.DEFINE_float("mse", 1e-3, "The error that is waited for with --solve.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")

_COLUMNS = {
  "model": "", "data": "", "program": "", "ms": ".3f", "times shipped": ".1f",
  "times lean": ".1f", "times kept": ".1f",
}  # fmt: skip
_SOLVE_COLUMNS = {
  "model": "", "data": "", "program": "", "victims": "d", "iterations": ".0f", "seconds": ".1f",
  "worst MSE": ".1e", "seconds to MSE": ".1f", "compile s": ".1f", "times": ".1f",
}  # fmt: skip


# How the reference runs: as it is, without what it never uses, and with its memory kept as well.
KINDS = ("shipped", "lean", "kept")


class Problem:
  """One model with the authors' victims, for both programs."""

  def __init__(self, name: str, dataset: str, count: int):
    """Builds both models with the same weights, and what each client sends."""
    arguments = (_REFERENCE.value, name, dataset, 0.5)
    self.authors = {keep: Remote(*arguments, keep_memory=keep) for keep in (False, True)}
    authors = self.authors[False]
    shape = authors.victim(0)[0].shape[1:]
    self.model = models.create(name, shape, 10, dropout_rate=0.5)
    params = models.params_of_reference(authors.state(), shape)
    pairs = [
      observe(
        jax.random.key(i),
        self.model,
        params,
        *authors.victim(i),
        statistics=statistics_of(dataset),
      )
      for i in range(count)
    ]
    self.observations, self.secrets = (list(x) for x in zip(*pairs, strict=True))

  def reference(self, victim: int, iterations: int, kind: str = "shipped") -> Run:
    """Runs the authors' DIA, of one of `KINDS`, from where ours starts."""
    key = engine.trial_key(jax.random.key(0), engine.Job(victim, 0))
    start = attacks.dia(self.model).init(key, self.observations[victim]).candidate
    known, images, masks = jax.tree.map(
      np.asarray,
      (list(self.secrets[victim].masks.values()), start.images, list(start.masks.values())),
    )
    authors = self.authors[kind == "kept"]
    return Run(*authors.attack(victim, known, images, masks, iterations, kind != "shipped"))

  def difference(self, steps: int = 10) -> float:
    """Returns the largest relative difference of the two programs' first objectives."""
    attack, observation = attacks.dia(self.model), self.observations[0]
    state = attack.init(engine.trial_key(jax.random.key(0), engine.Job(0, 0)), observation)
    step, ours = jax.jit(attack.step), []
    for _ in range(steps):
      state, info = step(observation, state)
      ours.append(float(info.objective))
    theirs = self.reference(0, steps).objectives
    return float(np.max(np.abs(np.array(theirs) / ours - 1)))


def time_iterations(name: str, dataset: str, table: Table) -> None:
  """Times an iteration of each program."""
  lanes = [int(n) for n in _LANES.value if name != "vit" or int(n) <= 4]
  problem = Problem(name, dataset, max(lanes))
  print(f"(largest difference of the first objectives: {problem.difference():.1e})", flush=True)
  devices = jax.local_devices()
  timers = {}
  for count in lanes:
    used = devices if count % len(devices) == 0 else devices[:1]
    for victims in sorted({1, count}):
      what = "victims" if victims > 1 else "restarts of one victim"
      label = "jaxdia, 1 lane" if count == 1 else f"jaxdia, {count} lanes, {count} {what}"
      observations = problem.observations[:victims]
      timers[label] = lanes_timer(problem.model, observations, count, used, _SECONDS.value)
  steps = 10
  seconds = problem.reference(0, steps).seconds / steps
  steps = max(steps, int(_SECONDS.value / seconds))
  times: dict[str, list[float]] = {}
  for _ in range(_ROUNDS.value):
    for kind in KINDS:
      seconds = problem.reference(0, steps, kind).seconds
      times.setdefault(f"reference, {kind}", []).append(1e3 * seconds / steps)
    for label, timer in timers.items():
      times.setdefault(label, []).append(timer().ms)
  least = {label: min(measured) for label, measured in times.items()}
  for label, ms in least.items():
    ratios = {
      f"times {kind}": least[f"reference, {kind}"] / ms
      for kind in KINDS
      if label.startswith("jaxdia")
    }
    table.add(model=name, data=dataset, program=label, ms=ms, all_ms=times[label], **ratios)


def seconds_to_error(problem: Problem, chunk: int = 25) -> float:
  """Returns the time after which this library was below --mse once on each victim."""
  devices = jax.local_devices() if len(problem.secrets) % jax.local_device_count() == 0 else None
  keys = [
    engine.trial_key(jax.random.key(0), engine.Job(i, 0)) for i in range(len(problem.secrets))
  ]
  program, lanes = fill_lanes(
    attacks.dia(problem.model), problem.observations, keys, devices or jax.local_devices()[:1]
  )
  lanes, _ = program.advance(lanes, 0)  # compiles
  truth = np.concatenate([secret.images for secret in problem.secrets])
  missing, start = np.ones(len(truth), bool), time.perf_counter()
  while missing.any():
    lanes, gauge = program.advance(lanes, chunk)
    images = np.asarray(lanes.lanes.state.candidate.images).reshape(truth.shape)
    missing &= np.square(images - truth).mean(axis=(1, 2, 3)) >= _MSE.value
    if (gauge.status != attacks.Status.RUNNING).all():
      break
  return time.perf_counter() - start if not missing.any() else float("nan")


def solve(name: str, dataset: str, table: Table) -> None:
  """Runs the attacks to the end."""
  problem = Problem(name, dataset, _SOLVE.value)
  common = {"model": name, "data": dataset}
  count = min(_SOLVE.value, _SOLVE_REFERENCE.value)
  scale = _SOLVE.value / count
  shipped = None
  for kind in KINDS:
    runs = [problem.reference(i, 20_000, kind) for i in range(count)]
    seconds = scale * sum(run.seconds for run in runs)
    shipped = shipped or seconds
    reached = [next((t for t, e in r.errors if e < _MSE.value), float("nan")) for r in runs]
    table.add(
      **common,
      program=f"reference, {kind}",
      victims=count,
      iterations=float(np.mean([len(run.objectives) for run in runs])),
      seconds=seconds,
      **{"worst MSE": max(r.errors[-1][1] for r in runs), "seconds to MSE": scale * sum(reached)},
    )
  progress = []
  start = time.perf_counter()
  task = engine.Task(jax.random.key(0), attacks.dia(problem.model), problem.observations)
  trials = list(engine.run([task], on_progress=progress.append))
  seconds = time.perf_counter() - start
  errors = [
    np.mean(np.square(t.candidate.images - problem.secrets[t.job.victim].images)) for t in trials
  ]
  compile_seconds = progress[-1].compile_seconds
  table.add(
    **common,
    program="jaxdia",
    victims=len(trials),
    iterations=float(np.mean([t.iterations for t in trials])),
    seconds=seconds - compile_seconds,
    **{
      "worst MSE": float(max(errors)),
      "seconds to MSE": seconds_to_error(problem),
      "compile s": compile_seconds,
      "times": shipped / (seconds - compile_seconds),
    },
  )


def main() -> None:
  """Compares all cases."""
  about = about_device()
  tables = [Table(about, _COLUMNS)]
  for case in _CASES.value:
    time_iterations(*case.split(":"), tables[0])
  if _SOLVE.value:
    print()
    tables.append(Table(about, _SOLVE_COLUMNS))
    for case in _CASES.value:
      solve(*case.split(":"), tables[1])
  tables[0].rows.extend(row for table in tables[1:] for row in table.rows)
  tables[0].write(_OUT.value)


if __name__ == "__main__":
  launch(main)
