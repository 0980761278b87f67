"""Attacks the gradients of clients that train a language model, and writes what was read.

All there is to say is in `jaxdia/commands/text.py`, which `python -m jaxdia text` runs too.
"""

from jaxdia.commands import text

if __name__ == "__main__":
  text.run()
