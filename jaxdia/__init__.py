"""jaxdia: gradient inversion under dropout, as a jitted and vmapped optimisation."""

__version__ = "0.1.0"
