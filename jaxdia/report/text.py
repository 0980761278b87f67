"""One page about an experiment with text: originals and what was read, side by side."""

import json
import pathlib
from typing import Any

from jaxdia.core.errors import InputError, first_line
from jaxdia.experiment.text import ATTACKS, SequenceRow, read_rows
from jaxdia.report.page import write_page

# Sequences that are shown; the rest is in results.jsonl.
_SHOWN = 32
_COLUMNS = {
  "token_accuracy": "Right tokens",
  "exact": "Exact sequences",
  "bag_accuracy": "Tokens at any place",
  "rouge1": "ROUGE-1",
  "rouge2": "ROUGE-2",
  "rougeL": "ROUGE-L",
}


def write_text_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` about the experiment in a folder.

  Args:
    workdir: of `jaxdia.experiment.text.run_text`.

  Returns:
    The path of the page.

  Raises:
    InputError: there is no finished experiment.
  """
  try:
    summary = json.loads((workdir / "summary.json").read_text())
    config = json.loads((workdir / "config.json").read_text())["config"]
    command = json.loads((workdir / "manifest.json").read_text())["command"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(
      f"{workdir} holds no finished experiment with text ({first_line(error)}). Run launch/text.py"
      " with this --workdir first."
    ) from error
  rows = read_rows(workdir)
  return write_page(workdir, "text.html.j2", _context(summary, config, command, rows))


def _context(
  summary: dict[str, Any], config: dict[str, Any], command: list[str], rows: list[SequenceRow]
) -> dict[str, Any]:
  best = max(summary, key=lambda attack: summary[attack]["token_accuracy"])
  sequences: dict[int, list[SequenceRow]] = {}
  for row in rows:
    sequences.setdefault(row.sequence, []).append(row)
  return {
    "headline": (
      f"A curious server could read {summary[best]['token_accuracy']:.1%} of the tokens, and"
      f" {summary[best]['exact'] * summary[best]['sequences']:.0f} of"
      f" {summary[best]['sequences']} sequences word for word, with the attack {best!r}."
    ),
    "setting": (
      f"{config['model']['name']} in training mode, dropout {config['model']['dropout_rate']},"
      f" batches of {config['data']['batch_size']} sequences of {config['data']['length']} tokens,"
      f" token embedding {'frozen' if config['frozen_embedding'] else 'trained'},"
      f" defence {config['defence']['name']}."
    ),
    "columns": _COLUMNS,
    "summary": summary,
    "attacks": ATTACKS,
    "sequences": list(sequences.values())[:_SHOWN],
    "left": max(len(sequences) - _SHOWN, 0),
    "command": " ".join(command),
  }
