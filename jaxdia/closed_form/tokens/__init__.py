"""What the gradient of a language model gives away without any search."""

from jaxdia.closed_form.tokens.reading import NO_TOKEN, Reading, read

__all__ = ["NO_TOKEN", "Reading", "read"]
