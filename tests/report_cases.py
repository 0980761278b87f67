"""Files of finished experiments and studies with made-up numbers."""

import json

import numpy as np

from jaxdia.attacks.settings import told
from jaxdia.core.files import write_json

HOSTILE = "<script>alert(1)</script> & \"x\" 'y' $\\frac$"
TIMES = {"run_seconds": 123.25, "compile_seconds": 4.5, "scoring_seconds": 1.75}
METRICS = ("mse_normalized", "ssim", "mask_accuracy", "label_accuracy", "iterations", "seconds")
THRESHOLDS = [0.1, 0.3, 0.6, 0.9]


def _statistics(values):
  values = np.asarray([v for v in values if v is not None], np.float64)
  if not values.size:
    return None
  mean, std = float(values.mean()), float(values.std())
  return {
    "mean": mean, "std": std, "median": float(np.median(values)), "min": float(values.min()),
    "max": float(values.max()), "count": values.size, "ci95": [mean - std / 3, mean + std / 3],
  }  # fmt: skip


def write_experiment(
  folder, *, attacks=("ig", "dia"), rate=0.5, count=5, source="samples:mnist", recorded=True,
  shape=(12, 10, 1), batch_size=1, seed=0, ssim=None,
):  # fmt: skip
  """Writes the files of a finished experiment with made-up numbers."""
  rng = np.random.default_rng(seed)
  masks = {"ig": "expected", "wiig": "known"}
  config = {
    "seed": seed, "precision": "float32",
    "data": {"source": source, "count": count, "offset": 3, "batch_size": batch_size,
             "sha256": "ab" * 32},
    "model": {"name": "mlp", "dropout_rate": rate, "hidden_sizes": [256, 256]}, "restarts": 1,
    "attacks": {
      a: {"labels": "given", "masks": masks.get(a, "free"), "tv_weight": 1e-5} for a in attacks
    },
    "engine": {"lanes": None},
  }  # fmt: skip
  write_json(folder / "config.json", config)
  command = ["python", "launch/attack.py", "--config=configs/mlp.py:mnist"]
  write_json(
    folder / "manifest.json",
    {"command": command, "commit": None, "device": "TFRT_CPU_0", "jax": "0.8"},
  )
  rows, summary = [], {"floors": {"mean_image": {"mse_normalized": 0.97531, "ssim": 0.212345}}}
  arrays = {"originals": rng.uniform(size=(count, *shape)).astype(np.float32)}
  for number, attack in enumerate(attacks):
    best = 0.3 + 0.65 * number / max(len(attacks) - 1, 1) if ssim is None else ssim
    found = [
      {
        "image": 3 + i, "client": i // batch_size, "label": 1, "attack": attack, "model": "mlp",
        "dropout_rate": rate, "batch_size": batch_size, "lpips": None, "identified": None,
        "mse_normalized": None if i == 1 else 10 ** rng.uniform(-5, -1),
        "ssim": None if i == 1 else max(best - 0.1 * i, 0.01) + rng.uniform(0, 1e-3),
        "mask_accuracy": None if i == 1 else rng.uniform(0.5, 1), "label_accuracy": 1.0,
        "iterations": int(rng.integers(100, 9999)), "seconds": rng.uniform(30, 50),
        "status": "failed" if i == 1 else "converged", "closed_form": None,
      }
      for i in range(count)
    ]  # fmt: skip
    rows += found
    rate_at = [sum((r["ssim"] or 0) >= t for r in found) / count for t in THRESHOLDS]
    summary[attack] = {
      "attempted": count, "finished": count - 1, "failed": 1, "not_applicable": 0,
      "told": told(masks.get(attack, "free"), "given"),
      "metrics": {m: s for m in METRICS if (s := _statistics([r[m] for r in found]))},
      "mask_accuracy_by_site": {"dropout_0": rng.uniform(), "dropout_1": rng.uniform()},
      "mask_auc_by_site": {}, "oracle": {"ssim": _statistics([rng.uniform(), 0.5])},
      "success": {"ssim": {"thresholds": THRESHOLDS, "rate": rate_at}},
      "pool": 64, "iip": rng.uniform(), **TIMES,
      "accuracy": rng.uniform(), "epsilon": rng.uniform(1, 9),
    }  # fmt: skip
    arrays[attack] = np.clip(arrays["originals"] + 0.1, 0, 1).astype(np.float32)
    arrays[attack][1] = np.nan
  write_json(folder / "summary.json", summary)
  (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  np.savez(folder / "reconstructions.npz", labels=np.ones(count, int), **arrays)
  if recorded:
    frames = rng.integers(0, 256, (2, 4, *shape)).astype(np.uint8)
    np.savez(
      folder / "recordings.npz", iterations=[0, 10, 100, 900], **{a: frames for a in attacks}
    )


def write_study(
  folder, *, title="Rates", values=((0.25, 1), (0.5, 1), (0.75, 1)), failed=True, **options
):
  """Writes a study of finished cells with a dropout rate and a batch size, and two others."""
  cells = []
  for i, (rate, size) in enumerate(values):
    cells.append({
      "name": f"{i:03d}_rate{rate}", "status": "done", "reason": None, "seconds": 61.0,
      "overrides": {"model.dropout_rate": rate, "data.batch_size": size},
    })  # fmt: skip
    directory = folder / "cells" / cells[-1]["name"]
    write_experiment(directory, rate=rate, batch_size=size, seed=i, **options)
  if failed:
    others = {"bad": ("failed", f"out of memory {HOSTILE}"), "later": ("pending", None)}
    for name, (status, reason) in others.items():
      cells.append(
        {"name": name, "overrides": {}, "status": status, "reason": reason, "seconds": None}
      )
  write_json(folder / "study.json", {
    "name": "rates", "title": title, "question": "Does dropout protect?", "cells": cells,
    "manifest": {
      "jaxdia": "1.0", "cores": 2, "command": ["python", "launch/study.py", "--study=rates"],
    },
  })  # fmt: skip
