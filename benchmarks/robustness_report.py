"""Part of `robustness.py`: reports of hostile names and labels, opened in a browser."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from robustness_runs import ROOT, RUNS, Check

from jaxdia.report import write_audit_report
from jaxdia.report.text import write_text_report

BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_HARM = "top.harmed=window.harmed=1"
# Texts by what they would do if a page did not show them as they are.
PAYLOADS = {
  "script": f"<script>{_HARM}</script>",
  "script after a title": f"</title><script>{_HARM}</script>",
  "image after a style": f'</style><img src=x onerror="{_HARM}">',
  "attribute in double quotes": f'" autofocus tabindex=1 onfocus="{_HARM}" x="',
  "attribute in single quotes": f"' autofocus tabindex=1 onfocus='{_HARM}' x='",
  "link": f'<a href="javascript:{_HARM}" id=link>javascript:{_HARM}</a>',
  "frame": f"<iframe srcdoc='<script>{_HARM}</script>'></iframe><svg onload={_HARM}>",
  "end of a comment": f"--><script>{_HARM}</script><!--",
  "template": "{{7*7}} {% raw %} {{ config.__class__ }} ${7*7} #{7*7}",
  "formula": r"$\frac{$ $x^$ \input{/etc/passwd}",
  "entities": "&lt;b&gt; &amp; &#60;script&#62; &notanentity; &",
  "control characters": "a\x07b\x1b[31mc\x08d\x7fe\x9bf",
  "right to left": "\u202egnp.exe\u202c \u2066x\u2069 \u05d0\u05d1",
  "emoji and others": "😀👩‍👩‍👧 ﷽ Z̷̢a̴͝l̵ \U000e0041 é ü 数据",
  "lines": "one\ntwo\r\nthree\u2028four\ttab",
  "long": "W" * 3000,
}
# What runs if a page has it unchanged and bare.
_HARMFUL = [PAYLOADS[name] for name in ("script", "image after a style", "link", "frame")]
_PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>waiting</title>
<script>
const payload = PAYLOAD, frames = FRAMES, found = {};
const plain = s => s.replace(/[\\x00-\\x08\\x0e-\\x1f\\x7f-\\x9f\\ufffd]/g, "")
  .replace(/\\s+/g, " ").trim();
const bad = v => /^\\s*javascript:/i.test(v || "");
const elements = frame => [...frame.contentDocument.querySelectorAll("*")];
// What a link does, it does later.
const press = frame =>
  elements(frame).filter(e => bad(e.getAttribute("href"))).forEach(e => e.click());
function look(name, frame) {
  const page = frame.contentDocument, all = elements(frame);
  const links = ["href", "src", "action", "srcdoc", "data", "formaction"];
  found[name] = {
    harmed: Boolean(window.harmed || frame.contentWindow.harmed),
    scripts: page.querySelectorAll("script,iframe,object,embed,base,svg,form").length,
    handlers: all.filter(e => [...e.attributes].some(a => /^on/i.test(a.name))).length,
    links: all.filter(e => links.some(l => bad(e.getAttribute(l)))).length,
    shown: plain(page.documentElement.textContent).includes(plain(payload)),
  };
  window.harmed = undefined;
}
for (const name of frames) {
  const frame = document.createElement("iframe");
  frame.src = name + ".html";
  frame.onload = () => {
    setTimeout(() => press(frame), 200);
    setTimeout(() => {
      look(name, frame);
      if (Object.keys(found).length == frames.length) document.title = JSON.stringify(found);
    }, 500);
  };
  document.documentElement.appendChild(frame);
}
</script>"""
_POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')


def run(folder: pathlib.Path, seed: int, number: int) -> Iterator[Check]:
  """Makes the three kinds of pages of each hostile text, and opens them with and without policy.

  Args:
    folder: that `set_up` has filled.
    seed: not used, as nothing is drawn.
    number: not used.

  Yields:
    A check for each text and page, and one that the browser would notice a page that does harm.
  """
  del seed, number
  if BROWSER is None:
    why = "no chromium, chromium-browser or google-chrome in PATH"
    yield Check("pages", "in a browser", skipped=why)
    return
  made = folder / "made"
  for name, command in _commands(folder).items():
    subprocess.run(
      [*command, f"--workdir={made / name}"], cwd=ROOT, check=True, capture_output=True
    )
  for number, (what, payload) in enumerate(PAYLOADS.items()):
    place = folder / str(number)
    place.mkdir()
    faults = {name: _make(made / name, place, name, payload) for name in _commands(folder)}
    names = [name for name in faults if not faults[name]]
    for name in names:
      text = (place / f"{name}.html").read_text(encoding="utf-8")
      (place / f"{name}_without_policy.html").write_text(_POLICY.sub("", text), encoding="utf-8")
    each = [*names, *(f"{name}_without_policy" for name in names)]
    found = _browse(place, payload, each)
    for name in faults:
      yield Check(f"page of a{'n' * (name == 'audit')} {name}", what, faults[name])
      for way in ("", "_without_policy"):
        if name in names:
          case = f"{what}, {'with' if not way else 'without'} its content policy"
          seen = found.get(name + way)
          yield Check(f"page of a{'n' * (name == 'audit')} {name}, opened", case, _judge(seen))
    if payload in _HARMFUL:  # alone, as what it does is seen in the window of all pages
      (place / "unsafe.html").write_text(f"<!DOCTYPE html><body>{payload}", encoding="utf-8")
      unsafe = _browse(place, payload, ["unsafe"]).get("unsafe")
      noticed = unsafe and unsafe["harmed"] and _judge(unsafe)
      faults = [] if noticed else ["the browser ran no script of it"]
      yield Check("page that does harm, noticed", what, faults)


def _commands(folder: pathlib.Path) -> dict[str, list[str]]:
  text = [sys.executable, str(ROOT / "launch" / "text.py"), "--config=configs/text.py"]
  text += ["--config.data.count=1", "--config.data.batch_size=1", "--config.data.length=6"]
  text += ["--config.data.vocabulary=300", "--config.model.width=64", "--config.model.depth=1"]
  text += ["--config.model.mlp_size=64", "--config.attack.name=tokens"]
  study, audit = (RUNS[name].command(folder, folder)[:-1] for name in ("study", "audit"))
  return {
    "study": [*study, "--config.base.attack.max_iterations=20"],
    "audit": audit,
    "text": text,
  }


def _judge(found: dict[str, Any] | None) -> list[str]:
  if found is None:
    return ["the browser did not show it"]
  faults = [f"{found[name]} {name}" for name in ("scripts", "handlers", "links") if found[name]]
  faults += ["a script ran"] if found["harmed"] else []
  return faults + ([] if found["shown"] else ["the text is not shown as it is"])


def _browse(place: pathlib.Path, payload: str, names: list[str]) -> dict[str, Any]:
  """Opens pages in frames of one, whose script then looks into them."""
  script = _PROBE.replace("PAYLOAD", _in_script(payload)).replace("FRAMES", _in_script(names))
  (place / "probe.html").write_text(script, encoding="utf-8")
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
    f"--user-data-dir={place / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
    (place / "probe.html").as_uri(),
  ]  # fmt: skip
  dom = subprocess.run(command, capture_output=True, timeout=120).stdout.decode(errors="replace")
  title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
  text = html.unescape(title[1]) if title else ""
  return json.loads(text) if text.startswith("{") else {}


def _in_script(value: Any) -> str:
  return json.dumps(value).replace("<", "\\u003c")


def _make(source: pathlib.Path, place: pathlib.Path, name: str, payload: str) -> list[str]:
  """Writes a page about results in which all that is free text is the payload."""
  folder = place / name
  shutil.copytree(source, folder)
  {"study": _spoil_study, "audit": _spoil_audit, "text": _spoil_text}[name](folder, payload)
  (folder / "report.html").unlink(missing_ok=True)
  if name == "study":
    command = [sys.executable, str(ROOT / "launch" / "report.py"), f"--workdir={folder}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
      return [f"it ended with {ended.returncode}: {ended.stderr.strip()[-600:]}"]
  else:
    try:
      (write_audit_report if name == "audit" else write_text_report)(folder)
    except Exception as error:
      return [f"{type(error).__name__}: {error}"]
  shutil.copy(folder / "report.html", place / f"{name}.html")
  return []


def _change(path: pathlib.Path, change) -> None:
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


def _with_texts(value: Any, payload: str) -> Any:
  """Returns a value in which each text is the payload."""
  if isinstance(value, dict):
    return {key: _with_texts(inner, payload) for key, inner in value.items()}
  if isinstance(value, list):
    return [_with_texts(inner, payload) for inner in value]
  return payload if isinstance(value, str) else value


def _spoil_study(folder: pathlib.Path, payload: str) -> None:
  def change_study(study):
    study |= {"title": payload, "question": payload}
    study["manifest"] = _with_texts(study["manifest"], payload) | {payload: payload}
    for number, cell in enumerate(study["cells"]):
      named = re.sub(r"[/\x00]", "_", payload)[:60] + str(number)
      cell["name"] = named
      cell["overrides"] |= {payload: payload, f"{payload}{number}": number}
    others = {"failed": payload, "pending": None}
    study["cells"] += [
      {"name": payload, "overrides": {payload: payload}, "status": k, "reason": v, "seconds": None}
      for k, v in others.items()
    ]

  old = [cell["name"] for cell in json.loads((folder / "study.json").read_text())["cells"]]
  _change(folder / "study.json", change_study)
  new = [cell["name"] for cell in json.loads((folder / "study.json").read_text())["cells"]]
  for before, after in zip(old, new, strict=False):
    (folder / "cells" / before).rename(folder / "cells" / after)
  for cell in (folder / "cells").iterdir():
    _spoil_cell(cell, payload)


def _spoil_cell(cell: pathlib.Path, payload: str) -> None:
  def change_config(config):
    config["data"] |= {"source": payload, payload: payload}
    config["model"] |= {"name": payload, payload: payload}
    config["attacks"][payload] = config["attacks"].pop("dia") | {payload: payload}

  def change_summary(summary):
    attack = summary.pop("dia")
    attack |= {"told": payload, "defence": payload}
    attack["metrics"][payload] = attack["metrics"]["ssim"]
    for field in attack:
      if field.endswith("_by_site"):
        attack[field] = {f"{payload}{i}": v for i, v in enumerate(attack[field].values())}
    summary[payload] = attack
    summary["floors"] = {payload: next(iter(summary["floors"].values()))}

  _change(cell / "config.json", change_config)
  _change(cell / "summary.json", change_summary)
  _change(cell / "manifest.json", lambda m: m.update(_with_texts(dict(m), payload)))
  rows = [json.loads(line) for line in (cell / "results.jsonl").read_text().splitlines()]
  for row in rows:
    row |= {"label_name": payload, "model": payload, "defence": payload, "status": payload}
    row["attack"] = payload if row["attack"] == "dia" else row["attack"]
  (cell / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for name in ("reconstructions.npz", "recordings.npz"):
    with np.load(cell / name) as file:
      arrays = {payload if key == "dia" else key: array for key, array in file.items()}
    np.savez(cell / name, **arrays)


def _spoil_audit(folder: pathlib.Path, payload: str) -> None:
  def change(audit):
    audit["model"] |= {"name": payload, "sites": {payload: 0.5}}
    audit["pending"] = [payload]
    audit["manifest"] = _with_texts(audit["manifest"], payload) | {payload: payload}
    audit["settings"] |= {"mode": payload, "statistics": {payload: payload}}
    for update in audit["updates"]:
      update |= {"name": payload, "masks": {payload: 0.5}}
      update["findings"] = [{"name": payload, "effect": "noted", "text": payload}]
      for attempt in update["attempts"]:
        attempt |= {"name": payload, "outcome": payload}
      for image in update["images"]:
        image |= {"reason": payload, "by": payload, "verdict": payload}

  _change(folder / "audit.json", change)


def _spoil_text(folder: pathlib.Path, payload: str) -> None:
  rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
  for row in rows:
    row |= {"text": payload, "found": payload, "verdict": payload, "reason": payload}
  (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

  def change(config):
    for group, field in (("model", "name"), ("defence", "name"), ("data", "source")):
      config["config"][group][field] = payload

  _change(folder / "config.json", change)
  _change(folder / "manifest.json", lambda m: m.update(command=[payload, payload]))
  _change(
    folder / "summary.json",
    lambda s: [attack.update(verdicts={payload: 1}) for attack in s.values()],
  )
