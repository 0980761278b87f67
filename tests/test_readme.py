"""The Python of README and docs runs as it stands, and what they link to and name exists."""

import pathlib
import re
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
  ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def name(page):
  return str(page.relative_to(ROOT))


def blocks(page):
  return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def anchors(page):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(page):
  """Runs the blocks of a page, one after another, and returns the names that they leave."""
  namespace = {"__name__": page.stem}
  for number, block in enumerate(blocks(page)):
    exec(compile(block, f"{name(page)}, block {number}", "exec"), namespace)
  return namespace


def test_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_how_to_add_a_thing_fits_in_ten_lines():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  for section in re.split(r"^###? .*$", text.partition("## How to add …")[2], flags=re.MULTILINE):
    steps = section.strip().partition("\n\n")[2].splitlines()
    assert len(steps) <= 10, "\n".join(steps)
  assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 100


# What must hold after the Python of a page ran, for each page that has some.
def _readme(found, printed):
  objective, mse = map(float, printed.split())
  assert 0 < objective < 0.1 and 0 < mse < 0.1


def _library(found, printed):
  assert printed.count("Job(") == 4
  assert found["objectives"].shape == (8, 100)
  assert (found["objectives"][:, -1] < found["objectives"][:, 0]).all()


def _models(found, printed):
  assert found["logits"].shape == (4, 10)
  # The last of its models is that of plain functions.
  assert found["model"].network.name == "apply" and found["model"].rates == {"hidden": 0.5}


def _studies(found, printed):
  from jaxdia import study

  names = [cell.name for cell in study.plan(found["get_config"]())]
  assert names == ["000_hidden_sizes=64", "001_hidden_sizes=512"]


def _updates(found, printed):
  assert printed.split() == ["4", "exact"]


def _audit(found, printed):
  assert printed.splitlines()[-1] == "['certain', 'certain'] ['factor']"


def _clusters(found, printed):
  del printed
  assert found["study"].plan(found["dropout_rate"].get_config())


CHECKS = {
  "README.md": _readme,
  "docs/audit.md": _audit,
  "docs/clusters.md": _clusters,
  "docs/library.md": _library,
  "docs/models.md": _models,
  "docs/studies.md": _studies,
  "docs/updates.md": _updates,
}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_python_runs(page, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where it may write files
  # Of a machine with SLURM.
  monkeypatch.setitem(sys.modules, "dask_jobqueue", types.SimpleNamespace(SLURMCluster=None))
  found = run(page)
  CHECKS[name(page)](found, capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
  text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
  for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target), link


def test_the_list_of_scores_is_the_registry():
  from jaxdia.experiment.table import metrics_markdown

  page = (ROOT / "docs/outputs.md").read_text().partition("## Scores")[2]
  found = "".join(line + "\n" for line in page.splitlines() if line.startswith("|"))
  assert found == metrics_markdown(), "the list should be:\n" + metrics_markdown()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_fields_that_are_named_exist(page):
  from jaxdia.experiment import config as images
  from jaxdia.experiment import text

  config = (text if page.name == "text.md" else images).default_config()
  pattern = r"config\.(?:base\.)?(data|attack|engine|model)\.(\w+)"
  for group, field in re.findall(pattern, page.read_text()):
    # What a network of one's own takes is not known here.
    of_own_network = group == "model" and "config.model.name=mypackage" in page.read_text()
    assert of_own_network or field in config[group], f"{group}.{field}"


def test_messages_of_the_index_exist():
  """Each message of docs/errors.md is one of the code, but for values and line breaks."""
  sources = [p.read_text() for p in (ROOT / "jaxdia").rglob("*.py")]
  # Texts that stand one after another are one text, and what is in braces is a value.
  code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources)).replace("'", "").replace('"', "")
  code = re.sub(r"\{[^{}]*\}", "…", code) + "Flag --config must have a value other than None"
  rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
  assert len(rows) > 20
  for row in rows:
    if what := re.fullmatch(r"Unknown (.+) …", row):
      assert f"unknown({what[1]}" in code, row
      continue
    for part in row.replace("'", "").split("…"):
      assert part.strip(" ()[]:,;") in code, row
