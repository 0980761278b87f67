"""The attacks of the literature, as settings of the one objective."""

from typing import Any

from jaxdia.attacks.attack import Attack, create_attack
from jaxdia.attacks.settings import AttackSettings
from jaxdia.core.errors import unknown
from jaxdia.models import DropoutModel

_LBFGS = {
  "masks": "expected",
  "distance": "squared_l2",
  "optimizer": "lbfgs",
  "schedule": "constant",
  "learning_rate": 1.0,
  "tv_weight": 0.0,
}

PRESETS: dict[str, AttackSettings] = {
  # Deep Leakage from Gradients (Zhu et al. 2019): the labels are searched too.
  "dlg": AttackSettings(**_LBFGS, labels="free"),
  # Improved DLG (Zhao et al. 2020): the label is read from the last layer.
  "idlg": AttackSettings(**_LBFGS, labels="recovered"),
  # Inverting Gradients (Geiping et al. 2020).
  "ig": AttackSettings(masks="expected"),
  # The well-informed attacker of the paper: IG with the client's masks.
  "wiig": AttackSettings(masks="known"),
  # The Dropout Inversion Attack, the paper's contribution: masks searched too.
  "dia": AttackSettings(masks="free"),
  # What linear algebra gives, and nothing else.
  "closed_form": AttackSettings(closed_form="only", labels="recovered"),
  # DIA that starts from there.
  "hybrid": AttackSettings(closed_form="first", labels="recovered"),
}


def create(name: str, model: DropoutModel, **overrides: Any) -> Attack:
  """Creates an attack of the literature, with the paper's settings.

  Args:
    name: a key of `PRESETS`.
    model: the network that the client trains.
    **overrides: fields of `AttackSettings` to change.

  Returns:
    The attack: pure functions `init` and `step`.

  Raises:
    InputError: unknown name or field, or a value that the field cannot take.
  """
  if name not in PRESETS:
    raise unknown("attack", name, PRESETS)
  return create_attack(model, PRESETS[name].override(**overrides))


def dlg(model: DropoutModel, **overrides: Any) -> Attack:
  """Deep Leakage from Gradients (Zhu et al. 2019); see `create`."""
  return create("dlg", model, **overrides)


def idlg(model: DropoutModel, **overrides: Any) -> Attack:
  """Improved DLG (Zhao et al. 2020); see `create`."""
  return create("idlg", model, **overrides)


def ig(model: DropoutModel, **overrides: Any) -> Attack:
  """Inverting Gradients (Geiping et al. 2020); see `create`."""
  return create("ig", model, **overrides)


def wiig(model: DropoutModel, **overrides: Any) -> Attack:
  """IG that knows the client's masks (Scheliga et al. 2023); see `create`."""
  return create("wiig", model, **overrides)


def dia(model: DropoutModel, **overrides: Any) -> Attack:
  """The Dropout Inversion Attack (Scheliga et al. 2023); see `create`."""
  return create("dia", model, **overrides)


def hybrid(model: DropoutModel, **overrides: Any) -> Attack:
  """DIA that starts from what `jaxdia.closed_form.recover` gives; see `create`."""
  return create("hybrid", model, **overrides)
