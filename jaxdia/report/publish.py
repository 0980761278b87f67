"""A study as files for a repository: a table in Markdown and CSV, and figures."""

import pathlib
import shlex

import pandas as pd

from jaxdia import evaluation
from jaxdia.core.errors import InputError
from jaxdia.core.files import write_atomically
from jaxdia.experiment.table import markdown
from jaxdia.report import figures
from jaxdia.report.results import StudyResults, read_study
from jaxdia.report.sweeps import DRAWN, find_sweeps
from jaxdia.report.tradeoff import find_tradeoff
from jaxdia.report.words import attack_label


def publish(workdir: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
  """Writes NAME.md with its figures, and NAME.csv.

  Args:
    workdir: of a study.
    folder: where the files go; made if needed.
    name: of the files.

  Returns:
    The Markdown file.

  Raises:
    InputError: the folder holds no study with results.
  """
  study = read_study(workdir)
  if not (workdir / "table.csv").is_file() or not study.done:
    raise InputError(f"{workdir} holds no study with results. Run launch/evaluate.py there first.")
  table = pd.read_csv(workdir / "table.csv")
  csv = (workdir / "table.csv").read_bytes()
  m = study.manifest
  try:
    python, program, *arguments = m["command"]
    machine = (
      f"{m['device']} x {m['devices']}, {m['cores']} cores, {m['platform']}, Python {m['python']},"
      f" jax {m['jax']}, jaxdia {m['jaxdia']} at commit {m['commit']}, started {m['started']}."
    )
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(f"the manifest in {workdir / 'study.json'} is damaged ({error!r}).") from error
  # Where it was run is nobody's business.
  after = [False, *(word in ("--workdir", "-workdir") for word in arguments)]
  arguments = [
    word
    for word, is_path in zip(arguments, after, strict=False)
    if not is_path and not word.lstrip("-").startswith("workdir")
  ]
  command = shlex.join([python, program, *arguments, f"--workdir=runs/{name}"])
  lines = [
    f"# {study.title}",
    study.question,
    f"    {command}",
    machine,
    _table(study, table),
  ]
  try:
    write_atomically(folder / f"{name}.csv", lambda file: file.write(csv))
  except OSError as error:
    raise InputError(f"cannot write in {folder} ({error}). Choose another folder.") from error
  failed = [cell for cell in study.cells if cell.entry.status != "done"]
  lines += [f"Not done: {cell.name}: {cell.entry.reason or cell.entry.status}" for cell in failed]
  if points := find_tradeoff(study):
    picture = figures.tradeoff(points)
    write_atomically(folder / f"{name}_tradeoff.png", lambda f: f.write(picture))
    lines.append(f"![test accuracy against what leaks]({name}_tradeoff.png)")
  for sweep in find_sweeps(study):
    pictures = []
    for metric in DRAWN:
      file = f"{name}_{sweep.setting.rpartition('.')[2]}_{metric}.png"
      picture = figures.sweep_curves(sweep, metric)
      write_atomically(folder / file, lambda f, data=picture: f.write(data))
      pictures.append(f"![{metric} over {sweep.setting}]({file})")
    lines.append(" ".join(pictures))
  text = "\n\n".join(lines) + "\n"
  path = folder / f"{name}.md"
  write_atomically(path, lambda file: file.write(text.encode()))
  return path


def _table(study: StudyResults, table: pd.DataFrame) -> str:
  """Returns what differs between the cells, and the main numbers, as Markdown."""
  settings = dict.fromkeys(name for cell in study.done for name in cell.entry.overrides)
  values = {name: [str(cell.entry.overrides.get(name)) for cell in study.done] for name in settings}
  about = [name for name in settings if len(set(values[name])) > 1 and name != "attack.name"]
  kept = {name: name for name in about} | {"attack": "attack"}
  kept |= {column.key: m.heading(column) for m, column in evaluation.columns("published")}
  kept = {name: heading for name, heading in kept.items() if name in table}
  shown = pd.DataFrame(table[list(kept)]).rename(columns=kept).copy()
  shown["attack"] = [attack_label(attack) for attack in shown["attack"]]
  done = zip(table["finished"], table["attempted"], strict=True)
  shown.insert(len(about) + 1, "images", [f"{a}/{b}" for a, b in done])
  shown = shown.dropna(axis="columns", how="all")
  return markdown(list(shown), shown.itertuples(index=False)).rstrip()
