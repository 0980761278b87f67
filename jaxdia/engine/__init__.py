"""Many trials at once: lanes on devices, fed by a host loop."""

from jaxdia.engine import lanes
from jaxdia.engine.capacity import choose_lanes, forget_programs, matrix_product_rate, total_memory
from jaxdia.engine.jobs import Job, Progress, Task, Trial, recorded_iterations, trial_key
from jaxdia.engine.run import run

__all__ = [
  "Job",
  "Progress",
  "Task",
  "Trial",
  "choose_lanes",
  "forget_programs",
  "lanes",
  "matrix_product_rate",
  "recorded_iterations",
  "run",
  "total_memory",
  "trial_key",
]
