"""What setup.cfg asks for is what the code imports, and the core needs nothing else."""

import ast
import configparser
import json
import pathlib
import re
import subprocess
import sys

import pytest

from jaxdia.command_line import config_names
from jaxdia.commands import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
CORE_ROOMS = (
  "core",
  "models",
  "updates",
  "client",
  "gradients",
  "closed_form",
  "attacks",
  "engine",
)

# Where a package is imported by another name than it is installed by.
IMPORT_NAMES = {
  "absl-py": "absl",
  "orbax-checkpoint": "orbax",
  "pillow": "PIL",
  "scikit-learn": "sklearn",
  "tensorflow-datasets": "tensorflow_datasets",
}
# Asked for, though nothing here imports them: foolbox for the images that it ships, the others by
# tensorflow-datasets.
NOT_IMPORTED = {"foolbox", "importlib_resources"}


def requirements(text):
  """Returns {import name: its line} of the packages in a value of setup.cfg."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  lines = [line for line in lines if not line.startswith(("#", "jaxdia["))]
  names = [(re.match(r"[\w.-]+", line)[0], line) for line in lines]
  return {IMPORT_NAMES.get(name, name.replace("-", "_")): line for name, line in names}


def setup():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  core = requirements(config["options"]["install_requires"])
  extras = {k: requirements(v) for k, v in config["options.extras_require"].items()}
  return core, extras


CORE, EXTRAS = setup()
PACKAGE_EXTRAS = (
  *("images", "run", "samples", "digits", "tfds", "lpips", "tensorboard"),
  *("equinox", "safetensors", "orbax", "torch", "flower", "privacy", "text", "cluster"),
)


def imported(path, *, at_top_only):
  """Returns the packages, by their first name, that a module imports and that are not Python's."""
  tree = ast.parse(path.read_text())
  names = set()
  for node in tree.body if at_top_only else ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names.add(node.module.split(".")[0])
  return names - set(sys.stdlib_module_names) - {"jaxdia"}


def modules(room):
  folder = ROOT / "jaxdia" / room
  return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", CORE_ROOMS)
def test_a_core_room_imports_what_the_core_asks_for(room):
  for path in modules(room):
    assert imported(path, at_top_only=True) <= set(CORE), path


def test_all_that_is_imported_is_asked_for_and_the_other_way_round():
  asked = set(CORE).union(*(EXTRAS[name] for name in PACKAGE_EXTRAS))
  found = set().union(*(imported(p, at_top_only=False) for p in modules(".")))
  assert found - asked == set()
  assert asked - found == NOT_IMPORTED


def test_extras_that_errors_and_pages_name_exist():
  texts = [*modules("."), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
  for path in texts:
    for names in re.findall(r"(?:jaxdia|\.)\[([\w,]+)\]\"", path.read_text()):
      assert set(names.split(",")) <= set(EXTRAS), f"{path}: {names}"


def test_every_package_has_a_lower_bound():
  for lines in (CORE, *(EXTRAS[name] for name in PACKAGE_EXTRAS)):
    for line in lines.values():
      # Dropout of PyTorch is intercepted inside torchax, so that is pinned, and PyTorch with it.
      bounds = r"[\w.-]+ >= [\d.]+|torch >= [\d.]+, < [\d.]+|torchax == [\d.]+"
      assert re.fullmatch(bounds, line), line


def test_the_core_works_where_the_extras_are_not_installed():
  extras = set().union(*(EXTRAS[name] for name in PACKAGE_EXTRAS)) - set(CORE)
  script = f"""
import sys

class Missing:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {extras!r}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import jax, numpy as np
from jaxdia import attacks, closed_form, engine, models
from jaxdia.client import observe

model = models.create("mlp", (4, 4, 1), 3, 0.5, hidden_sizes=(8,))
images, labels = np.full((1, 4, 4, 1), 0.5, np.float32), np.array([1])
params = model.init(jax.random.key(0))
observation, _ = observe(jax.random.key(1), model, params, images, labels)
attack = attacks.create("dia", model, max_iterations=3)
(trial,) = engine.run([engine.Task(jax.random.key(2), attack, [observation])])
print("ended with", trial.status.name)
"""
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "ended with MAX_ITERATIONS" in done.stdout


def test_files_that_are_not_python_are_installed_too():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  patterns = {
    package.replace(".", "/") + "/" + pattern
    for package, value in config["options.package_data"].items()
    for pattern in re.split(r"[,\s]+", value.strip())
  }
  others = [p for p in (ROOT / "jaxdia").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
  for path in others:
    relative = path.relative_to(ROOT)
    assert path.suffix == ".py" or any(relative.match(p) for p in patterns), relative


def test_configs_are_shipped_and_found_by_name_in_any_folder(tmp_path):
  names = [p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.py")]
  assert sorted(config_names()) == sorted(name.removesuffix(".py") for name in names)
  program = [sys.executable, "-m", "jaxdia"]

  def run(*arguments):
    return subprocess.run([*program, *arguments], cwd=tmp_path, capture_output=True, text=True)

  done = run(
    "attack", "--config=quickstart", "--config.data.count=1", "--config.attack.name=closed_form"
  )
  assert done.returncode == 0, done.stderr
  manifest = json.loads((tmp_path / "runs" / "quickstart" / "manifest.json").read_text())
  assert manifest["command"][:5] == ["python", "-m", "jaxdia", "attack", "--config=quickstart"]
  assert all(command in run("--help").stdout for command in COMMANDS)
  for arguments, message in (
    (["attac"], "Did you mean 'attack'?"),
    (["attack", "--config=quickstar"], "Did you mean 'quickstart'?"),
  ):
    failed = run(*arguments)
    assert failed.returncode == 2 and message in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_help_of_a_command_fits_a_screen():
  for command in ("attack", "text"):
    shown = subprocess.run(
      [sys.executable, "-m", "jaxdia", command, "--help"], capture_output=True, text=True
    ).stdout
    assert 10 < len(shown.splitlines()) <= 45, command
    assert "--workdir" in shown


def test_what_is_pinned_twice_is_the_same():
  pinned = re.search(r"ruff == (\S+)", (ROOT / "setup.cfg").read_text())[1]
  hooks = (ROOT / ".pre-commit-config.yaml").read_text()
  assert re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks)[1] == pinned
  python = re.search(r"python_requires = >=(\S+)", (ROOT / "setup.cfg").read_text())[1]
  assert f'pythonVersion = "{python}"' in (ROOT / "pyproject.toml").read_text()


def test_every_part_of_the_checks_is_documented_and_run():
  text = (ROOT / ".ci" / "run").read_text()
  head = text.partition("set -euo")[0]
  documented = set(re.findall(r"^#   (\S+)  +\S", head, re.MULTILINE))
  workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
  run = set(re.findall(r'part: "?([\w.-]+)', workflow)) | {"slow"}
  assert documented - {"3.13-part"} == run - {"3.12", "3.13"}
  assert re.search(r"^    slow\)\n(.*\n){1,3}.*pytest -m slow", text, re.MULTILINE)
  nightly = workflow.partition("\n  slow:")[2]
  assert "schedule" in nightly and ".ci/run slow" in nightly and "cron:" in workflow


def test_the_part_of_tests_for_another_python_exists():
  """Those of lanes that are shared and of what is kept failed there once."""
  text = (ROOT / ".ci" / "run").read_text()
  names = "".join(re.findall(r"^touching\+?=(.*)$", text, re.MULTILINE)).split(",")
  assert {"groups", "store", "other_code"} <= set(names)
  for name in names:
    assert list((ROOT / "tests").glob(f"test_{name}*.py")), name
