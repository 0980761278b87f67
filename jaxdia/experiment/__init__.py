"""Configured experiments in work directories, alone or several together."""

from jaxdia.experiment.experiment import Experiment, clients_key
from jaxdia.experiment.run import run, search

__all__ = ["Experiment", "clients_key", "run", "search"]
