"""The victim's side: what a client computes, and what of it the server sees."""

from jaxdia.client import defences
from jaxdia.client.observation import Observation, Secret
from jaxdia.client.step import client_gradient, client_loss, loss_of_logits, observe

__all__ = [
  "Observation",
  "Secret",
  "client_gradient",
  "client_loss",
  "defences",
  "loss_of_logits",
  "observe",
]
