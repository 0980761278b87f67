"""A study whose cells share a program and its lanes, against its cells one after another.

python benchmarks/study.py

Each row is a study of one field on MNIST and the MLP at dropout rate 0.5, run twice in the same
process: each cell as an experiment of its own, and as a study. Both pay for compilation, with
the cache on disk switched off, and for scoring; what is compiled once a process is compiled before.
"""

import pathlib
import tempfile
import time
from typing import Any

import jax
import ml_collections
from absl import flags
from measuring import Table, about_device

from jaxdia import experiment, study
from jaxdia.command_line import launch
from jaxdia.experiment.config import config_for

_VARY = flags.DEFINE_list(
  "vary",
  ["model.dropout_rate=0.1:0.25:0.5:0.75", "attack.mask_weight=0.0:1e-4:1e-2", "seed=0:1:2:3"],
  "FIELD=VALUE:VALUE:..., ...",
)
_COUNT = flags.DEFINE_integer("count", 4, "Images of each cell.", lower_bound=1)
_ITERATIONS = flags.DEFINE_integer("max_iterations", 2_000, "Of each trial.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")


def main() -> None:
  """Measures all rows and prints them as a Markdown table."""
  jax.config.update("jax_enable_compilation_cache", False)
  columns = {
    "field": "", "cells": "d", "groups": "d", "trials": "d", "alone s": ".1f", "study s": ".1f",
    "times faster": ".1f",
  }  # fmt: skip
  table = Table(about_device(), columns)
  base = config_for("mlp", "mnist")
  base.model.dropout_rate = 0.5
  base.data.count = _COUNT.value
  base.attack.max_iterations = 1
  _study_seconds(study.study_config("", "", base))
  base.attack.max_iterations = _ITERATIONS.value
  for varied in _VARY.value:
    field, _, values = varied.partition("=")
    kind = int if field == "seed" else float
    config = study.study_config(field, "", base, grid=[(field, [*map(kind, values.split(":"))])])
    cells = study.plan(config)
    alone, together = _alone_seconds(cells), _study_seconds(config)
    table.add(
      **{
        "field": field,
        "cells": len(cells),
        "groups": len(study.group(cells)),
        "trials": len(cells) * _COUNT.value,
        "alone s": alone,
        "study s": together,
        "times faster": alone / together,
      }
    )
  table.write(_OUT.value)


def _silent(text: Any) -> None:
  del text


def _alone_seconds(cells: list[study.Cell]) -> float:
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    for cell in cells:
      experiment.run(cell.config, pathlib.Path(folder) / cell.name, say=_silent)
    return time.perf_counter() - start


def _study_seconds(config: ml_collections.ConfigDict) -> float:
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    study.run(config, pathlib.Path(folder), say=_silent)
    return time.perf_counter() - start


if __name__ == "__main__":
  launch(main)
