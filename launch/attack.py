"""Attacks client gradients as a config says, and writes what was reconstructed.

All there is to say is in `jaxdia/commands/attack.py`, which `python -m jaxdia attack` runs too.
"""

from jaxdia.commands import attack

if __name__ == "__main__":
  attack.run()
