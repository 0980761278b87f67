"""The notebooks run from the first cell to the last, and show what they say."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def _printed(notebook):
  return "".join(
    output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
  )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  # Outputs are not kept: they are made by running it.
  assert not any(cell.get("outputs") for cell in notebook.cells)
  resources = {"metadata": {"path": str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
  printed = _printed(notebook)
  assert any("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
  if path.stem == "first_gradient":
    assert "dia " in printed and "MSE" in printed
    assert float(printed.split()[-1]) < 1e-8
  else:
    assert printed.count("certain label") == 4
