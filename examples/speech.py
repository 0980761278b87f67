"""What the gradient of a client says of speech, and of who spoke, behind dropout.

Nine speakers say two Japanese vowels (Kudo, Toyama and Shimbo 1999; the package aeon ships them):
12 cepstral coefficients a frame, of which the first 12 frames are taken. A network with dropout
tells the speakers apart. Scored is whether a speaker is identified by what was reconstructed: the
nearest of the utterances that train a recogniser is one of that speaker's.

  pip install -e ".[examples]"
  python examples/speech.py --batch_size=8 --dropout_rate=0.2
"""

import jax
import numpy as np
from absl import app, flags
from aeon.datasets import load_japanese_vowels
from flax import linen as nn
from scipy.optimize import linear_sum_assignment

from jaxdia import attacks, data, models
from jaxdia.client import observe

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Utterances of a client.")
_CLIENTS = flags.DEFINE_integer("clients", 4, "Clients that are attacked.")
_RATE = flags.DEFINE_float("dropout_rate", 0.2, "Of all dropout sites.")
_ATTACKS = flags.DEFINE_list("attacks", ["closed_form", "dia", "ig"], "Attacks, by name.")
_ITERATIONS = flags.DEFINE_integer("max_iterations", 2_000, "Of the searches.")

FRAMES, SPEAKERS = 12, 9


class Net(nn.Module):
  """A network over frames that are put side by side, as speech recognisers have it."""

  @nn.compact
  def __call__(self, frames: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, speakers] logits of f[B, frames, features]."""
    x = frames.reshape(len(frames), -1)
    for _ in range(3):
      x = nn.gelu(nn.Dense(512, use_bias=False)(x))
      x = nn.Dropout(_RATE.value)(x, deterministic=not train)
    return nn.Dense(SPEAKERS)(x)


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns utterances f[N, frames, 12] and speakers i[N] of those that are long enough."""
  utterances, speakers = load_japanese_vowels(split=split)
  kept = [i for i, one in enumerate(utterances) if one.shape[1] >= FRAMES]
  order = np.random.default_rng(0).permutation(kept)
  frames = np.stack([np.asarray(utterances[i]).T[:FRAMES] for i in order])
  return frames, np.asarray(speakers, int)[order] - 1


def identify(utterances: np.ndarray, known: np.ndarray, speakers: np.ndarray) -> np.ndarray:
  """Returns the speakers of the nearest known utterances, i[B]."""
  flat = known.reshape(len(known), -1)
  apart = ((utterances.reshape(len(utterances), 1, -1) - flat) ** 2).sum(axis=-1)
  return speakers[apart.argmin(axis=1)]


def main(argv: list[str]) -> None:
  """Attacks the clients, and prints how many speakers are identified."""
  del argv
  known, known_speakers = load("train")
  values, speakers = load("test")
  rows, statistics = data.normalize_features(values)
  size = _BATCH_SIZE.value
  count = size * _CLIENTS.value
  model = models.from_flax(Net(), (FRAMES, values.shape[-1]))
  params = model.init(jax.random.key(0))
  of_speech = identify(values[:count], known, known_speakers) == speakers[:count]
  print(f"of the speech itself {of_speech.mean():.1%} of speakers are identified")
  for name in _ATTACKS.value:
    options = {} if name == "closed_form" else {"max_iterations": _ITERATIONS.value}
    attack = attacks.create(name, model, tv_weight=0.0, **options)
    right, errors = 0, []
    for client in range(_CLIENTS.value):
      mine = slice(client * size, (client + 1) * size)
      key = jax.random.key(client)
      observation, _ = observe(
        key, model, params, rows[mine], speakers[mine], statistics=statistics
      )
      state = attacks.solve(key, attack, observation)
      images = np.asarray(state.best.candidate.images)
      cost = ((images[:, None] - rows[None, mine]) ** 2).mean(axis=(2, 3, 4))
      order = linear_sum_assignment(cost.T)[1]
      errors += [float(cost[j, i]) for i, j in enumerate(order)]
      found = data.denormalize_features(images[order], values)
      right += int((identify(found, known, known_speakers) == speakers[mine]).sum())
    print(
      f"{name}: {right / count:.1%} of speakers identified, median MSE {np.median(errors):.1e} of"
      " normalised features",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
