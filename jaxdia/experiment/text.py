"""Experiments with text: clients that train a language model, attacks, scores."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import msgspec
import numpy as np
from ml_collections import config_dict

from jaxdia import attacks, engine
from jaxdia.client import Observation, defences
from jaxdia.client.tokens import TokenSecret, observe_tokens
from jaxdia.closed_form import tokens as closed_form
from jaxdia.core.errors import InputError
from jaxdia.core.files import write_json, write_json_lines
from jaxdia.core.trees import digest, leaves_by_path, with_leaves
from jaxdia.data.text import load_text
from jaxdia.evaluation.text import assign_tokens, score_tokens
from jaxdia.experiment.clients import KEPT, Lazy
from jaxdia.experiment.fields import check_batches, check_names, plain, pop_group, split_names
from jaxdia.experiment.lock import Lock
from jaxdia.experiment.manifest import manifest
from jaxdia.experiment.schema import decode
from jaxdia.models.tokens import create_language_model

# What each attack is, for people.
ATTACKS = {
  "tokens": "reads tokens, masks and sentences by linear algebra",
  "dager": "the span check for evaluation mode: the nearest tokens, in no order",
  "dia": "searches embeddings and all masks together, and takes the nearest tokens",
  "ig": "searches embeddings as if there was no dropout",
}
_SEARCHES = ("dia", "ig")


class SequenceRow(msgspec.Struct, frozen=True, kw_only=True):
  """One sequence under one attack, a line of results.jsonl.

  Attributes:
    sequence: its number.
    client: that has it.
    attack: a key of `ATTACKS`.
    text: of the original.
    found: text of the reconstruction; "_" for a token that was not found.
    verdict: of the closed form, without the truth; None of a search.
    reason: likewise.
    scores: see `jaxdia.evaluation.text.score_tokens`.
    seconds: that the attack took for the batch.
  """

  sequence: int
  client: int
  attack: str
  text: str
  found: str
  verdict: str | None
  reason: str | None
  scores: dict[str, float]
  seconds: float


def default_config() -> ml_collections.ConfigDict:
  """Returns the config of an experiment with text."""
  config = ml_collections.ConfigDict()
  config.data = ml_collections.ConfigDict({
    "source": "text:python", "count": 16, "offset": 0, "batch_size": 4, "length": 32,
    "vocabulary": 4096, "tokenizer": config_dict.placeholder(str),
  })  # fmt: skip
  config.model = ml_collections.ConfigDict({
    "name": "bert", "dropout_rate": 0.1, "num_classes": config_dict.placeholder(int),
    "width": 256, "depth": 2, "num_heads": 4, "mlp_size": 1024, "tied": False,
  })  # fmt: skip
  config.defence = ml_collections.ConfigDict({"name": "none"})
  config.attack = ml_collections.ConfigDict({"name": "tokens,dager", "max_iterations": 2_000})
  config.frozen_embedding = True
  config.seed = 0
  return config


def run_text(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
  """Attacks sequences of text as a config says.

  In the work directory are afterwards `config.json`, `manifest.json`, `results.jsonl` (a line a
  sequence and attack, see `SequenceRow`) and `summary.json`. The same call goes on where it was
  interrupted, with the client that it was at.

  Args:
    config: of `default_config`.
    workdir: made if needed.
    say: called with what a person should read.

  Returns:
    What summary.json holds: by attack the means of all scores, and how often each verdict.

  Raises:
    InputError: something about the config; nothing has been written then.
  """
  settings, workdir = _validate(config), pathlib.Path(workdir)
  clients = _Clients(settings)
  identity = {"config": settings, "digest": clients.digest}
  rows = _finished(workdir, identity)
  lock = Lock(workdir)
  lock.acquire()
  try:
    if not rows:
      write_json(workdir / "config.json", identity)
      write_json(workdir / "manifest.json", manifest())
    for attack in settings["attack"]["names"]:
      done = {row.client for row in rows if row.attack == attack}
      for mine in clients.attack(attack, done, workdir / "checkpoint" / f"{attack}.npz"):
        rows += mine
        write_json_lines(workdir / "results.jsonl", map(msgspec.to_builtins, rows))
        say(_line(mine, len(done) + 1, clients.count))
        done.add(mine[0].client)
    summary = summarize(rows)
    write_json(workdir / "summary.json", summary)
  finally:
    lock.release()
  return summary


def _line(rows: list[SequenceRow], number: int, count: int) -> str:
  """Returns what is said of a client that was attacked."""
  right = np.mean([row.scores["token_accuracy"] for row in rows])
  exact = int(sum(row.scores["exact"] for row in rows))
  verdict = f", verdict {rows[0].verdict}" if rows[0].verdict else ""
  return (
    f"{rows[0].attack}, client {number} of {count}: {right:.1%} of tokens, {exact} of {len(rows)}"
    f" sequences, {rows[0].seconds:.1f} s{verdict}"
  )


def summarize(rows: list[SequenceRow]) -> dict[str, dict[str, Any]]:
  """Returns by attack the means of all scores, the median seconds, and counts of verdicts.

  Args:
    rows: of any attacks.
  """
  result: dict[str, dict[str, Any]] = {}
  for attack in dict.fromkeys(row.attack for row in rows):
    mine = [row for row in rows if row.attack == attack]
    verdicts = [row.verdict for row in mine if row.verdict]
    result[attack] = {
      "sequences": len(mine),
      **{name: float(np.mean([r.scores[name] for r in mine])) for name in mine[0].scores},
      "seconds": float(np.median([r.seconds for r in mine])),
      "verdicts": {v: verdicts.count(v) for v in dict.fromkeys(verdicts)},
    }
  return result


class _Clients:
  """The clients of an experiment with text."""

  def __init__(self, settings: dict[str, Any]):
    data, model = settings["data"], dict(settings["model"])
    size = data["batch_size"]
    self.settings = settings
    self.sequences = load_text(
      data["source"], data["count"], data["length"], data["offset"],
      vocabulary=data["vocabulary"], tokenizer=data["tokenizer"],
    )  # fmt: skip
    self.count = data["count"] // size
    name, classes = model.pop("name"), model.pop("num_classes")
    self.num_classes = classes
    self.model = create_language_model(
      name, self.sequences.vocabulary, data["length"], num_classes=classes, **model
    )
    if any(a in _SEARCHES for a in settings["attack"]["names"]) and classes is None:
      raise InputError(
        "config.attack.name has a search of embeddings, but config.model.num_classes is not set:"
        " the labels of a network that predicts the next token are the tokens themselves, which"
        " nobody tells. Set config.model.num_classes=2, or leave the search out."
      )
    key = jax.random.key(settings["seed"])
    self.params = self.model.init(jax.random.fold_in(key, 0))
    self._key = jax.random.fold_in(key, 1)
    self._defence = defences.create(**settings["defence"])
    self._pairs = Lazy(self.count, self._observe, KEPT)
    self.digest = digest({"tokens": self.sequences.tokens})

  def _observe(self, client: int) -> tuple[Observation, TokenSecret]:
    size = self.settings["data"]["batch_size"]
    tokens = self.sequences.tokens[client * size : (client + 1) * size]
    # What classes mean has no part in an attack.
    labels = None if self.num_classes is None else np.arange(size) % self.num_classes
    return observe_tokens(
      jax.random.fold_in(self._key, client), self.model, self.params, tokens, labels,
      frozen_embedding=self.settings["frozen_embedding"], defence=self._defence,
    )  # fmt: skip

  def attack(
    self, name: str, done: Container[int], checkpoint: pathlib.Path
  ) -> Iterator[list[SequenceRow]]:
    """Attacks all clients that are not done; yields the rows of each as it ends."""
    left = [client for client in range(self.count) if client not in done]
    if name in _SEARCHES:
      yield from self._search(name, left, checkpoint)
      return
    for client in left:
      start = time.monotonic()
      reading = closed_form.read(self.model, self._pairs[client][0], dropout=name == "tokens")
      verdict = (reading.verdict, reading.reason) if name == "tokens" else (None, None)
      yield self._rows(client, name, reading.tokens, time.monotonic() - start, *verdict)

  def _search(
    self, name: str, left: list[int], checkpoint: pathlib.Path
  ) -> Iterator[list[SequenceRow]]:
    if not left:
      return
    iterations = self.settings["attack"]["max_iterations"]
    # Neighbouring tokens are not alike as neighbouring pixels are.
    attack = attacks.create(name, self.model.model, tv_weight=0.0, max_iterations=iterations)
    task = engine.Task(
      jax.random.fold_in(jax.random.key(self.settings["seed"]), 2),
      attack,
      Lazy(self.count, lambda client: self._without_table(self._pairs[client][0])),
      finished=[(client, 0) for client in range(self.count) if client not in left],
    )
    for trial in engine.run(task, checkpoint_path=checkpoint):
      found = self.model.nearest(self.params, jnp.asarray(trial.candidate.images))
      yield self._rows(trial.job.observation, name, np.asarray(found), trial.seconds)

  def _rows(
    self,
    client: int,
    attack: str,
    found: np.ndarray,
    seconds: float,
    verdict: str | None = None,
    reason: str | None = None,
  ) -> list[SequenceRow]:
    originals, text = np.asarray(self._pairs[client][1].tokens), self.sequences.text
    found = found[assign_tokens(found, originals)]
    scores = score_tokens(found, originals, text)
    return [
      SequenceRow(
        sequence=client * len(found) + i, client=client, attack=attack, text=text(originals[i]),
        found=text(found[i]), verdict=verdict, reason=reason, scores=scores[i], seconds=seconds,
      )
      for i in range(len(found))
    ]  # fmt: skip

  def _without_table(self, observation: Observation) -> Observation:
    """Leaves out the gradient of the embedding, which the searched embeddings do not pass."""
    if self.settings["frozen_embedding"]:
      return observation
    leaves = leaves_by_path(observation.gradient) | {self.model.network.table: None}
    return dataclasses.replace(observation, gradient=with_leaves(observation.params, leaves))


def _validate(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the settings as plain values, with the names of the attacks taken apart."""
  given, known = plain(config.to_dict()), plain(default_config().to_dict())
  check_names("config", given, known)
  for group, fields in known.items():
    if isinstance(fields, dict):
      named = pop_group(dict(given), group)
      if group != "defence":  # whose fields are those of its class
        check_names(f"config.{group}", named, fields)
  data, attack = given["data"], given["attack"]
  check_batches(data["count"], data["batch_size"], "sequences")
  names = split_names("attack on text:", str(attack["name"]), ATTACKS)
  given["attack"] = {"names": names, "max_iterations": attack["max_iterations"]}
  return given


def _finished(workdir: pathlib.Path, identity: dict[str, Any]) -> list[SequenceRow]:
  """Returns the rows of an earlier call of the same settings, of whole batches."""
  try:
    before = json.loads((workdir / "config.json").read_text())
  except (OSError, ValueError, RecursionError):
    return []
  if before != json.loads(json.dumps(identity)):
    raise InputError(
      f"{workdir} holds an experiment with other settings or other text. Choose another --workdir,"
      " or remove it."
    )
  return read_rows(workdir)


def read_rows(workdir: pathlib.Path) -> list[SequenceRow]:
  """Returns the rows of results.jsonl; none if there is no such file.

  Args:
    workdir: of `run_text`.

  Raises:
    InputError: it is damaged.
  """
  try:
    lines = (workdir / "results.jsonl").read_bytes().splitlines()
    return [decode(line, SequenceRow) for line in lines]
  except FileNotFoundError:
    return []
  except (OSError, msgspec.DecodeError) as error:
    raise InputError(f"{workdir}/results.jsonl is damaged ({error}). Remove it.") from error
