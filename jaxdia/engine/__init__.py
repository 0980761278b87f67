"""Many trials at once: lanes on devices, fed by a host loop."""

from jaxdia.engine import lanes
from jaxdia.engine.capacity import choose_lanes, matrix_product_rate
from jaxdia.engine.run import Job, Progress, Trial, recorded_iterations, run, trial_key

__all__ = [
  "Job",
  "Progress",
  "Trial",
  "choose_lanes",
  "lanes",
  "matrix_product_rate",
  "recorded_iterations",
  "run",
  "trial_key",
]
