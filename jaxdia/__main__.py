"""Runs a command without the repository: python -m jaxdia attack --config=quickstart."""

import importlib
import sys

from jaxdia.command_line import config_names
from jaxdia.commands import COMMANDS
from jaxdia.core.errors import unknown


def main() -> None:
  """Runs the command that is named first, with the flags behind it."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("--help", "-h", "help"):
    print("usage: python -m jaxdia COMMAND [--flags]\n")
    for command, what in COMMANDS.items():
      print(f"  {command:10}{what}")
    print(
      "\nFlags of one: python -m jaxdia COMMAND --help. Configs that are shipped, for --config:\n"
    )
    print(f"  {', '.join(config_names())}")
    return
  if name not in COMMANDS:
    error = unknown("command", name, COMMANDS)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  # What messages and the manifest call the program.
  sys.argv = [f"python -m jaxdia {name}", *sys.argv[2:]]
  importlib.import_module(f"jaxdia.commands.{name}").run()


if __name__ == "__main__":
  main()
