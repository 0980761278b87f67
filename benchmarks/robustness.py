"""What runs withstand: kills, a full disk, malformed inputs, odd surroundings, hostile names.

python benchmarks/robustness.py
python benchmarks/robustness.py --parts=kills --kills=100 --seed=1

Each part prints a table of what was done, how often, and how often all was as it must be; what was
not is said below it, and then the exit code is 1. Parts that need what is not there (a browser, the
right to mount) say so, and count as skipped.
"""

import collections
import importlib
import pathlib
import tempfile
import time

from absl import flags
from robustness_runs import Check, set_up
from tqdm import tqdm

from jaxdia.command_line import launch
from jaxdia.core.errors import unknown
from jaxdia.experiment.table import markdown

# Each is `run(folder, seed, number)` of a file of this name, which yields checks; the number is
# how many kills or inputs.
_PARTS = {
  "kills": "SIGKILL at random moments, and the same command again",
  "disk": "no space from the k-th write on, for each k, and the same command again",
  "inputs": "malformed files and settings",
  "surroundings": "the quickstart where something is missing or odd",
  "report": "reports of hostile names and labels, in a browser",
}
_CHOSEN = flags.DEFINE_list("parts", list(_PARTS), f"Which of {', '.join(_PARTS)}.")
_KILLS = flags.DEFINE_integer("kills", 24, "How many kills, over all kinds of runs.", lower_bound=1)
_INPUTS = flags.DEFINE_integer("inputs", 240, "How many malformed inputs.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is drawn.", lower_bound=0)


def main() -> int:
  """Runs the chosen parts and prints a table of each; 1 if anything was not as it must be."""
  for name in _CHOSEN.value:
    if name not in _PARTS:
      raise unknown("part", name, _PARTS)
  failed = 0
  for name in _CHOSEN.value:
    part = importlib.import_module(f"robustness_{name}")
    count = {"kills": _KILLS.value, "inputs": _INPUTS.value}.get(name, 0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="robustness_", ignore_cleanup_errors=True) as folder:
      set_up(pathlib.Path(folder))
      tried = part.run(pathlib.Path(folder), _SEED.value, count)
      checks = list(tqdm(tried, name, leave=False, disable=None))  # a bar on a terminal alone
    minutes = (time.monotonic() - start) / 60
    print(f"## {name}: {_PARTS[name]}\n\n{_table(checks)}\n{minutes:.1f} minutes\n", flush=True)
    failed += sum(len(check.faults) > 0 for check in checks)
  return 1 if failed else 0


def _table(checks: list[Check]) -> str:
  """Returns what was done, how often, how many were right, and below it what was not."""
  rows: dict[str, list[Check]] = {}
  for check in checks:
    rows.setdefault(check.what, []).append(check)
  shown = []
  for what, of in rows.items():
    skipped = [check for check in of if check.skipped]
    right = sum(not check.faults and not check.skipped for check in of)
    notes = collections.Counter(filter(None, (check.skipped or check.note for check in of)))
    counts = (str(len(of)), str(right), str(len(skipped)), str(len(of) - right - len(skipped)))
    shown.append((what, *counts, ", ".join(f"{n} {note}" for note, n in notes.items())))
  numbers = [str(sum(int(row[i]) for row in shown)) for i in range(1, 5)]
  text = markdown(
    ("what", "done", "right", "skipped", "wrong", ""), [*shown, ("all", *numbers, "")]
  )
  faults = [f"- {c.what}, {c.case}: {fault}" for c in checks for fault in c.faults]
  return text + ("\n" + "\n".join(faults) + "\n" if faults else "")


if __name__ == "__main__":
  launch(main)
