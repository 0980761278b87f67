"""What the report calls a metric, how it writes its numbers, and what they mean."""

import json
from typing import Any, NamedTuple


class Metric(NamedTuple):
  """How a metric is shown.

  Attributes:
    label: in tables.
    form: format of its numbers.
    meaning: one line for people who do not know it.
  """

  label: str
  form: str
  meaning: str


_METRICS = {
  "mse_normalized": Metric(
    "MSE, normalised",
    "{:.2e}",
    "mean squared error on pixels scaled to mean 0 and deviation 1, as in the DIA paper; 0 is an"
    " exact copy, and a flat guess gets about 1 or less",
  ),
  "mse": Metric("MSE, pixels", "{:.2e}", "mean squared error on pixels from 0 to 1; 0 is exact"),
  "psnr": Metric(
    "PSNR, dB", "{:.1f}", "signal-to-noise ratio in decibels; above 30 is hard to tell apart"
  ),
  "ssim": Metric(
    "SSIM",
    "{:.3f}",
    "structural similarity: how alike patterns of light and dark are; 1 is an exact copy, about 0"
    " is unrelated",
  ),
  "lpips": Metric(
    "LPIPS", "{:.3f}", "distance as a trained network perceives it; 0 is exact, above 0.5 unlike"
  ),
  "mse_scaled": Metric(
    "MSE, rescaled", "{:.2e}", "of pixels, once both images are stretched to reach from 0 to 1"
  ),
  "psnr_scaled": Metric("PSNR, rescaled, dB", "{:.1f}", "of images stretched likewise"),
  "ssim_scaled": Metric("SSIM, rescaled", "{:.3f}", "of images stretched likewise"),
  "mask_accuracy": Metric(
    "masks right",
    "{:.1%}",
    "share of the client's dropout mask, kept or dropped, that the attack found; a guess already"
    " gets much of it",
  ),
  "label_accuracy": Metric(
    "labels right", "{:.1%}", "share of labels that the attack found; trivial if they were given"
  ),
  "identified": Metric(
    "identified", "{:.1%}", "whether the nearest image of the pool is the own original"
  ),
  "iip": Metric(
    "IIP",
    "{:.1%}",
    "image identification precision: share of reconstructions whose nearest image of a pool, by"
    " squared error, is their own original; pure chance gives one over the pool's size",
  ),
  "objective": Metric("objective", "{:.2e}", "what the search made small; known to the attacker"),
  "gradient_distance": Metric(
    "gradient distance",
    "{:.2e}",
    "between the client's gradient and that of the reconstruction; known to the attacker",
  ),
  "iterations": Metric("iterations", "{:,.0f}", "steps of the search until it ended"),
  "gradient_evaluations": Metric(
    "gradient evaluations", "{:,.0f}", "that all restarts made; those of a line search are not told"
  ),
  "seconds": Metric(
    "seconds", "{:.3g}", "that the result took, compiling apart; other trials ran at the same time"
  ),
  "mask_accuracy_by_site": Metric(
    "right, of a site", "{:.1%}", "share of the mask of one dropout site that the attack found"
  ),
  "mask_auc_by_site": Metric(
    "AUC, of a site", "{:.3f}", "chance that a kept entry looks more kept than a dropped one"
  ),
  "mask_undecided_by_site": Metric(
    "undecided, of a site", "{:.1%}", "share of a searched mask that is neither near 0 nor near 1"
  ),
  "mask_dropped_by_site": Metric(
    "dropped, of a site", "{:.1%}", "share that the searched mask drops, to compare with the rate"
  ),
  "success": Metric(
    "success", "{:.1%}", "share of all attempted images whose SSIM reaches a threshold"
  ),
  "pool": Metric("pool", "{:,.0f}", "number of images from which IIP picks"),
  "images": Metric("images", "{:,.0f}", "that were attempted, finished, failed, or not applicable"),
  "run_seconds": Metric("run, s", "{:.3g}", "seconds that all searches of an attack took"),
  "compile_seconds": Metric("compile, s", "{:.3g}", "seconds of compiling before them"),
}


def metric(name: str) -> Metric:
  """Returns how a metric is shown; one that is not known here goes by its name."""
  if name.startswith("oracle."):
    shown = metric(name.removeprefix("oracle."))
    meaning = "of the restarts that the truth would choose; no attacker can choose so"
    return shown._replace(label=f"{shown.label}, best restart", meaning=meaning)
  what, _, threshold = name.partition("_to_ssim_")
  if threshold:
    meaning = f"of the search until the SSIM first was {threshold}, of the images that got there"
    return Metric(f"{what} to SSIM {threshold}", metric(what).form, meaning)
  return _METRICS.get(name, Metric(name.replace("_", " "), "{:.4g}", "see the documentation"))


def number(name: str, value: float | None) -> str:
  """Returns a number of a metric as text, rounded.

  Args:
    name: of the metric.
    value: None if there is none.
  """
  return "–" if value is None else metric(name).form.format(value)


def text(value: Any) -> str:
  """Returns the value of a setting as text: strings as they are, all else as JSON."""
  return value if isinstance(value, str) else json.dumps(value)


def attack_label(name: str) -> str:
  """Returns the name of an attack as it is written in the report."""
  return name.upper().replace("_", " ")
