"""The report: its numbers, what it shows first, and that it needs nothing else."""

import base64
import html.parser
import io
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from report_cases import HOSTILE, METRICS, THRESHOLDS, TIMES, write_experiment, write_study

from jaxdia.core.errors import InputError
from jaxdia.core.files import write_json
from jaxdia.experiment.schema import Row
from jaxdia.report import write_report

ROOT = pathlib.Path(__file__).parent.parent
BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(html.parser.HTMLParser):
  """What the tests look for in a page."""

  def __init__(self, path):
    super().__init__()
    self.source = path.read_text()
    self.tags, self.numbers, self.text = [], {}, ""
    self.feed(self.source)

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    self.tags.append((tag, attributes))
    if "data-value" in attributes:
      key = tuple(attributes[f"data-{k}"] for k in ("cell", "attack", "metric", "statistic"))
      value = json.loads(attributes["data-value"])
      assert self.numbers.setdefault(key, value) == value
      self.shown = key

  def handle_data(self, data):
    self.text += " ".join(data.split()) + " "


def _expected(summary, attack, metric, statistic):
  if statistic == "floor":
    return summary["floors"][attack][metric]
  summary = summary[attack]
  if metric == "images":
    return summary[statistic]
  if metric.endswith("_by_site"):
    return summary[metric][statistic]
  if statistic == "value":
    return summary[metric]
  if statistic == "success_at_0.6":
    return summary["success"][metric]["rate"][THRESHOLDS.index(0.6)]
  statistics = summary["oracle"]["ssim"] if metric == "oracle.ssim" else summary["metrics"][metric]
  if statistic.startswith("ci95_"):
    return statistics["ci95"][statistic == "ci95_high"]
  return statistics[statistic]


def _check_numbers(page, cells):
  """Compares all numbers of a page with the summaries, and that none is missing."""
  for (cell, *key), value in page.numbers.items():
    assert value == _expected(cells[cell], *key), (cell, key)
  counts = itertools.product(("images",), ("attempted", "finished", "failed", "not_applicable"))
  statistics = ("median", "mean", "std", "ci95_low", "ci95_high", "min", "max", "count")
  wanted = [
    *counts, *itertools.product((*METRICS, "oracle.ssim"), statistics), ("ssim", "success_at_0.6"),
    *itertools.product(("iip", "pool", *TIMES, "accuracy", "epsilon"), ("value",)),
    *itertools.product(("mask_accuracy_by_site",), ("dropout_0", "dropout_1")),
  ]  # fmt: skip
  for cell, summary in cells.items():
    for attack in set(summary) - {"floors"}:
      for metric, statistic in wanted:
        assert (cell, attack, metric, statistic) in page.numbers
    for metric, value in summary["floors"]["mean_image"].items():
      assert page.numbers[cell, "mean_image", metric, "floor"] == value


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  folder = tmp_path_factory.mktemp("study")
  write_study(folder, title=HOSTILE, source=HOSTILE)
  return folder


@pytest.fixture(scope="module")
def page(study):
  return Page(write_report(study))


def test_numbers_of_a_study_are_those_of_its_summaries(study, page):
  cells = {
    path.name: json.loads((path / "summary.json").read_text())
    for path in (study / "cells").iterdir()
  }
  assert len(cells) == 3
  _check_numbers(page, cells)


def test_report_of_one_experiment(tmp_path):
  write_experiment(tmp_path / "run")
  path = write_report(tmp_path / "run")
  assert path == tmp_path / "run" / "report.html"
  page = Page(path)
  _check_numbers(page, {"run": json.loads((tmp_path / "run" / "summary.json").read_text())})
  assert "A curious server that knows the labels could see 3 of 5 images: DIA" in page.text
  assert "With DIA, 3 of 5 images" in page.text and "1 of them nearly exactly" in page.text
  assert "Worst-protected image: SSIM 0.95" in page.text
  assert "not told the dropout masks: it had to find them" in page.text
  assert "failed attack does not show that images are safe" in page.text
  assert "python launch/attack.py --config=configs/mlp.py:mnist" in page.text
  assert "ab" * 32 in page.text and "attacks.dia.tv_weight" in page.text
  assert "nearer to its own original" in page.text
  assert {"out of memory", "unfinished"}.isdisjoint(page.text.split())


def test_a_failed_attack_is_not_called_safe(tmp_path):
  write_experiment(tmp_path, ssim=0.2, attacks=("dia",))
  text = Page(write_report(tmp_path)).text
  assert "DIA rebuilt none of 5 images" in text and "That is no proof of safety." in text


def test_an_attack_that_knows_the_masks_is_no_verdict_on_a_server(tmp_path):
  write_experiment(tmp_path, ssim=0.99, attacks=("wiig",))
  text = Page(write_report(tmp_path)).text
  assert "could see" not in text and "Told the client's dropout masks, WIIG rebuilt" in text


def test_images_of_several_masks_have_their_own_score(tmp_path):
  write_experiment(tmp_path, attacks=("dia",), count=4, batch_size=2)
  config = json.loads((tmp_path / "config.json").read_text())
  config["data"] |= {"count": 2, "mask_seeds": 2}
  write_json(tmp_path / "config.json", config)
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  for i, row in enumerate(rows):
    row |= {"image": 3 + i % 2, "mask_seed": i // 2}
  (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  page = Page(write_report(tmp_path))
  shown = [f"SSIM {row['ssim']:.3f}" for row in rows if row["ssim"] is not None]
  alts = [a["alt"] for tag, a in page.tags if tag == "img" and "made of original" in a["alt"]]
  assert [alt.split(", ")[1] for alt in alts] == shown
  assert "under 2 sets of dropout masks" in page.text


def test_failures_come_before_all_numbers(page):
  first_table = page.source.index("<table")
  for text in (
    "1 of 5 settings failed",
    "out of memory",
    "1 of 5 settings are still to be run",
    "later",
  ):
    assert page.source.index(text) < first_table
  assert page.text.index("1 of 5 settings failed") < page.text.index("A curious server")


def test_verdict_comes_before_all_numbers(page):
  assert page.source.index('class="headline"') < page.source.index("<table")
  assert "over 3 settings together" in page.text


def test_hostile_names_are_escaped(page):
  assert HOSTILE in page.text
  assert not re.search("<script", page.source, re.IGNORECASE)
  assert "script" not in {tag for tag, _ in page.tags}


def test_page_loads_nothing(page):
  for tag, attributes in page.tags:
    assert tag not in ("link", "iframe", "object", "embed", "base"), tag
    assert not [name for name in attributes if name.startswith("on")], attributes
    assert "srcset" not in attributes
    assert attributes.get("src", "data:image/").startswith("data:image/")
    assert attributes.get("href", "#").startswith("#")
  assert "url(" not in page.source and "@import" not in page.source


def test_all_pictures_have_a_description(page):
  pictures = [attributes for tag, attributes in page.tags if tag == "img"]
  assert len(pictures) > 3 * 5 * 3 - 6
  assert all(attributes["alt"].strip() for attributes in pictures)


def test_page_has_links_that_lead_somewhere(page):
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
  assert len(ids) == len(set(ids)) and links and links <= set(ids)


def test_animation_shows_the_first_victims_as_they_form(page):
  sources = [a["src"] for tag, a in page.tags if tag == "img" and a.get("class") == "moving"]
  assert len(sources) == 1 and sources[0].startswith("data:image/gif;base64,")
  picture = Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1])))
  assert picture.n_frames == 4 and picture.height > 2 * 100


def test_curves_over_each_swept_setting(tmp_path):
  values = [(rate, size) for rate in (0.25, 0.5, 0.75) for size in (1, 5)]
  write_study(tmp_path, values=values, failed=False, recorded=False)
  page = Page(write_report(tmp_path))
  captions = [a["alt"] for tag, a in page.tags if tag == "img" and " over " in a["alt"]]
  for setting in ("model.dropout_rate", "data.batch_size"):
    assert sum(f"over {setting}." in alt for alt in captions) == 2
  assert any("DIA, data.batch_size=5: median" in alt for alt in captions)
  assert not [a for tag, a in page.tags if tag == "img" and a.get("class") == "moving"]


def test_many_cells_stay_readable_and_small(tmp_path):
  values = [(rate, size) for rate in (0.1, 0.25, 0.5, 0.75) for size in (1, 5, 10, 50)]
  write_study(tmp_path, values=values, failed=False, shape=(48, 48, 3), count=9)
  path = write_report(tmp_path)
  text = Page(path).text
  assert path.stat().st_size < 5e6
  assert "The pictures of 10 more settings are left out" in text
  assert "all 16 settings together" in text and "1 more images are left out" in text


def test_report_without_what_older_results_lack(tmp_path):
  write_experiment(tmp_path, recorded=False)
  (tmp_path / "manifest.json").unlink()
  summary = json.loads((tmp_path / "summary.json").read_text())
  del summary["floors"]
  for attack in summary.values():
    for key in ("success", "pool", "iip", *TIMES, "told"):
      del attack[key]
    for statistics in attack["metrics"].values():
      del statistics["ci95"]
  write_json(tmp_path / "summary.json", summary)
  text = (tmp_path / "results.jsonl").read_text()
  text = text.replace('"image"', '"victim"').replace('"client"', '"batch"')
  (tmp_path / "results.jsonl").write_text(text)
  page = Page(write_report(tmp_path))
  assert "The command was not recorded." in page.text
  assert "what it was told of labels and masks is not recorded" in page.text
  assert page.numbers[tmp_path.name, "dia", "iip", "value"] is None


def test_rounded_numbers_are_those_in_the_attribute(page):
  cells = re.findall(r'data-statistic="(\w+)" data-value="([^"]+)">([^<]+)</td>', page.source)
  assert len(cells) > 100
  for statistic, exact, text in cells:
    if exact != "null":
      shown = float(text.replace(",", "").rstrip("%")) / (100 if text.endswith("%") else 1)
      assert math.isclose(
        shown, float(exact), rel_tol=0.01, abs_tol=6e-4 if statistic != "median" else 1
      )


def _spoil(name, text):
  def spoil(folder):
    (folder / name).write_text(text)

  return spoil


@pytest.mark.parametrize(
  "spoil",
  [
    _spoil("config.json", "{"),
    _spoil("config.json", "[]"),
    _spoil("config.json", '{"data": {}, "model": {}}'),
    _spoil("summary.json", '{"dia": {"attempted": 1}}'),
    _spoil("summary.json", "\x00"),
    _spoil("summary.json", "[" * 10**5),
    _spoil("results.jsonl", '{"attack": "dia", "image": 1}\n{"attack"'),
    _spoil("results.jsonl", '{"attack": "dia", "image": 1, "ssim": "good"}'),
    _spoil("results.jsonl", '{"attack": "dia", "image": 1, "ssim": NaN}'),
    _spoil("results.jsonl", '{"attack": "dia", "image": "first"}'),
    _spoil("reconstructions.npz", "PK"),
    _spoil("recordings.npz", "PK"),
    _spoil("study.json", '{"cells": 3}'),
    lambda folder: (folder / "summary.json").unlink(),
    lambda folder: (folder / "results.jsonl").unlink(),
    lambda folder: (folder / "reconstructions.npz").unlink(),
    lambda folder: np.savez(folder / "reconstructions.npz", originals=np.zeros((5, 4, 4, 1))),
    lambda folder: np.savez(folder / "recordings.npz", iterations=[1], dia=np.zeros((1, 2, 3))),
    lambda folder: shutil.rmtree(folder),
  ],
)
def test_missing_or_damaged_results_are_named(tmp_path, spoil):
  folder = tmp_path / "run"
  write_experiment(folder)
  spoil(folder)
  with pytest.raises(InputError) as error:
    write_report(folder)
  assert str(folder) in str(error.value) and "\n" not in str(error.value)
  assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
  ("name", "old", "new", "named"),
  [
    ("results.jsonl", '"ssim": null', '"ssim": "good"', ("line 2", "ssim", "str")),
    ("results.jsonl", '"label": 1', '"label": 1.5', ("line 1", "label", "float")),
    ("summary.json", '"attempted": 5', '"attempted": true', ("ig", "attempted", "bool")),
    ("summary.json", '"median"', '"middle"', ("ig", "metrics", "median")),
    ("summary.json", "0.1,\n", "", ("ig", "success", "3 thresholds have 4 rates")),
    ("config.json", '"attacks"', '"attacked"', ("attacks",)),
  ],
)
def test_an_error_names_file_line_and_field(tmp_path, name, old, new, named):
  write_experiment(tmp_path)
  text = (tmp_path / name).read_text()
  assert old in text
  (tmp_path / name).write_text(text.replace(old, new, 1))
  with pytest.raises(InputError) as error:
    write_report(tmp_path)
  for word in (name, *named):
    assert word in str(error.value), error.value


def test_rows_are_flat_and_come_back_as_they_were():
  scores = {"ssim": 0.5, "lpips": None, "iterations": 7, "mask_accuracy_by_site": {"a": 0.25}}
  row = Row(image=3, attack="dia", label=1, label_name="cat", scores=scores)
  columns = json.loads(json.dumps(row.to_json()))
  assert columns["label_name"] == "cat" and columns["ssim"] == 0.5 and "session" not in columns
  assert "scores" not in columns and Row.from_json(columns) == row


def _launch(*arguments):
  command = [sys.executable, "launch/report.py", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_launcher(tmp_path):
  write_experiment(tmp_path / "run", recorded=False, attacks=("dia",))
  result = _launch(f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 0, result.stderr
  assert str(tmp_path / "run" / "report.html") in result.stdout
  result = _launch(f"--workdir={tmp_path}")
  assert result.returncode == 2
  assert len(result.stderr.strip().splitlines()) == 1 and str(tmp_path) in result.stderr


def _browse(folder, *arguments):
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
    f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", *arguments,
  ]  # fmt: skip
  return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(
  BROWSER is None, reason="no chromium, chromium-browser or google-chrome in PATH"
)
def test_page_fits_a_phone_in_a_real_browser(study, page, tmp_path):
  del page  # written by it
  probe = tmp_path / "probe.html"
  probe.write_text(
    f"""<iframe id="f" width="390" height="844" src="{(study / "report.html").as_uri()}"></iframe>
    <script>document.getElementById("f").onload = () => {{
      const page = document.getElementById("f").contentDocument;
      const broken = [...page.images].filter(image => !image.naturalWidth).length;
      const headline = page.querySelector(".headline").getBoundingClientRect();
      document.title = [page.documentElement.scrollWidth, broken, page.images.length,
        Math.round(headline.bottom)].join(" ");
    }}</script>"""
  )
  result = _browse(tmp_path, "--dump-dom", probe.as_uri())
  found = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", result.stdout)
  assert found, result.stderr[-2000:]
  width, broken, images, bottom = map(int, found.groups())
  assert width <= 390 and broken == 0 and images > 10
  assert bottom <= 844  # the verdict is on the first screen, below a failure
  picture = tmp_path / "phone.png"
  uri = (study / "report.html").as_uri()
  _browse(tmp_path, f"--screenshot={picture}", "--window-size=390,844", uri)
  assert len(np.unique(np.asarray(Image.open(picture).convert("L")))) > 20
