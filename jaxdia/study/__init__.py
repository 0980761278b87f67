"""Studies: the same question asked of a grid of experiments."""

from jaxdia.study.cost import describe, estimate
from jaxdia.study.groups import Group, group
from jaxdia.study.plan import Cell, plan, study_config
from jaxdia.study.run import run

__all__ = ["Cell", "Group", "describe", "estimate", "group", "plan", "run", "study_config"]
