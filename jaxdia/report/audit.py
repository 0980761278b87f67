"""One page about the audit of updates, which first answers what a server could see."""

import pathlib
from typing import Any

import numpy as np

from jaxdia.audit import images_path
from jaxdia.audit.schema import VERDICTS, Audit, UpdateEntry
from jaxdia.core.errors import InputError
from jaxdia.core.files import UnreadableFile, read_npz
from jaxdia.experiment.local import describe
from jaxdia.experiment.progress import duration
from jaxdia.experiment.schema import decode
from jaxdia.report import figures, words
from jaxdia.report.page import write_page

# What a search may find at every dropout rate, and what makes it harder, whatever the rate.
_HARDER = (
  "Larger batches: the images share one gradient, and the unknowns grow with them.",
  "Secure aggregation, so that the server sees only a sum over many clients.",
  "Clipping the gradient of each example and adding noise to it (DP-SGD): the only measure of these"
  " with a proof. Dropout is none: it is found together with the images.",
  "Several local steps on different images at a learning rate that is not small.",
)
_NEVER_TRIED = (
  "Knowledge of what such images look like beyond smoothness, as a generative model has it.",
  "Several updates of the same client together: each was audited by itself.",
)
# Of an update that seems to hold them, and of which they were not said.
_NO_STEPS = (
  "The simulation of several local steps (config.local_epochs, config.local_steps): none were set,"
  " and the update was taken for one step."
)


def write_audit_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` about the audit in a folder.

  Args:
    workdir: of `jaxdia.audit.run`.

  Returns:
    The path of the page.

  Raises:
    InputError: there is no audit, or a file of it is damaged.
  """
  path = workdir / "audit.json"
  try:
    audit = decode(path.read_bytes(), Audit)
    arrays = [_images(workdir, number, one) for number, one in enumerate(audit.updates)]
  except (OSError, ValueError, UnreadableFile) as error:
    raise InputError(
      f"{workdir} holds no whole audit ({error}). Give the folder that launch/audit.py wrote, or"
      " run that again."
    ) from error
  return write_page(workdir, "audit.html.j2", _context(audit, arrays))


def _images(workdir: pathlib.Path, number: int, update: UpdateEntry) -> dict[str, np.ndarray]:
  """Reads the images of an update, and the truth if it is there."""
  path = images_path(workdir, number)
  arrays = read_npz(path)
  for name in {"images", "truth"} & set(arrays) | {"images"}:
    array = arrays.get(name, np.zeros(0))
    if array.dtype.kind != "f" or array.ndim != 4 or len(array) != len(update.images):
      raise UnreadableFile(f"in {path.name} {name} are {array.dtype} of shape {array.shape}")
  return arrays


def _context(audit: Audit, arrays: list[dict[str, np.ndarray]]) -> dict[str, Any]:
  return {
    "headline": headline(audit),
    "audit": audit,
    "updates": [
      (update, _pictures(update, found))
      for update, found in zip(audit.updates, arrays, strict=True)
    ],
    "verdicts": VERDICTS,
    "known": _known(audit),
    "not_tried": _not_tried(audit),
    "harder": _HARDER,
    "command": words.command(audit.manifest.get("command")),
    "manifest": {k: words.text(v) for k, v in audit.manifest.items() if k != "command"},
    "duration": duration,
  }


def headline(audit: Audit) -> str:
  """Returns the answer to what a server could see, in a sentence or two.

  Args:
    audit: of one update or several.
  """
  total = sum(len(update.images) for update in audit.updates)
  counts = {v: sum(update.count(v) for update in audit.updates) for v in VERDICTS}
  images = f"{total} image{'s' * (total != 1)}"
  where = "this update" if len(audit.updates) == 1 else f"these {len(audit.updates)} updates"
  if counts["certain"] == total:
    which = "the one image" if total == 1 else f"all of the {images}"
    return f"Yes: from {where} a server can compute {which}, and prove that it did."
  seen = counts["certain"] + counts["likely"]
  parts = []
  if counts["certain"]:
    parts.append(f"{counts['certain']} for certain")
  if counts["likely"]:
    parts.append(f"{counts['likely']}" + " very likely" * bool(counts["certain"]))
  if counts["partial"]:
    parts.append(f"{counts['partial']} in part")
  if seen:
    answer = "Yes" if counts["certain"] else "Very likely"
    return f"{answer}: of the {images} of {where} a server can see {', '.join(parts)}."
  if counts["partial"]:
    return (
      f"Perhaps: of the {images} of {where}, what was found explains {counts['partial']} in part"
      " only."
    )
  return (
    f"Not by what was tried: none of the {images} of {where} was found. That is no proof that no"
    " one can."
  )


def _pictures(update: UpdateEntry, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
  truth = arrays.get("truth")
  pictures = []
  for number, image in enumerate(update.images):
    ssim = image.scores.get("ssim")
    pictures.append(
      {
        "image": image,
        "uri": figures.image_uri(arrays["images"][number]),
        "truth": None if truth is None else figures.image_uri(truth[number]),
        "ssim": None if ssim is None else words.number("ssim", ssim),
      }
    )
  return pictures


def _known(audit: Audit) -> list[tuple[str, str]]:
  """Returns what the auditor said of the updates, for people."""
  settings = audit.settings
  shape = "x".join(map(str, settings["image_shape"]))
  rows = [
    ("network", f"{audit.model['name']}, {audit.model['parameters']:,} weights"),
    ("dropout", _sites(audit.model["sites"])),
    ("images", f"{settings['batch_size']} of {shape}, {settings['num_classes']} classes"),
    ("mode", settings["mode"]),
    ("labels", "given" if settings["labels"] else "not given"),
    ("loss", _loss(settings["loss"])),
    ("defence", settings.get("defence", {}).get("name", "none")),
    ("statistics", ", ".join(f"{k} {v}" for k, v in settings["statistics"].items())),
  ]
  if settings["gradient"]:
    rows.append(("update", "a gradient"))
  else:
    what = "weights before and after" if settings["after"] else "difference of the weights after"
    rows.append(("update", f"{what} {_training(settings)}"))
  if settings["weight_decay"]:
    rows.append(("weight decay", f"{settings['weight_decay']:g}"))
  return rows


def _training(settings: dict[str, Any]) -> str:
  """Returns what came between the weights; of older audits too, which know steps alone."""
  names = {"epochs": "local_epochs", "steps": "local_steps"}
  names |= {name: name for name in ("learning_rate", "optimizer", "momentum", "clients")}
  steps = describe({field: settings[name] for field, name in names.items() if name in settings})
  if steps is not None:
    return steps
  rate = settings["learning_rate"]
  return f"1 step at {'an unknown learning rate' if rate is None else f'learning rate {rate:g}'}"


def _loss(loss: dict[str, Any]) -> str:
  if ":" in loss["kind"]:
    return loss["kind"]  # a function of the user's own
  smoothing = loss["label_smoothing"]
  smoothed = f", label smoothing {smoothing:g}" if smoothing else ""
  return f"{loss['reduction']} {loss['kind'].replace('_', ' ')}{smoothed}"


def _sites(sites: dict[str, float]) -> str:
  if not sites:
    return "none"
  rates = sorted(set(sites.values()))
  shown = ", ".join(f"{rate:g}" for rate in rates)
  return f"{len(sites)} site{'s' * (len(sites) != 1)}, rate {shown}"


def _not_tried(audit: Audit) -> list[str]:
  tried = [attempt for update in audit.updates for attempt in update.attempts]
  seconds = audit.settings["seconds"]
  texts = []
  if all(attempt.iterations is None for attempt in tried):  # none was a search
    reason = "linear algebra had found all"
    if not seconds:
      reason = "config.seconds is 0"
    elif not tried:
      reason = "what was sent cannot be audited so"
    texts.append(f"A search for images and masks: {reason}.")
  else:
    texts.append(f"A longer search than {seconds:g} seconds for each update (config.seconds).")
  several = {"several steps", "noise"} & {f.name for one in audit.updates for f in one.findings}
  if several and not _simulates_steps(audit.settings):
    texts.append(_NO_STEPS)
  return [*texts, *_NEVER_TRIED]


def _simulates_steps(settings: dict[str, Any]) -> bool:
  """Returns whether more than one local step was said to be between the weights."""
  return any(settings.get(name, 1) > 1 for name in ("local_epochs", "local_steps"))
