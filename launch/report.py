"""Writes one page about finished results: report.html in their folder.

All there is to say is in `jaxdia/commands/report.py`, which `python -m jaxdia report` runs too.
"""

from jaxdia.commands import report

if __name__ == "__main__":
  report.run()
