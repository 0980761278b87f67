"""What the files of finished results hold: written and read by these types alone.

Metrics are a registry, so the files have a key for each, beside the fields that are always there.
"""

import math
from typing import Any

import msgspec

from jaxdia import evaluation

# What a column of results.jsonl was called before.
_RENAMED = {"victim": "image", "batch": "client"}
# Columns that are left out where they say nothing.
_OPTIONAL = ("label_name", "session")
Value = float | int | dict[str, float] | None


def decode(content: bytes, kind: Any = Any) -> Any:
  """Reads JSON.

  Args:
    content: of a file, or a line of one.
    kind: what it has to be.

  Raises:
    msgspec.DecodeError: it is something else; also of other letters than UTF-8, and of lists in
      lists that have no end.
  """
  try:
    return msgspec.json.decode(content, type=kind)
  except (UnicodeDecodeError, RecursionError) as error:
    raise msgspec.DecodeError(str(error)) from error


class MetricSummary(msgspec.Struct, frozen=True, kw_only=True):
  """One metric over the images of an attack that have it."""

  mean: float
  std: float
  median: float
  min: float
  max: float
  count: int
  ci95: tuple[float, float] | None = None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
  """The share of all attempted images that reach each threshold."""

  thresholds: list[float]
  rate: list[float]

  def __post_init__(self):
    """Refuses a curve whose points are not pairs."""
    if len(self.thresholds) != len(self.rate):
      raise ValueError(f"{len(self.thresholds)} thresholds have {len(self.rate)} rates")

  def at(self, threshold: float) -> float | None:
    """Returns the share that reaches a threshold; None if it is not one of the curve's."""
    pairs = zip(self.thresholds, self.rate, strict=True)
    return next((rate for t, rate in pairs if math.isclose(t, threshold, abs_tol=1e-9)), None)


class RecoverySummary(msgspec.Struct, frozen=True, kw_only=True):
  """What of one image's result linear algebra gave; the rest was searched, or is missing.

  Attributes:
    verdict: name of a `jaxdia.closed_form.Verdict`.
    residual: None where nothing was recovered.
    reason: why there is not more; None if all is exact.
    label: whether it is known to be this image's.
    masks: the known share of each site's mask.
    features: dense layers whose inputs were recovered.
    seconds: that it took.
  """

  verdict: str
  residual: float | None = None
  reason: str | None = None
  label: bool = False
  masks: dict[str, float] = {}
  features: list[str] = []
  seconds: float | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
  """One image under one attack: a line of results.jsonl, which has a column for each score.

  Attributes:
    image: its index in its source.
    client: number of the client that trained on it; its batch.
    mask_seed: which of the client's gradients it is of, each under other masks.
    label: its class.
    label_name: what the class is called; None, and no column, if it has no name.
    attack: which attack.
    model: name of the network.
    dropout_rate: of the network.
    batch_size: images of the client.
    defence: what the client did to its gradient, as people read it; None in older results.
    scores: by metric; None where one does not apply.
    oracle: scores of the restart that the truth would choose, if there was a choice.
    status: how the search ended; or the closed form's verdict, if nothing was searched.
    closed_form: for an attack that has one.
    session: number of the call that made it; None, and no column, if calls are not told apart.
  """

  image: int
  client: int | None = None
  mask_seed: int | None = None
  label: int | None = None
  label_name: str | None = None
  attack: str
  model: str | None = None
  dropout_rate: float | int | None = None
  batch_size: int | None = None
  defence: str | None = None
  scores: dict[str, Value] = {}
  oracle: dict[str, float | int] | None = None
  status: str | None = None
  closed_form: RecoverySummary | None = None
  session: int | None = None

  def score(self, metric: str) -> float | None:
    """Returns one score, or None if there is none."""
    value = self.scores.get(metric)
    return None if isinstance(value, dict) else value  # of sites there are several

  def to_json(self) -> dict[str, Any]:
    """Returns the columns of results.jsonl."""
    columns = {}
    for name, value in msgspec.to_builtins(self).items():
      columns |= value if name == "scores" else {name: value}
    return {k: v for k, v in columns.items() if k not in _OPTIONAL or v is not None}

  @classmethod
  def from_json(cls, columns: Any) -> "Row":
    """Returns what `to_json` gave, of older results too.

    Args:
      columns: what is no field is a score.

    Raises:
      msgspec.ValidationError: a column holds what it cannot.
    """
    columns = msgspec.convert(columns, dict[str, Any])
    columns = {_RENAMED.get(name, name): value for name, value in columns.items()}
    fields = {name: columns.pop(name) for name in cls.__struct_fields__ if name in columns}
    return msgspec.convert(fields | {"scores": _each(columns, Value)}, cls)


class AttackSummary(msgspec.Struct, frozen=True, kw_only=True):
  """One attack in summary.json.

  Attributes:
    attempted: images that were to be attacked.
    finished: of them, without the next two.
    failed: of which no trial ever measured a finite objective.
    not_applicable: to which no closed form applies.
    metrics: statistics of each metric, over the images that have it.
    told: what the attack was told and what not, for people.
    defence: what the clients did to their gradients, as in a row.
    success: curves, by metric.
    iip: share of images that were identified in the pool.
    pool: number of images in it.
    accuracy: of the network after its training, on images for tests.
    epsilon: ε of the training.
    oracle: statistics of what the best restart of each client by the truth would have got.
    run_seconds: that the searches took.
    compile_seconds: of compiling.
    scoring_seconds: that the comparison with the originals took; None in older results.
    mask_accuracy_by_site: mean of the metric of that name, as the next three.
    mask_auc_by_site: mean.
    mask_undecided_by_site: mean.
    mask_dropped_by_site: mean.
  """

  attempted: int
  finished: int
  failed: int
  not_applicable: int
  metrics: dict[str, MetricSummary]
  told: str | None = None
  defence: str | None = None
  success: dict[str, Curve] = {}
  iip: float | None = None
  pool: int | None = None
  accuracy: float | None = None
  epsilon: float | None = None
  oracle: dict[str, MetricSummary] = {}
  run_seconds: float | None = None
  compile_seconds: float | None = None
  scoring_seconds: float | None = None
  mask_accuracy_by_site: dict[str, float] = {}
  mask_auc_by_site: dict[str, float] = {}
  mask_undecided_by_site: dict[str, float] = {}
  mask_dropped_by_site: dict[str, float] = {}

  def number(self, metric: str, statistic: str) -> float | None:
    """Returns one number, or None if there is none.

    Args:
      metric: of `metrics`; "oracle.METRIC" for the best restarts by the truth; one that is of a
        site, with the site as statistic; or one of an attack, as "images", "iip", "pool".
      statistic: as `jaxdia.evaluation.Column` has it.
    """
    if metric == "images":
      return getattr(self, statistic)
    if metric.endswith("_by_site"):
      return getattr(self, metric).get(statistic)
    if statistic == "value":
      return getattr(self, metric)
    if statistic.startswith("success_at_"):
      curve = self.success.get(metric)
      return curve and curve.at(float(statistic.removeprefix("success_at_")))
    of_truth = metric.startswith("oracle.")
    found = (self.oracle if of_truth else self.metrics).get(metric.removeprefix("oracle."))
    if found and statistic in ("ci95_low", "ci95_high"):
      return found.ci95 and found.ci95[statistic == "ci95_high"]
    return found and getattr(found, statistic)

  def columns(self) -> dict[str, float | None]:
    """Returns its line in the table.csv of a study."""
    columns = {c.key: self.number(m.name, c.statistic) for m, c in evaluation.columns()}
    rates = {k: 0.0 for k, v in columns.items() if v is None and k.startswith("success_")}
    return columns | rates


class Summary(msgspec.Struct, frozen=True, kw_only=True):
  """All of summary.json, where each attack has a key of its own beside `floors`.

  Attributes:
    attacks: by name.
    floors: means of metrics for guesses that know nothing of the client, by name of the guess.
  """

  attacks: dict[str, AttackSummary]
  floors: dict[str, dict[str, float]] = {}

  def to_json(self) -> dict[str, Any]:
    """Returns what summary.json holds."""
    found = msgspec.to_builtins(self)
    return found["attacks"] | {"floors": found["floors"]}

  @classmethod
  def from_json(cls, value: Any) -> "Summary":
    """Returns what `to_json` gave.

    Args:
      value: of summary.json.

    Raises:
      msgspec.ValidationError: a field holds what it cannot, or is missing.
    """
    attacks = msgspec.convert(value, dict[str, Any])
    floors = _each(attacks.pop("floors", None) or {}, dict[str, float], "floors.")
    return cls(attacks=_each(attacks, AttackSummary), floors=floors)


class Config(msgspec.Struct, frozen=True, kw_only=True):
  """What config.json holds: the settings of an experiment, resolved."""

  data: dict[str, Any]
  model: dict[str, Any]
  training: dict[str, Any] = {}
  local: dict[str, Any] = {}
  defence: dict[str, Any] = {}
  attacks: dict[str, dict[str, Any]]
  restarts: int | None = None
  seed: int | None = None
  precision: str | None = None
  engine: dict[str, Any] = {}


class StudyCell(msgspec.Struct, frozen=True, kw_only=True):
  """One experiment of a study.

  Attributes:
    name: of its folder.
    overrides: settings in which it differs from the study's config.
    status: "done", "failed" or "pending".
    reason: why it failed.
    seconds: that it took, if known.
  """

  name: str
  overrides: dict[str, Any]
  status: str
  reason: str | None = None
  seconds: float | None = None


class StudyFile(msgspec.Struct, frozen=True, kw_only=True):
  """What study.json holds.

  Attributes:
    title: for people.
    question: that the study answers.
    manifest: of the study.
    cells: in their order, finished or not.
    base: config that the cells vary.
  """

  title: str
  question: str
  manifest: dict[str, Any]
  cells: list[StudyCell]
  base: dict[str, Any] = {}


def _each(values: Any, kind: Any, where: str = "") -> dict[str, Any]:
  """Converts the values of an object one by one, so that an error names the key."""
  converted = {}
  for name, value in msgspec.convert(values, dict[str, Any]).items():
    try:
      converted[name] = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
      raise msgspec.ValidationError(f"{where}{name}: {error}") from error
  return converted
