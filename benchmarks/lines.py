"""Counts the lines of code of each room at some commits: no docstrings, comments or blank lines.

python benchmarks/lines.py 27f77b3 18010dd
"""

import ast
import collections
import io
import subprocess
import sys
import tokenize

_SILENT = {
  *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT),
  *(tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER),
}


def count(text: str) -> int:
  """Returns the number of lines of a file that hold code."""
  lines: set[int] = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type not in _SILENT:
      lines |= set(range(token.start[0], token.end[0] + 1))
  for node in ast.walk(ast.parse(text)):
    named = (ast.Module, ast.ClassDef, ast.FunctionDef)
    if isinstance(node, named) and ast.get_docstring(node) is not None:
      lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
  return len(lines)


def count_commit(commit: str) -> collections.Counter[str]:
  """Returns the lines of each room of the package at a commit."""

  def git(*command):
    return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout

  found: collections.Counter[str] = collections.Counter()
  for path in git("ls-tree", "-r", "--name-only", commit, "jaxdia").splitlines():
    if path.endswith(".py"):
      found[path.split("/")[1]] += count(git("show", f"{commit}:{path}"))
  return found


if __name__ == "__main__":
  commits = sys.argv[1:] or ["HEAD"]
  counts = [count_commit(commit) for commit in commits]
  for room in sorted(set().union(*counts)):
    print(f"{room:20}", *(f"{found[room]:7,}" for found in counts))
  print(f"{'all':20}", *(f"{found.total():7,}" for found in counts))
