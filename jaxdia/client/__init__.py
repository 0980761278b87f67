"""The client's side: what a client computes, and what of it the server sees."""

from jaxdia.client import defences
from jaxdia.client.local import (
  LocalUpdate,
  as_local,
  draw_masks,
  local_gradient,
  mask_shapes,
  shuffled,
  steps_of,
)
from jaxdia.client.losses import CROSS_ENTROPY, Loss
from jaxdia.client.observation import Observation, Secret, check_fit, check_observation
from jaxdia.client.step import client_gradient, client_loss, observe

__all__ = [
  "CROSS_ENTROPY",
  "LocalUpdate",
  "Loss",
  "Observation",
  "Secret",
  "as_local",
  "check_fit",
  "check_observation",
  "client_gradient",
  "client_loss",
  "defences",
  "draw_masks",
  "local_gradient",
  "mask_shapes",
  "observe",
  "shuffled",
  "steps_of",
]
