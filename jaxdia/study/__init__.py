"""Studies: the same question asked of a grid of experiments."""

from jaxdia.study.plan import Cell, describe, estimate, plan, study_config
from jaxdia.study.run import run

__all__ = ["Cell", "describe", "estimate", "plan", "run", "study_config"]
