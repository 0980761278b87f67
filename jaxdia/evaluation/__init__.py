"""How close a reconstruction came: matched to its originals, then scored."""

from jaxdia.evaluation.evaluate import (
  Evaluation,
  evaluate,
  floors,
  found_labels,
  ssim_of_recording,
)
from jaxdia.evaluation.masks import mask_diagnostics
from jaxdia.evaluation.metrics import assign, identified, lpips, mse, psnr, rescale, ssim
from jaxdia.evaluation.success import (
  NEARLY_EXACT_SSIM,
  RECOGNISABLE_SSIM,
  SSIM_LEVELS,
  THRESHOLDS,
  bootstrap_interval,
  success_curve,
)

__all__ = [
  "NEARLY_EXACT_SSIM",
  "RECOGNISABLE_SSIM",
  "SSIM_LEVELS",
  "THRESHOLDS",
  "Evaluation",
  "assign",
  "bootstrap_interval",
  "evaluate",
  "floors",
  "found_labels",
  "identified",
  "lpips",
  "mask_diagnostics",
  "mse",
  "psnr",
  "rescale",
  "ssim",
  "ssim_of_recording",
  "success_curve",
]
