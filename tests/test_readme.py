"""The README's Python runs as it stands, and its links lead somewhere."""

import pathlib
import re

from jaxdia import study

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys):
  blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert len(blocks) == 4
  namespace = {}
  for block in blocks:
    exec(compile(block, "README.md", "exec"), namespace)
  assert capsys.readouterr().out.count("Job(victim=") == 4
  assert namespace["objectives"].shape == (8, 100)
  assert (namespace["objectives"][:, -1] < namespace["objectives"][:, 0]).all()
  assert namespace["logits"].shape == (4, 10)
  assert [cell.name for cell in study.plan(namespace["get_config"]())] == [
    "000_hidden_sizes=64",
    "001_hidden_sizes=512",
  ]


def test_links_lead_somewhere():
  links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
  assert links
  for link in links:
    assert (ROOT / link).exists(), link


def test_config_fields_that_it_names_exist():
  from jaxdia.experiment.config import default_config

  config = default_config()
  for group, field in re.findall(r"config\.(?:base\.)?(data|attack|engine|model)\.(\w+)", README):
    assert field in config[group], f"{group}.{field}"
