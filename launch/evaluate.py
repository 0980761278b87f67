"""Runs a study: a grid of experiments, as a config says.

All there is to say is in `jaxdia/commands/evaluate.py`, which `python -m jaxdia evaluate` runs too.
"""

from jaxdia.commands import evaluate

if __name__ == "__main__":
  evaluate.run()
