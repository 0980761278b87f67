"""Gradient inversion attacks as pairs of pure functions."""

from jaxdia.attacks.attack import (
  Attack,
  Best,
  Info,
  State,
  Status,
  Variant,
  create_attack,
  hold,
  project,
)
from jaxdia.attacks.objective import (
  Candidate,
  Known,
  Terms,
  complete,
  feature_distance,
  mask_prior,
  objective,
  total_variation,
)
from jaxdia.attacks.presets import PRESETS, create, dia, dlg, hybrid, idlg, ig, wiig
from jaxdia.attacks.settings import CHOICES, AttackSettings

__all__ = [
  "CHOICES",
  "PRESETS",
  "Attack",
  "AttackSettings",
  "Best",
  "Candidate",
  "Info",
  "Known",
  "State",
  "Status",
  "Terms",
  "Variant",
  "complete",
  "create",
  "create_attack",
  "dia",
  "dlg",
  "feature_distance",
  "hold",
  "hybrid",
  "idlg",
  "ig",
  "mask_prior",
  "objective",
  "project",
  "total_variation",
  "wiig",
]
