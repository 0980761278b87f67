"""Small experiments, and how a user runs them, that the tests share."""

import json
import pathlib
import subprocess
import sys

from jaxdia.experiment.config import config_for

ROOT = pathlib.Path(__file__).parent.parent


def launch(*arguments, config="configs/mlp.py:mnist", popen=False, cwd=ROOT):
  """Starts launch/attack.py; a device for each core, as a user has, not the tests' eight."""
  command = [sys.executable, str(ROOT / "launch" / "attack.py"), f"--config={config}", *arguments]
  if popen:
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def small(**attack):
  """A config that runs in seconds: three MNIST digits and a narrow MLP."""
  config = config_for("mlp", "mnist", hidden_sizes=(64, 64), use_bias=False)
  config.data.count = 3
  config.engine.lanes = 1
  config.attack.max_iterations = 60
  config.attack.update(attack)
  return config


def rows_of(workdir):
  return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def timeless(rows):
  """Rows without what an interruption may change: times, and which session made them."""
  dropped = ("seconds", "session")
  return [{k: v for k, v in row.items() if not k.startswith(dropped)} for row in rows]


def silent(text):
  del text
