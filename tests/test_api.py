"""Rules that hold for the whole package, checked by looking at it."""

import ast
import collections
import inspect
import pathlib
import re

import pytest

import jaxdia

PACKAGE = pathlib.Path(jaxdia.__file__).parent
ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name


def _public_functions(path):
  tree = ast.parse(path.read_text())
  bodies = [tree.body] + [n.body for n in tree.body if isinstance(n, ast.ClassDef)]
  for body in bodies:
    for node in body:
      if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
        yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_functions_have_types_and_docstrings(path):
  for node in _public_functions(path):
    arguments = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
    assert all(a.annotation for a in arguments) or arguments[-1].arg == "dtype", node.name
    assert node.returns is not None, node.name
    assert ast.get_docstring(node), node.name


def test_attacks_never_reach_the_secret():
  for room in ("attacks", "closed_form", "engine", "models", "updates"):
    for path in (PACKAGE / room).rglob("*.py"):
      for name in _imports(path):
        assert not name.endswith(".Secret"), path
        assert not name.startswith(("jaxdia.evaluation", "jaxdia.experiment")), path
      assert "secret" not in path.read_text().lower().replace("# secret", ""), path


def test_of_an_audit_only_what_reads_the_truth_to_score_it_knows_the_secret():
  knowing = {p.name for p in (PACKAGE / "audit").glob("*.py") if "Secret" in p.read_text()}
  assert knowing == {"run.py"}


def test_rooms_import_only_from_the_rooms_below_them():
  order = [
    "core", "models", "client", "updates", "gradients", "closed_form", "attacks", "engine",
    "data", "evaluation", "experiment", "audit", "report", "study", "command_line",
    "commands", "__main__",
  ]  # fmt: skip
  for path in FILES:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
      continue
    for name in _imports(path):
      if match := re.match(r"jaxdia\.(\w+)", name):
        other = match[1]
        assert other == room or order.index(other) < order.index(room), f"{path}: {name}"


def test_all_names_that_are_exported_exist():
  import importlib

  for path in PACKAGE.rglob("__init__.py"):
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).parent.parts))
    for name in getattr(module, "__all__", []):
      assert inspect.getattr_static(module, name) is not None


def test_files_can_be_read_in_one_sitting():
  files = [*FILES, *(f for room in ("tests", "benchmarks") for f in (ROOT / room).rglob("*.py"))]
  lengths = {str(path): len(path.read_text().splitlines()) for path in files}
  assert len(lengths) == len(files) and any("benchmarks" in name for name in lengths)
  assert not {name: length for name, length in lengths.items() if length > 400}


def test_a_class_name_stands_for_one_thing():
  places = collections.defaultdict(list)
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ClassDef):
        places[node.name].append(str(path.relative_to(PACKAGE)))
  assert len(places) > 100
  assert not {name: files for name, files in places.items() if len(files) > 1}
