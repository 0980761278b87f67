"""Many trials at once: lanes on devices, fed by a host loop."""

from jaxdia.engine import lanes
from jaxdia.engine.capacity import choose_lanes
from jaxdia.engine.jobs import Job, Progress, Task, Trial, recorded_iterations, trial_key
from jaxdia.engine.run import Plan, plan, run

__all__ = [
  "Job",
  "Plan",
  "Progress",
  "Task",
  "Trial",
  "choose_lanes",
  "lanes",
  "plan",
  "recorded_iterations",
  "run",
  "trial_key",
]
