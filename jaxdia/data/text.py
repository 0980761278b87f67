"""Sequences of tokens to attack: paragraphs of real text, cut to one length."""

import importlib
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxdia.core.errors import InputError, check_count, first_line, unknown
from jaxdia.core.files import read_regular

# What ships text: the reference of the Python language, in its standard library.
_PACKAGED = {"python": "pydoc_data.topics"}


class Sequences(NamedTuple):
  """Sequences of tokens.

  Attributes:
    tokens: i32[N, T].
    tokenizer: of the package tokenizers; `decode(ids)` gives the text.
    vocabulary: number of tokens there are.
    available: sequences that the source has.
  """

  tokens: Integer[np.ndarray, "sequences tokens"]
  tokenizer: Any
  vocabulary: int
  available: int

  def text(self, tokens: Integer[np.ndarray, " tokens"]) -> str:
    """Returns the text of a sequence; "_" where a token is less than 0.

    Args:
      tokens: i[T].
    """
    parts, known = [], []
    for token in [*tokens.tolist(), -1]:
      if token >= 0:
        known.append(token)
        continue
      parts.append(self.tokenizer.decode(known) if known else "")
      known = []
    return " _".join(parts)


def load_text(
  source: str,
  count: int,
  length: int,
  offset: int = 0,
  *,
  vocabulary: int = 4096,
  tokenizer: str | None = None,
) -> Sequences:
  """Loads the beginnings of paragraphs of a text as sequences of tokens.

  Args:
    source: "text:PATH" (a file of UTF-8; paragraphs are separated by empty lines) or
      "text:python" (the reference of the Python language, as Python ships it; no network). A
      paragraph of fewer tokens than a sequence has is left out.
    count: how many sequences.
    length: tokens of each.
    offset: index of the first, in an order that is drawn once and for all.
    vocabulary: of the tokenizer, byte-pair encoding of bytes trained on the source.
    tokenizer: path of a tokenizer.json to use in its place.

  Raises:
    InputError: the source or the tokenizer cannot be read, or has too little text.
  """
  for what, value, least in (("count", count, 1), ("offset", offset, 0), ("length", length, 2)):
    check_count(f"data.{what}", value, least)
  paragraphs = _paragraphs(source)
  encoder = _tokenizer(paragraphs, check_count("data.vocabulary", vocabulary, 257), tokenizer)
  encoded = [one.ids[:length] for one in encoder.encode_batch(paragraphs)]
  whole = np.array([ids for ids in encoded if len(ids) == length], np.int32).reshape(-1, length)
  whole = np.unique(whole, axis=0)
  whole = whole[np.random.default_rng(0).permutation(len(whole))]
  if len(whole) < offset + count:
    raise InputError(
      f"{source} has {len(whole)} paragraphs of at least {length} tokens;"
      f" data.count={count} from data.offset={offset} needs {offset + count}. Lower count, offset"
      " or length."
    )
  chosen = whole[offset : offset + count]
  return Sequences(chosen, encoder, encoder.get_vocab_size(), len(whole))


def _paragraphs(source: str) -> list[str]:
  kind, _, name = source.partition(":")
  if kind != "text" or not name:
    raise unknown("source of text:", source, ["text:PATH", *(f"text:{n}" for n in _PACKAGED)])
  if name in _PACKAGED:
    texts = list(importlib.import_module(_PACKAGED[name]).topics.values())
  else:
    try:
      content = read_regular(pathlib.Path(name)).decode()
      texts = [content.replace("\r\n", "\n").replace("\r", "\n")]
    except (OSError, ValueError) as error:  # also of a name that no file can have
      raise InputError(
        f"{source} cannot be read ({first_line(error)}); expected a text file of UTF-8."
      ) from error
  paragraphs = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
  return [p for p in paragraphs if p]


def _tokenizer(paragraphs: list[str], vocabulary: int, path: str | None) -> Any:
  try:
    import tokenizers  # an extra
  except ImportError as error:
    raise InputError(
      f'text needs the package tokenizers ({first_line(error)}). Run pip install "jaxdia[text]".'
    ) from error
  if path is not None:
    try:
      encoder = tokenizers.Tokenizer.from_buffer(read_regular(pathlib.Path(path)))
    except Exception as error:  # the library raises nothing narrower
      raise InputError(
        f"data.tokenizer={path} cannot be read ({first_line(error)}); expected a tokenizer.json."
      ) from error
    encoder.no_padding()
    encoder.no_truncation()
    return encoder
  encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
  encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  encoder.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocabulary,
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  encoder.train_from_iterator(paragraphs, trainer)
  return encoder
