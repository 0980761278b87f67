"""What the numbers say, in sentences for a reader who is no expert."""

import statistics
from typing import Any, NamedTuple

from jaxdia.evaluation import NEARLY_EXACT_SSIM, RECOGNISABLE_SSIM
from jaxdia.experiment import local, training
from jaxdia.experiment.progress import duration
from jaxdia.experiment.schema import Row
from jaxdia.report.results import CellResults, StudyResults
from jaxdia.report.words import attack_label, number


class Judgement(NamedTuple):
  """The first thing that a reader sees.

  Attributes:
    headline: the answer in one sentence.
    findings: one text an attack, the one that saw most first.
    caveats: what must be known to read them.
    told: by attack, what it was told and what it was not.
  """

  headline: str
  findings: list[str]
  caveats: list[str]
  told: list[tuple[str, str]]


class _Score(NamedTuple):
  """One attack over all cells that are done."""

  attack: str
  attempted: int
  failed: int
  not_applicable: int
  measured: int  # images that have an SSIM
  recognisable: int
  nearly_exact: int
  best_ssim: float | None
  seconds: float | None
  knows_masks: bool
  knows_labels: bool
  by_cell: list[tuple[int, int, str]]  # recognisable, attempted, and the cell's name


def judge(study: StudyResults) -> Judgement:
  """Returns the verdict on a study.

  Args:
    study: of which at least one cell may be done.
  """
  scores = sorted(
    (_score(study, attack) for attack in study.attacks),
    key=lambda score: (  # the most telling first: it saw as much as any, and was told less
      score.knows_masks,
      -score.recognisable / max(score.attempted, 1),
      score.knows_labels,
      -score.nearly_exact / max(score.attempted, 1),
      -(score.best_ssim or 0),
    ),
  )
  return Judgement(
    headline=_headline(scores[0], len(study.done)) if scores else "There are no results yet.",
    findings=[_finding(score, study, score is scores[0]) for score in scores],
    caveats=_caveats(study, scores),
    told=[(attack_label(score.attack), _told(study, score.attack)) for score in scores],
  )


def _score(study: StudyResults, attack: str) -> _Score:
  cells = [cell for cell in study.done if attack in cell.summary]
  rows = [row for cell in cells for row in cell.rows_of(attack)]
  ssim, seconds = (
    [row.score(name) for row in rows if row.score(name) is not None] for name in ("ssim", "seconds")
  )
  counts = {
    name: sum(getattr(cell.summary[attack], name) for cell in cells)
    for name in ("attempted", "failed", "not_applicable")
  }
  return _Score(
    attack,
    **counts,
    measured=len(ssim),
    recognisable=_reached(rows, RECOGNISABLE_SSIM),
    nearly_exact=_reached(rows, NEARLY_EXACT_SSIM),
    best_ssim=max(ssim, default=None),
    seconds=statistics.median(seconds) if seconds else None,
    knows_masks=any(_settings(cell, attack).get("masks") == "known" for cell in cells),
    knows_labels=any(_settings(cell, attack).get("labels") == "given" for cell in cells),
    by_cell=[
      (
        _reached(cell.rows_of(attack), RECOGNISABLE_SSIM),
        cell.summary[attack].attempted,
        cell.name,
      )
      for cell in cells
    ],
  )


def _reached(rows: list[Row], threshold: float) -> int:
  return sum((row.score("ssim") or 0.0) >= threshold for row in rows)


def _settings(cell: CellResults, attack: str) -> dict[str, Any]:
  return cell.config.attacks.get(attack) or {}


def _headline(score: _Score, cells: int) -> str:
  images = f"{score.recognisable} of {score.attempted} images"
  if score.recognisable == score.attempted:
    images = f"all {score.attempted} images" if score.attempted > 1 else "the one image attacked"
  together = f" (over {cells} settings together)" if cells > 1 else ""
  name = attack_label(score.attack)
  if score.recognisable and not score.knows_masks:
    server = "A curious server that knows the labels" if score.knows_labels else "A curious server"
    return (
      f"{server} could see {images}{together}: {name} rebuilt them so that a person would recognise"
      " them."
    )
  if score.recognisable:
    return (
      f"Told the client's dropout masks, {name} rebuilt {images}{together} so that a person would"
      " recognise them. No attack without the masks was run; that is no proof of safety."
    )
  if not score.measured:
    return "No image was rebuilt that could be scored. That is no proof of safety."
  which = f"Even {name}, which was told the client's dropout masks," if score.knows_masks else name
  return (
    f"{which} rebuilt none of {score.attempted} images{together} so that a person would recognise"
    " it. That is no proof of safety."
  )


def _finding(score: _Score, study: StudyResults, first: bool) -> str:
  """Returns what an attack got and at what cost; the first one also says what the words mean."""
  name, images = attack_label(score.attack), f"{score.recognisable} of {score.attempted}"
  if not score.measured:
    text = f"With {name}, no image of {score.attempted} has an SSIM."
  elif first:
    text = (
      f"With {name}, {images} images were recovered so that a person would recognise them (SSIM of"
      f" at least {RECOGNISABLE_SSIM}), {score.nearly_exact} of them nearly exactly (SSIM of at"
      f" least {NEARLY_EXACT_SSIM})."
    )
  else:
    text = f"With {name}, {images} are recognisable, {score.nearly_exact} of them nearly exact."
  if score.failed or score.not_applicable:
    text += f" {score.failed} failed; to {score.not_applicable} the attack does not apply."
  if score.best_ssim is not None:
    text += f" Worst-protected image: SSIM {number('ssim', score.best_ssim)}."
  (few, of_few, least), *_, (plenty, of_plenty, most) = 2 * sorted(
    score.by_cell, key=lambda cell: cell[0] / max(cell[1], 1)
  )
  if few * of_plenty != plenty * of_few:
    text += f" From {few} of {of_few} (setting {least}) to {plenty} of {of_plenty} ({most})."
  if score.seconds is not None:
    text += f" Median time: {duration(score.seconds)} {_unit(study, score.attack)}"
    text += f" on this machine{_machine(study)}." if first else "."
  return text


def _unit(study: StudyResults, attack: str) -> str:
  cells = [cell for cell in study.done if attack in cell.summary]
  sizes = {cell.config.data.get("batch_size") for cell in cells}
  restarts = {cell.config.restarts for cell in cells}
  text = "an image"
  if sizes != {1}:
    text = f"a batch of {sizes.pop()} images" if len(sizes) == 1 else "a batch"
  return text if restarts <= {1, None} else f"{text} and restart"


def _machine(study: StudyResults) -> str:
  manifests = [study.manifest, *(cell.manifest for cell in study.done)]
  device = next((m["device"] for m in manifests if m.get("device")), None)
  return f": {device}" if device else ""


def _caveats(study: StudyResults, scores: list[_Score]) -> list[str]:
  texts = [
    f"Here “recognisable” means an SSIM of at least {RECOGNISABLE_SSIM}, “nearly exact” one of at"
    f" least {NEARLY_EXACT_SSIM}; 1 is a perfect copy. These are rules of thumb: look at the"
    " pictures.",
    "A failed attack does not show that images are safe: a longer search, more restarts or a better"
    " attack may succeed where these did not.",
  ]
  seeds = {cell.config.data.get("mask_seeds") or 1 for cell in study.done}
  if seeds - {1}:
    times = " or ".join(map(str, sorted(seeds)))
    texts.append(
      f"Each image was attacked under {times} sets of dropout masks, and counts for each."
    )
  if steps := {local.describe(cell.config.local) for cell in study.done} - {None}:
    texts.append(
      f"The server saw {'; '.join(sorted(steps))}. All attacks knew the steps, and which images"
      " were in each."
    )
  if learnt := {training.describe(cell.config.training) for cell in study.done} - {
    training.describe({})
  }:
    texts.append(
      f"The server sent {'; '.join(sorted(learnt))}. Accuracies are those of the whole training."
    )
  if defended := {row.defence for cell in study.done for row in cell.rows} - {None, "none"}:
    texts.append(
      f"Clients changed their gradients before they sent them: {', '.join(sorted(defended))}."
      " Searches knew it, unless attack.defence=ignored, and closed forms did not. An attack that"
      " is made for it may see more."
    )
  guesses = [
    cell.floors["mean_image"]["ssim"]
    for cell in study.done
    if "ssim" in cell.floors.get("mean_image", {})
  ]
  if guesses and max(guesses) >= RECOGNISABLE_SSIM:
    texts.append(
      "Caution: the mean image, a guess without any gradient, already has an SSIM of"
      f" {number('ssim', max(guesses))} here, so “recognisable” says little about these images."
    )
  picks = [
    (iip, cell.summary[score.attack].pool, score.attack)
    for score in scores
    if not score.knows_masks and score.recognisable < score.attempted
    for cell in study.done
    if score.attack in cell.summary and (iip := cell.summary[score.attack].iip) is not None
  ]
  if picks:
    share, pool, attack = max(picks, key=lambda pick: pick[0])
    text = f"Even an unclear picture can give an image away: up to {number('iip', share)} of what"
    text += f" {attack_label(attack)} rebuilt lies nearer to its own original than to any other"
    texts.append(text + (f" of a pool of {pool} images." if pool else "."))
  return texts


def _told(study: StudyResults, attack: str) -> str:
  """Returns what an attack was told, in every way in which the cells ran it."""
  texts = [
    cell.summary[attack].told or "what it was told of labels and masks is not recorded"
    for cell in study.done
    if attack in cell.summary
  ]
  return ". In other settings ".join(dict.fromkeys(texts)) + "."
