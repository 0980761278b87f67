"""Sequences of 32 tokens of English text, behind a language model in training mode.

python launch/text.py --config=configs/text.py
python launch/text.py --config=configs/text.py:gpt --config.data.source=text:FILE
"""

import ml_collections

from jaxdia.experiment.text import default_config


def get_config(name: str = "bert") -> ml_collections.ConfigDict:
  """Returns the config: "bert", an encoder of sequences of two classes, or "gpt"."""
  config = default_config()
  config.model.name = name
  # Without classes the next token is predicted at each position, as GPT does.
  config.model.num_classes = 2 if name == "bert" else None
  # Searches, "dia" and "ig", need classes: config.attack.name = "tokens,dager,dia".
  config.attack.name = "tokens,dager"
  return config
