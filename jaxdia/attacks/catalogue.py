"""The attacks of the literature, and those of this package, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxdia.attacks.analytic import ClosedForm, Hybrid
from jaxdia.attacks.protocol import Attack
from jaxdia.attacks.search import Search
from jaxdia.attacks.settings import AttackSettings
from jaxdia.core.errors import InputError, unknown
from jaxdia.models import DropoutModel, check_model


class Preset(NamedTuple):
  """An attack by name.

  Attributes:
    settings: by default.
    build: `build(model, settings)` makes the attack, and refuses settings that it cannot take.
  """

  settings: AttackSettings
  build: Callable[[DropoutModel, AttackSettings], Attack]


def _search(model: DropoutModel, settings: AttackSettings) -> Search:
  if settings.feature_weight:
    raise InputError(
      f"attack.feature_weight is {settings.feature_weight}, but this attack recovers no features."
      " Set attack.name=hybrid, or leave the weight out."
    )
  return Search(model, settings.override(feature_weight=None))


def _analytic(kind: Callable[..., Attack]) -> Callable[[DropoutModel, AttackSettings], Attack]:
  def build(model, settings):
    if settings.masks != "free" or settings.labels == "free":
      raise InputError(
        f"a closed form with attack.masks={settings.masks} and attack.labels={settings.labels}: it"
        " recovers both. Set attack.masks=free and attack.labels=recovered or given."
      )
    return kind(model, settings)

  return build


_LBFGS = {
  "masks": "expected",
  "distance": "squared_l2",
  "optimizer": "lbfgs",
  "schedule": "constant",
  "learning_rate": 1.0,
  "tv_weight": 0.0,
}

CATALOGUE: dict[str, Preset] = {
  # Deep Leakage from Gradients (Zhu et al. 2019): the labels are searched too. Its distance is not
  # the authors' where the dummy gradient is of another length; see `squared_l2_distance`.
  "dlg": Preset(AttackSettings(**_LBFGS, labels="free"), _search),
  # Improved DLG (Zhao et al. 2020): the label is read from the last layer.
  "idlg": Preset(AttackSettings(**_LBFGS, labels="recovered"), _search),
  # Inverting Gradients (Geiping et al. 2020).
  "ig": Preset(AttackSettings(masks="expected"), _search),
  # The well-informed attacker of the paper: IG with the client's masks.
  "wiig": Preset(AttackSettings(masks="known"), _search),
  # The Dropout Inversion Attack, the paper's contribution: masks searched too.
  "dia": Preset(AttackSettings(masks="free"), _search),
  # What linear algebra gives, and nothing else.
  "closed_form": Preset(AttackSettings(labels="recovered"), _analytic(ClosedForm)),
  # DIA that starts from there.
  "hybrid": Preset(AttackSettings(labels="recovered"), _analytic(Hybrid)),
  # DIA for convolutional networks: with the paper's total variation, noise in the image makes up
  # for wrong masks of the first site.
  "dia_tv": Preset(AttackSettings(masks="free", tv_weight=3e-3, schedule="cosine"), _search),
  # The same where the masks of later sites are known, as of a batch behind convolutions. It gets as
  # far with the paper's schedule, which needs not be told how many iterations there are.
  "hybrid_tv": Preset(AttackSettings(labels="recovered", tv_weight=3e-3), _analytic(Hybrid)),
}


def create(name: str, model: DropoutModel, **overrides: Any) -> Attack:
  """Creates an attack by name, with the paper's settings.

  Args:
    name: a key of `CATALOGUE`.
    model: the network that the client trains.
    **overrides: fields of `AttackSettings` to change.

  Returns:
    The attack: pure functions `init` and `step`. Equal arguments give equal attacks.

  Raises:
    InputError: unknown name or field, a value that the field or the attack cannot take, or the
      model is none.
  """
  if name not in CATALOGUE:
    raise unknown("attack", name, CATALOGUE)
  check_model(model)
  preset = CATALOGUE[name]
  return preset.build(model, preset.settings.override(**overrides))


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


def closed_form(model: DropoutModel, **overrides: Any) -> Attack:
  """What linear algebra gives, without a search; see `create`."""
  return create("closed_form", model, **overrides)


def hybrid(model: DropoutModel, **overrides: Any) -> Attack:
  """DIA that starts from a closed form; see `create`."""
  return create("hybrid", model, **overrides)


def hybrid_tv(model: DropoutModel, **overrides: Any) -> Attack:
  """DIA with more total variation that starts from a closed form; see `create`."""
  return create("hybrid_tv", model, **overrides)


def dia_tv(model: DropoutModel, **overrides: Any) -> Attack:
  """DIA with more total variation, for convolutional networks; see `create`."""
  return create("dia_tv", model, **overrides)
