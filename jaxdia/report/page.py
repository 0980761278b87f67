"""One self-contained HTML page about finished results."""

import itertools
import json
import pathlib
from typing import Any, NamedTuple

import jinja2
import msgspec
import pandas as pd

from jaxdia import evaluation
from jaxdia.core.errors import InputError, first_line
from jaxdia.core.files import write_atomically
from jaxdia.experiment.progress import duration
from jaxdia.experiment.schema import AttackSummary
from jaxdia.experiment.table import format_number
from jaxdia.report import figures, words
from jaxdia.report.results import CellResults, StudyResults, read_study
from jaxdia.report.sweeps import DRAWN, Sweep, find_sweeps
from jaxdia.report.tradeoff import find_tradeoff
from jaxdia.report.verdict import judge

_MAX_PICTURE_CELLS = 6
_MAX_PICTURES = 8
_MAX_SUCCESS_CELLS = 12
_MAX_SITES = 30
_MAX_RECORDED = 2
_STATISTICS = {
  "median": "median",
  "mean": "mean",
  "std": "± std",
  "ci95_low": "95% CI from",
  "ci95_high": "to",
  "min": "min",
  "max": "max",
  "count": "images",
}
_TIMES = ("run_seconds", "compile_seconds", "scoring_seconds")


class _Number(NamedTuple):
  """A number of the summary: exact for programs, rounded for people."""

  cell: str
  attack: str
  metric: str
  statistic: str
  exact: str
  text: str


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` about the results in a folder.

  Args:
    workdir: of a finished experiment, or of a study; some cells of a study may be
      failed or pending.

  Returns:
    The path of the page.

  Raises:
    InputError: there are no such results, or a file of them is damaged.
  """
  study = read_study(workdir)
  return write_page(workdir, "page.html.j2", _context(study))


def write_page(folder: pathlib.Path, template: str, context: dict[str, Any]) -> pathlib.Path:
  """Writes `report.html`.

  Args:
    folder: where it shall be.
    template: name of a file beside this one.
    context: all that it shows.

  Returns:
    The path of the page.

  Raises:
    InputError: it cannot be written.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxdia", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  html = environment.get_template(template).render(context)
  path = folder / "report.html"
  try:
    write_atomically(path, lambda file: file.write(html.encode()))
  except OSError as error:
    raise InputError(
      f"cannot write {path} ({first_line(error)}). Make its folder writable."
    ) from error
  return path


def _context(study: StudyResults) -> dict[str, Any]:
  """Returns all that the template shows."""
  return {
    "title": study.title,
    "question": study.question,
    "failed": [cell for cell in study.cells if cell.entry.status == "failed"],
    "pending": [cell for cell in study.cells if cell.entry.status not in ("done", "failed")],
    "verdict": judge(study),
    "animation": _animation(study),
    "pictures": [_pictures(cell) for cell in study.done[:_MAX_PICTURE_CELLS]],
    "cells_without_pictures": len(study.done[_MAX_PICTURE_CELLS:]),
    "overview": {
      "headings": [m.heading(column) for m, column in evaluation.columns("report")],
      "cells": [(cell, _overview(cell)) for cell in study.done],
    },
    "success": _success(study),
    "tradeoff": _tradeoff(study),
    "sweeps": _sweeps(study),
    "sites": _sites(study),
    "details": [(cell, _details(cell)) for cell in study.done],
    "statistics": list(_STATISTICS.values()),
    "times": "; ".join(words.metric(name).title for name in _TIMES),
    "meanings": _meanings(study),
    "cells": study.cells,
    "command": _command(study),
    "versions": _versions(study),
    "settings": _distinct(
      {cell.name: _flat(msgspec.structs.asdict(cell.config)) for cell in study.done}
    ),
    "label": words.attack_label,
    "duration": duration,
    "compact": words.text,
  }


def _number(cell: CellResults, attack: str, metric: str, statistic: str) -> _Number:
  value = cell.summary[attack].number(metric, statistic)
  text = format_number(metric, statistic, value)
  return _Number(cell.name, attack, metric, statistic, json.dumps(value), text)


def _overview(cell: CellResults) -> list[tuple[str, list[_Number | None]]]:
  """Returns the rows of one cell: those of attacks, then those of guesses without gradient."""
  columns = [(metric.name, c.statistic) for metric, c in evaluation.columns("report")]
  rows: list[tuple[str, list[_Number | None]]] = [
    (words.attack_label(attack), [_number(cell, attack, *column) for column in columns])
    for attack in cell.summary
  ]
  for floor, means in cell.floors.items():
    left = dict(means)  # each is shown once, in the first column of its metric
    numbers = [
      None
      if (value := left.pop(metric, None)) is None
      else _Number(
        cell.name, floor, metric, "floor", json.dumps(value), words.number(metric, value)
      )
      for metric, _ in columns
    ]
    rows.append((f"guess: {floor.replace('_', ' ')}", numbers))
  return rows


def _details(cell: CellResults) -> list[dict[str, Any]]:
  """Returns for each attack all metrics with all statistics, its masks, and what it took."""
  details = []
  for attack, summary in cell.summary.items():
    by_site = _site_metrics(summary)
    sites = dict.fromkeys(site for name in by_site for site in getattr(summary, name))
    details.append(
      {
        "attack": words.attack_label(attack),
        "metrics": [
          (words.metric(name).title, [_number(cell, attack, name, s) for s in _STATISTICS])
          for name in _metric_names(summary)
        ],
        "times": [_number(cell, attack, kind, "value") for kind in _TIMES],
        "by_site": [words.metric(name).title for name in by_site],
        "sites": [(s, [_number(cell, attack, name, s) for name in by_site]) for s in sites],
      }
    )
  return details


def _metric_names(summary: AttackSummary) -> list[str]:
  """Returns the metrics that a summary has statistics of, in the order of the registry."""
  names = dict.fromkeys((*evaluation.REGISTRY, *summary.metrics))
  return [n for n in names if n in summary.metrics] + [f"oracle.{n}" for n in summary.oracle]


def _site_metrics(summary: AttackSummary) -> list[str]:
  """Returns the metrics of dropout sites that a summary has."""
  of_sites = [name for name, metric in evaluation.REGISTRY.items() if metric.of == "site"]
  return [name for name in of_sites if getattr(summary, name)]


def _pictures(cell: CellResults) -> dict[str, Any]:
  """Returns the first images of a cell and what each attack made of them."""
  arrays = cell.read_images()
  count = min(len(arrays["originals"]), _MAX_PICTURES)
  attacks = []
  for attack in cell.summary:
    ssim = cell.ssim_of(attack)
    images = [
      (figures.image_uri(arrays[attack][i]), words.number("ssim", ssim.get(i)))
      for i in range(count)
    ]
    attacks.append((words.attack_label(attack), images))
  return {
    "cell": cell,
    "originals": [figures.image_uri(image) for image in arrays["originals"][:count]],
    "attacks": attacks,
    "left_out": len(arrays["originals"]) - count,
  }


def _animation(study: StudyResults) -> dict[str, Any] | None:
  """Returns the first images of the first cell that was recorded, as they formed."""
  for cell in study.done:
    recordings = cell.read_recordings()
    attacks = [attack for attack in cell.summary if attack in recordings]
    if not attacks or not len(recordings["iterations"]):
      continue
    attack = "dia" if "dia" in attacks else attacks[0]
    originals = cell.read_images()["originals"]
    frames = recordings[attack][:_MAX_RECORDED]
    if frames.shape[2:] != originals.shape[1:]:
      raise InputError(
        f"{cell.directory}/recordings.npz has images of shape {frames.shape[2:]}; expected"
        f" {originals.shape[1:]} as in reconstructions.npz. Run the experiment again."
      )
    gif, still = figures.formation(originals[: len(frames)], frames, recordings["iterations"])
    last = int(recordings["iterations"][-1])
    return {
      "cell": cell,
      "attack": words.attack_label(attack),
      "gif": gif,
      "still": still,
      "last": last,
    }
  return None


def _success(study: StudyResults) -> list[tuple[str, str, str]]:
  """Returns success curves with title and description: by cell, or of all cells together."""
  groups = [(cell.name, [cell]) for cell in study.done]
  if len(groups) > _MAX_SUCCESS_CELLS:
    groups = [(f"all {len(groups)} settings together", study.done)]
  shown = []
  for (title, cells), metric in itertools.product(groups, evaluation.REGISTRY.values()):
    rates = {attack: _pooled_success(cells, attack, metric.name) for attack in study.attacks}
    rates = {attack: rate for attack, rate in rates.items() if rate[0]}
    if rates:
      text = f"Share of images over thresholds of {metric.title}. " + "; ".join(
        f"{words.attack_label(attack)}: {rate[0]:.0%} at {thresholds[0]:g} to {rate[-1]:.0%} at"
        f" {thresholds[-1]:g}"
        for attack, (thresholds, rate) in rates.items()
      )
      figure = figures.success_curves(metric.name, rates)
      shown.append((f"{title}: {metric.title}", figure, text))
  return shown


def _pooled_success(
  cells: list[CellResults], attack: str, metric: str
) -> tuple[list[float], list[float]]:
  """Returns thresholds that all cells have, and the share of all their images that reach each."""
  summaries = [cell.summary[attack] for cell in cells if attack in cell.summary]
  curves = [curve for one in summaries if (curve := one.success.get(metric))]
  if not curves or len(curves) < len(summaries):
    return [], []
  if len(curves) == 1:  # exactly as in the summary
    return curves[0].thresholds, curves[0].rate
  columns = [pd.Series(curve.rate, curve.thresholds) for curve in curves]
  weights = pd.Series([one.attempted for one in summaries])
  rates = pd.concat(columns, axis=1, join="inner").dot(weights) / max(weights.sum(), 1)
  return list(rates.index), list(rates)


def _tradeoff(study: StudyResults) -> tuple[str, str] | None:
  """Returns the figure of accuracy against leakage, and its text, if there are several points."""
  points = find_tradeoff(study)
  if not points:
    return None
  best = "; ".join(
    f"{p.settings}: {words.number('accuracy', p.accuracy)}, SSIM"
    f" {words.number('ssim', p.leakage)} by {words.attack_label(p.attack)}"
    for p in points
    if p.best
  )
  return figures.png_uri(figures.tradeoff(points)), f"Not beaten in both: {best}"


def _sweeps(study: StudyResults) -> list[dict[str, Any]]:
  return [
    {
      "setting": sweep.setting,
      "pooled": sweep.pooled,
      "figures": [
        (
          words.metric(metric).title,
          figures.png_uri(figures.sweep_curves(sweep, metric)),
          _ends(sweep, metric),
        )
        for metric in DRAWN
        if any((line.points[metric] == line.points[metric]).any() for line in sweep.lines)
      ],
    }
    for sweep in find_sweeps(study)
  ]


def _ends(sweep: Sweep, metric: str) -> str:
  """Returns in words how each line begins and ends."""
  texts = []
  for line in sweep.lines:
    medians = line.points[metric][:, 1]
    name = ", ".join(filter(None, (words.attack_label(line.attack), line.rest)))
    first, last = (words.number(metric, float(medians[end])) for end in (0, -1))
    texts.append(f"{name}: median {first} at {line.x[0]:g}, {last} at {line.x[-1]:g}")
  return "; ".join(texts)


def _sites(study: StudyResults) -> list[tuple[CellResults, str, str]]:
  """Returns bars of the mask accuracy by site for the first cells, with descriptions."""
  shown = []
  for cell in study.done[:_MAX_PICTURE_CELLS]:
    accuracy = {
      attack: dict(list(sites.items())[:_MAX_SITES])
      for attack, summary in cell.summary.items()
      if (sites := summary.mask_accuracy_by_site)
    }
    if accuracy:
      text = "; ".join(
        f"{words.attack_label(attack)}: "
        + ", ".join(f"{site} {words.number('mask_accuracy', v)}" for site, v in sites.items())
        for attack, sites in accuracy.items()
      )
      shown.append((cell, figures.site_bars(accuracy), text))
  return shown


def _meanings(study: StudyResults) -> list[tuple[str, str]]:
  """Returns one line for each metric of the tables."""
  summaries = [summary for cell in study.done for summary in cell.summary.values()]
  names = ["images", "success", "iip", "pool"]
  names[1:1] = [name for summary in summaries for name in _metric_names(summary)]
  names += [name for summary in summaries for name in _site_metrics(summary)]
  names += _TIMES
  metrics = [words.metric(name) for name in dict.fromkeys(names)]
  return [(metric.title, metric.meaning) for metric in metrics]


def _command(study: StudyResults) -> str | None:
  """Returns the command that made the results, as it is typed."""
  manifests = [study.manifest, *(cell.manifest for cell in study.done[:1])]
  return words.command(next((m["command"] for m in manifests if m.get("command")), None))


def _versions(study: StudyResults) -> list[tuple[str, list[tuple[str, list[str]]]]]:
  """Returns all that the manifests say, but for the command."""
  manifests = {"study": study.manifest} if study.manifest else {}
  manifests |= {
    cell.name: {k: v for k, v in cell.manifest.items() if k not in study.manifest}
    for cell in study.done
  }
  return [
    row
    for row in _distinct({name: _flat(manifest) for name, manifest in manifests.items()})
    if row[0] != "command"
  ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
  """Returns nested settings as one level, with dots between the names."""
  flat: dict[str, str] = {}
  for name, inner in value.items():
    if isinstance(inner, dict) and inner:
      flat |= _flat(inner, f"{prefix}{name}.")
    else:
      flat[prefix + name] = words.text(inner)
  return flat


def _distinct(settings: dict[str, dict[str, str]]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
  """Returns each setting with its values, and of several values the cells that have them."""
  rows = []
  for name in dict.fromkeys(name for values in settings.values() for name in values):
    cells: dict[str, list[str]] = {}
    for cell, values in settings.items():
      if name in values:
        cells.setdefault(values[name], []).append(cell)
    everywhere = len(cells) == 1
    rows.append((name, [(value, [] if everywhere else of) for value, of in cells.items()]))
  return rows
