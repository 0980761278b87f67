"""Experiments with text: real text in, results and a page out, killed and resumed."""

import json
import re

import numpy as np
import pytest

from jaxdia.core.errors import InputError
from jaxdia.data.text import load_text
from jaxdia.experiment import text as experiment
from jaxdia.experiment.text import default_config, read_rows, run_text, summarize
from jaxdia.report.text import write_text_report

HOSTILE = "<script>alert(1)</script> & friends of the 'house' say that <b>all</b> is \"well\" today"


def _file(tmp_path, name="words.txt"):
  rng = np.random.default_rng(0)
  words = [f"word{i}" for i in range(60)]
  paragraphs = [HOSTILE, *(" ".join(rng.choice(words, 12)) for _ in range(40)), "short"]
  path = tmp_path / name
  path.write_text("\n\n".join(paragraphs), encoding="utf-8")
  return path


def _config(tmp_path, **overrides):
  config = default_config()
  config.update_from_flattened_dict({
    "data.source": f"text:{_file(tmp_path)}", "data.count": 4, "data.batch_size": 2,
    "data.length": 8, "data.vocabulary": 300, "model.num_classes": 2, "model.width": 96,
    "model.mlp_size": 64, "attack.name": "tokens,dager,dia", "attack.max_iterations": 3,
    **overrides,
  })  # fmt: skip
  return config


def test_paragraphs_become_sequences_of_one_length(tmp_path):
  source = f"text:{_file(tmp_path, 'Wörter und mehr.txt')}"
  sequences = load_text(source, 5, 8, vocabulary=300)
  assert sequences.tokens.shape == (5, 8) and sequences.tokens.dtype == np.int32
  assert sequences.tokens.max() < sequences.vocabulary <= 300
  assert sequences.available == 41
  more = load_text(source, 3, 8, 2, vocabulary=300)
  np.testing.assert_array_equal(more.tokens, sequences.tokens[2:])
  everything = load_text(source, 41, 8, vocabulary=300)
  texts = [sequences.text(row) for row in everything.tokens]
  assert any(HOSTILE.startswith(text) for text in texts)
  unknown = everything.tokens[0].copy()
  unknown[1] = -1
  assert "_" in sequences.text(unknown)


def test_text_of_python_is_there_without_a_network():
  sequences = load_text("text:python", 2, 32)
  assert re.search(r"[a-z]{3}", sequences.text(sequences.tokens[0]))


def test_a_tokenizer_of_ones_own_is_taken(tmp_path):
  source = f"text:{_file(tmp_path)}"
  sequences = load_text(source, 2, 8, vocabulary=300)
  sequences.tokenizer.save(str(tmp_path / "tokenizer.json"))
  same = load_text(source, 2, 8, vocabulary=999, tokenizer=str(tmp_path / "tokenizer.json"))
  np.testing.assert_array_equal(same.tokens, sequences.tokens)
  (tmp_path / "none.json").write_text("{")
  with pytest.raises(InputError, match="tokenizer.json"):
    load_text(source, 2, 8, tokenizer=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("text:none.txt", "cannot be read"),
    ("folder:x", "Unknown source of text"),
    ("text:binary", "cannot be read"),
    ("text:short", "has 0 paragraphs"),
  ],
)
def test_sources_that_cannot_be_used_are_refused(tmp_path, monkeypatch, source, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xff")
  (tmp_path / "short").write_text("a b")
  with pytest.raises(InputError, match=message):
    load_text(source, 2, 8)


def test_an_experiment_from_a_file_to_a_page(tmp_path):
  said = []
  summary = run_text(_config(tmp_path), tmp_path / "run", say=said.append)
  assert list(summary) == ["tokens", "dager", "dia"]
  assert summary["tokens"]["verdicts"] == {"exact": 4}
  assert summary["tokens"]["token_accuracy"] == summary["tokens"]["exact"] == 1
  assert summary["dia"]["token_accuracy"] < 1 and summary["dia"]["verdicts"] == {}
  assert len(said) == 6 and "client 2 of 2" in said[1]
  rows = read_rows(tmp_path / "run")
  assert len(rows) == 12 and {row.attack for row in rows} == set(summary)
  assert summarize(rows) == summary
  assert all(row.found == row.text for row in rows if row.attack == "tokens")
  page = write_text_report(tmp_path / "run").read_text()
  assert "could read 100.0% of the tokens" in page and "4 of 4 sequences word for word" in page
  assert "<script" not in page


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
  config = _config(tmp_path)
  whole = run_text(config, tmp_path / "whole", say=lambda text: None)
  said = []

  def stop_after_two(text):
    said.append(text)
    if len(said) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run_text(config, tmp_path / "run", say=stop_after_two)
  assert {row.attack for row in read_rows(tmp_path / "run")} == {"tokens"}
  monkeypatch.setattr(
    experiment.closed_form, "read", _only_without_dropout(experiment.closed_form.read)
  )
  result = run_text(config, tmp_path / "run", say=said.append)
  assert len(said) == 6
  for attack in whole:
    same = {k: v for k, v in whole[attack].items() if k != "seconds"}
    assert {k: v for k, v in result[attack].items() if k != "seconds"} == same
  with pytest.raises(InputError, match="other settings"):
    run_text(_config(tmp_path, seed=1), tmp_path / "run")


def _only_without_dropout(read):
  def checked(model, observation, *, dropout):
    assert not dropout  # the batches that had been read are not read again
    return read(model, observation, dropout=dropout)

  return checked


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"attack.name": "tokens,dlg"}, "Unknown attack on text: 'dlg'"),
    ({"data.batch_size": 3}, "cannot be cut into batches"),
    ({"model.num_classes": None, "model.name": "gpt"}, "search of embeddings"),
    ({"data.count": 400, "data.batch_size": 4}, "has 41 paragraphs"),
    ({"model.name": "t5"}, "Unknown language model"),
  ],
)
def test_configs_that_cannot_be_are_refused_and_nothing_is_written(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message):
    run_text(_config(tmp_path, **overrides), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_damaged_results_and_folders_without_any_are_refused(tmp_path):
  with pytest.raises(InputError, match="no finished experiment"):
    write_text_report(tmp_path)
  config = _config(tmp_path, **{"attack.name": "dager"})
  run_text(config, tmp_path / "run", say=lambda text: None)
  json.loads((tmp_path / "run" / "summary.json").read_text())
  (tmp_path / "run" / "results.jsonl").write_text("{")
  with pytest.raises(InputError, match="is damaged"):
    run_text(config, tmp_path / "run")


def test_paragraphs_are_the_same_whatever_ends_a_line(tmp_path):
  path = _file(tmp_path)
  unix = load_text(f"text:{path}", 5, 8, vocabulary=300)
  path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
  windows = load_text(f"text:{path}", 5, 8, vocabulary=300)
  np.testing.assert_array_equal(unix.tokens, windows.tokens)


def test_a_device_in_place_of_a_text_or_a_tokenizer_is_refused(tmp_path):
  """It would be read for ever."""
  with pytest.raises(InputError, match="no regular file"):
    load_text("text:/dev/zero", 1, 8)
  with pytest.raises(InputError, match="no regular file"):
    load_text(f"text:{_file(tmp_path)}", 1, 8, tokenizer="/dev/zero")
