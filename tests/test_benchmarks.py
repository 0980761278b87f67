"""The benchmarks run, and say what is missing; what they measure is not judged here."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def _run(name, *arguments):
  command = [sys.executable, f"benchmarks/{name}.py", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, arguments, rows",
  [
    ("iteration", ["--cases=mlp:mnist", "--lanes=1,4", "--matching=auto"], 2),
    ("recording", ["--cases=mlp:mnist", "--lanes=2", "--rounds=1"], 1),
    ("scaling", ["--vary=lanes,devices", "--lanes=2", "--devices=1,3", "--cpu_devices=3"], 3),
  ],
)
def test_each_row_has_a_time(name, arguments, rows, tmp_path):
  out = tmp_path / "rows.json"
  result = _run(name, *arguments, "--seconds=0.05", f"--out={out}")
  assert result.returncode == 0, result.stderr
  content = json.loads(out.read_text())
  assert content["matrix product GFLOP/s"] > 0
  assert len(content["rows"]) == rows and all(row["ms"] > 0 for row in content["rows"])
  assert result.stdout.count("\n| ") == rows + 1


@pytest.mark.slow
def test_precision_measures_both_kinds_of_products(tmp_path):
  out = tmp_path / "rows.json"
  arguments = ["--rates=0.25", "--count=2", "--max_iterations=50", f"--out={out}"]
  assert _run("precision", *arguments).returncode == 0
  exact, rounded = json.loads(out.read_text())["rows"]
  assert (exact["products"], rounded["products"]) == ("float32", "bfloat16")
  assert exact["median MSE"] != rounded["median MSE"]


@pytest.mark.slow
def test_a_study_is_timed_against_its_cells(tmp_path):
  out = tmp_path / "rows.json"
  arguments = ["--vary=seed=0:1,model.dropout_rate=0.0:0.5", "--count=1", "--max_iterations=5"]
  assert _run("study", *arguments, f"--out={out}").returncode == 0
  seeds, rates = json.loads(out.read_text())["rows"]
  assert (seeds["groups"], rates["groups"]) == (1, 2) and seeds["cells"] == rates["cells"] == 2
  assert min(seeds["study s"], rates["alone s"]) > 0


def test_a_missing_checkout_is_named(tmp_path):
  result = _run("versus_reference", f"--reference={tmp_path}")
  assert result.returncode == 2
  assert "is no checkout of the authors' code" in result.stderr
  assert "github.com/dAI-SY-Group/DropoutInversionAttack" in result.stderr


def test_a_missing_package_is_named(tmp_path):
  """Of a checkout that needs what is not there, as the authors' needs torch."""
  (tmp_path / "src").mkdir()
  (tmp_path / "src" / "attacks.py").write_text("import a_package_that_is_not_there\n")
  result = _run("versus_reference", f"--reference={tmp_path}")
  assert result.returncode == 2
  assert "pip install torch munch einops pyyaml" in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
