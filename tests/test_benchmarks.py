"""The benchmarks run, and say what is missing; what they measure is not judged here."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
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


@pytest.fixture
def robustness(monkeypatch):
  """Makes the parts of robustness.py importable."""
  monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_results_that_differ_are_found_and_times_are_not(robustness, tmp_path):
  from robustness_runs import differences, leftovers, repeated_rows

  def write(name, ssim, seconds, images=(0, 1)):
    folder = tmp_path / name
    (folder / "trials").mkdir(parents=True)
    rows = [{"image": i, "ssim": ssim, "seconds": seconds, "session": seconds} for i in images]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps({"x": [{"run_seconds": seconds, "ssim": ssim}]}))
    (folder / "b.csv").write_text(f"ssim,seconds\n{ssim},{seconds}\n")
    records = np.array([[0, ssim, seconds, seconds]])
    np.savez(folder / "trials" / "0.npz", images=np.array([ssim]), records=records, seconds=seconds)
    return folder

  alone = write("alone", 0.5, 1.0)
  assert differences(alone, write("slow", 0.5, 2.0)) == []
  other = write("other", np.nextafter(0.5, 1), 1.0)
  found = " ".join(differences(alone, other))
  assert all(name in found for name in ("a.json", "b.csv", "results.jsonl", "trials/0.npz"))
  (other / "a.json").unlink()
  (other / ".b.csv.1.tmp").write_text("")
  found = differences(alone, other)
  assert "a.json is missing" in found and ".b.csv.1.tmp should not be there" in found
  assert leftovers(other) == [".b.csv.1.tmp was left"] and leftovers(alone) == []
  assert repeated_rows(alone) == []
  assert len(repeated_rows(write("twice", 0.5, 1.0, images=(0, 1, 1)))) == 1


def test_a_full_disk_refuses_from_a_write_on_and_in_its_folder_alone(robustness, tmp_path):
  from robustness_disk import FullDisk

  here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
  here.mkdir()

  def write(folder):
    with open(folder / "a", "wb") as file:
      file.write(b"12345678")
      file.flush()
      os.fsync(file.fileno())

  counted = FullDisk(here, None)
  with counted():
    write(here)
  assert counted.writes == 3  # made, written, synced
  for first, left in enumerate((None, b"1234", b"12345678")):
    (here / "a").unlink()
    with FullDisk(here, first)(), pytest.raises(OSError, match="No space left"):
      write(here)
    assert (here / "a").exists() == (left is not None)
    assert left is None or (here / "a").read_bytes() == left
    if left is None:
      write(here)
  elsewhere.mkdir()
  with FullDisk(here, 0)():
    write(elsewhere)


@pytest.mark.parametrize(
  "code, said, wrong",
  [
    (2, "dia: half done\nerror: no space", False),
    (1, "error: no space", True),
    (2, "no space", True),
    (2, "error: a\nerror: b", True),
    (2, "Traceback\nerror: a", True),
  ],
)
def test_a_refusal_is_one_line(robustness, code, said, wrong):
  from robustness_disk import refusal_faults

  assert bool(refusal_faults(code, said)) == wrong


def test_malformed_inputs_are_tried_and_judged(robustness, tmp_path):
  from robustness_cases import KINDS, Case
  from robustness_inputs import _try

  made = KINDS["flags"].make(None, tmp_path, np.random.default_rng(0), 0)
  assert made.name == "'--config='" and _try(made, tmp_path, None) == ([], "refused")
  unseen = Case("", "report", ["--help"], tmp_path / "run")  # ends, but refuses nothing
  faults, how = _try(unseen, tmp_path, None)
  assert faults and how != "refused"


def test_an_unknown_part_is_named():
  result = _run("robustness", "--parts=kils")
  assert result.returncode == 2 and "Did you mean 'kills'" in result.stderr
