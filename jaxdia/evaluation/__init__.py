"""How close a reconstruction came: matched to its originals, then scored."""

from jaxdia.evaluation.evaluate import Evaluation, evaluate, found_labels
from jaxdia.evaluation.metrics import assign, lpips, mask_accuracy, mse, psnr, ssim

__all__ = [
  "Evaluation",
  "assign",
  "evaluate",
  "found_labels",
  "lpips",
  "mask_accuracy",
  "mse",
  "psnr",
  "ssim",
]
