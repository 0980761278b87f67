"""Configured experiments in work directories, alone or several together."""

from jaxdia.experiment.clients import Clients
from jaxdia.experiment.experiment import Experiment
from jaxdia.experiment.run import run
from jaxdia.experiment.shared_lanes import run_attack

__all__ = ["Clients", "Experiment", "run", "run_attack"]
