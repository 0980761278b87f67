"""How close a reconstruction came: matched to its originals, then scored."""

from jaxdia.evaluation.evaluate import (
  Evaluation,
  evaluate,
  floors,
  found_labels,
  pair,
  ssim_of_recording,
)
from jaxdia.evaluation.lpips import lpips
from jaxdia.evaluation.masks import mask_diagnostics
from jaxdia.evaluation.matching import assign, identified
from jaxdia.evaluation.metric import TABLES, Column, Metric, Pairs, rescale
from jaxdia.evaluation.metrics import REGISTRY, columns, find, mse, psnr, ssim
from jaxdia.evaluation.success import (
  NEARLY_EXACT_SSIM,
  RECOGNISABLE_SSIM,
  SSIM_LEVELS,
  bootstrap_interval,
  success_rates,
)

__all__ = [
  "NEARLY_EXACT_SSIM",
  "RECOGNISABLE_SSIM",
  "REGISTRY",
  "SSIM_LEVELS",
  "TABLES",
  "Column",
  "Evaluation",
  "Metric",
  "Pairs",
  "assign",
  "bootstrap_interval",
  "columns",
  "evaluate",
  "find",
  "floors",
  "found_labels",
  "identified",
  "lpips",
  "mask_diagnostics",
  "mse",
  "pair",
  "psnr",
  "rescale",
  "ssim",
  "ssim_of_recording",
  "success_rates",
]
