"""Gradient inversion attacks as pairs of pure functions."""

from jaxdia.attacks.analytic import ClosedForm, Hybrid
from jaxdia.attacks.catalogue import (
  CATALOGUE,
  Preset,
  closed_form,
  create,
  dia,
  dia_tv,
  dlg,
  hybrid,
  idlg,
  ig,
  wiig,
)
from jaxdia.attacks.objective import (
  average_distance,
  complete,
  feature_distance,
  mask_prior,
  objective,
  prepare_for,
  total_variation,
)
from jaxdia.attacks.protocol import (
  Attack,
  Best,
  Candidate,
  Info,
  Known,
  State,
  Status,
  Terms,
  Told,
  same_program,
)
from jaxdia.attacks.search import Search, project
from jaxdia.attacks.settings import AttackSettings
from jaxdia.attacks.solve import RECOVERY, solve

__all__ = [
  "CATALOGUE",
  "RECOVERY",
  "Attack",
  "AttackSettings",
  "Best",
  "Candidate",
  "ClosedForm",
  "Hybrid",
  "Info",
  "Known",
  "Preset",
  "Search",
  "State",
  "Status",
  "Terms",
  "Told",
  "average_distance",
  "closed_form",
  "complete",
  "create",
  "dia",
  "dia_tv",
  "dlg",
  "feature_distance",
  "hybrid",
  "idlg",
  "ig",
  "mask_prior",
  "objective",
  "prepare_for",
  "project",
  "same_program",
  "solve",
  "total_variation",
  "wiig",
]
