"""Says what a server could see in an update that a client sent.

All there is to say is in `jaxdia/commands/audit.py`, which `python -m jaxdia audit` runs too.
"""

from jaxdia.commands import audit

if __name__ == "__main__":
  audit.run()
