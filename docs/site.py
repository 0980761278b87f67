"""Hooks of the site: pages that lie outside `docs/`, and the reference of the package.

A link that leads out of `docs/` is one to the repository, where these pages are read too. Here it
is turned to the page that the site has of that file.
"""

import ast
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / "jaxdia"
_REPOSITORY_PAGES = {
  "README.md": "index.md",
  "ARCHITECTURE.md": "architecture.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
}
_TITLES = {
  "architecture.md": "How it is laid out",
  "contributing.md": "How to add to it",
  "changelog.md": "What changed",
}


def _rooms() -> list[str]:
  # The configs, to which a link leads, are files to be read as they are.
  names = [p.name.removesuffix(".py") for p in _PACKAGE.iterdir() if not p.is_symlink()]
  return sorted(name for name in names if re.fullmatch(r"[a-z]\w*", name))


def _exports(init: pathlib.Path) -> list[str]:
  """Returns the names in `__all__` of a package."""
  for node in ast.parse(init.read_text()).body if init.exists() else []:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
      return ast.literal_eval(node.value)
  return []


def _reference(room: str) -> str:
  """Returns the page of a room: what its door exports, then what else its modules have."""
  folder = _PACKAGE / room
  exports = _exports(folder / "__init__.py")
  rest = ["!^_", *(f"!^{name}$" for name in exports)]
  lines = [f"# {room}", ""]
  for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    door = parts[-1] == "__init__"
    if door:
      parts = parts[:-1]
    if any(part.startswith("_") for part in parts):
      continue
    lines += [f"::: {'.'.join(parts)}", ""]
    if not door:
      lines[-1:] = ["    options:", f"      filters: {rest}", ""]
  return "\n".join(lines)


def _link(target: str, page: str) -> str:
  """Returns where a link of a page leads on the site, given where it leads in the repository."""
  if re.match(r"\w+:|#|/", target):
    return target
  path, _, anchor = target.partition("#")
  to_root = "../" * page.count("/")
  here = "" if page in _REPOSITORY_PAGES.values() else f"docs/{page}"
  absolute = (_ROOT / here).parent / path if here else _ROOT / path
  inside = absolute.resolve().relative_to(_ROOT).as_posix()
  anchor = f"#{anchor}" if anchor else ""
  if inside.startswith("docs/"):
    return to_root + inside.removeprefix("docs/") + anchor
  if inside in _REPOSITORY_PAGES:
    return to_root + _REPOSITORY_PAGES[inside] + anchor
  if inside.startswith("jaxdia/"):
    return f"{to_root}reference/{inside.split('/')[1].removesuffix('.py')}.md"
  # Configs, benchmarks and the licence are files of the repository, without a page.
  return ""


def on_config(config: Any) -> Any:
  """Adds the pages that `mkdocs.yml` cannot know to the navigation."""
  config.nav.append({"Reference": [{room: f"reference/{room}.md"} for room in _rooms()]})
  config.nav.append({"The project": [{title: page} for page, title in _TITLES.items()]})
  return config


def on_files(files: Files, config: Any) -> Files:
  """Adds these pages."""
  for source, page in _REPOSITORY_PAGES.items():
    files.append(File.generated(config, page, content=(_ROOT / source).read_text()))
  for room in _rooms():
    files.append(File.generated(config, f"reference/{room}.md", content=_reference(room)))
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
  """Turns the links of a page, but for those in the reference."""
  name = page.file.src_uri
  if name.startswith("reference/"):
    return markdown

  def turn(match: re.Match[str]) -> str:
    target = _link(match[2], name)
    return f"[{match[1]}]({target})" if target else match[1]

  return re.sub(r"\[((?:[^\[\]]|`[^`]*`)*)\]\(([^)\s]+)\)", turn, markdown)
