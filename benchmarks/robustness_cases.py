"""The malformed files and settings of `robustness_inputs.py`: cases of each kind."""

import dataclasses
import io
import pathlib
import shutil
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from robustness_mutations import (
  damage,
  load,
  lying_safetensors,
  odd_place,
  spoilt_arrays,
  spoilt_json,
  written,
)
from robustness_runs import RUNS

_SHORT = ["--config.attack.max_iterations=2", "--config.data.count=2"]
_SHORT += ["--config.model.hidden_sizes=(16,16)", "--config.engine.lanes=1"]
_ATTACK = ["--config=configs/mlp.py:mnist", *_SHORT]


class Originals:
  """What is changed: files of each format and work directories.

  Attributes:
    folder: in which they are.
    interrupted: the command of the interrupted run, but for Python.
  """

  def __init__(self, folder: pathlib.Path):
    """Takes a folder that `set_up` has filled."""
    self.folder = folder
    self.interrupted: list[str] = []

  def commands(self) -> dict[str, list[str]]:
    """Returns what makes each finished work directory."""
    study, audit = (
      RUNS[name].command(self.folder, self.folder)[1:-1] for name in ("study", "audit")
    )
    return {
      "experiment": ["launch/attack.py", *_ATTACK, "--config.attack.name=dia,closed_form"],
      "study": [*study, "--config.base.attack.max_iterations=20"],
      "audit": audit,
    }


@dataclasses.dataclass(frozen=True)
class Case:
  """A command with something malformed.

  Attributes:
    name: what is malformed.
    command: file of launch/.
    arguments: of it.
    workdir: of the command.
    may_be_valid: whether what was changed may be valid, or not looked at.
    may_fail: whether a study may go on without the cell that has it.
    finished: see `robustness_runs.Run`.
  """

  name: str
  command: str
  arguments: Sequence[str]
  workdir: pathlib.Path
  may_be_valid: bool = False
  may_fail: bool = False
  finished: Callable[[pathlib.Path], set[str]] = lambda workdir: set()


@dataclasses.dataclass(frozen=True)
class _Kind:
  """Cases of one kind: their share, and what makes one of a folder, a generator and a number."""

  weight: int
  make: Callable[[Originals, pathlib.Path, np.random.Generator, int], Case]


def _npz_images(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  good = {
    "images": rng.uniform(size=(3, 8, 8, 1)).astype(np.float32),
    "labels": np.arange(3),
    "class_names": np.array(["a", "b", "c"]),
  }
  path, valid = place / "victims.npz", False
  if i % 3 == 0:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **good)
    how, content, valid = damage(rng, buffer.getvalue())
    path.write_bytes(content)
  elif i % 3 == 1:
    how, content = spoilt_arrays(rng, good)
    valid = "odd name" in how or "class_names" in how or "(labels)" in how
    path.write_bytes(content)
  else:
    how, path = odd_place(rng, place, "victims.npz")
  arguments = [*_ATTACK, f"--config.data.source=npz:{path}", f"--workdir={place / 'run'}"]
  return Case(how, "attack", arguments, place / "run", valid)


def _pictures(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  kind = str(rng.choice(["png", "jpeg", "bmp", "gif", "webp", "tiff"]))
  pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  folder, valid = place / "pictures" / "0", True
  folder.mkdir(parents=True)
  Image.fromarray(pixels).save(folder / "a.png")
  path = folder / f"b.{kind}"
  if i % 4 == 0:
    how, other = odd_place(rng, place, f"b.{kind}")
    if other.exists() or other.is_symlink():
      other.rename(path if how != "odd name" else folder / f"{other.name[:60]}.{kind}")
  elif i % 8 == 1 and kind == "png":
    how, valid = "a size of gigabytes", False
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", 10**5, 10**5)
    path.write_bytes(content)
  else:
    how, content, valid = damage(rng, buffer.getvalue())
    path.write_bytes(content)
  source = f"--config.data.source=folder:{place / 'pictures'}"
  name = f"{kind}: {how}"
  return Case(
    name, "attack", [*_ATTACK, source, f"--workdir={place / 'run'}"], place / "run", valid
  )


_LINES = (
  "config.attack.learning_rate = float('inf')", "config.attack.max_iterations = 1e9",
  "config.attack.name = None", "config.attack.name = 'dia\\nig'", "config.attack = 3",
  "config.data.count = 'many'", "config.data.count = 10**30", "config.data.source = b'x'",
  "config.data.source = 'npz:\\x00'", "config.data.source = 'samples:\\x1b[31m'",
  "config.model.dropout_rate = float('nan')", "config.model.dropout_rate = '0.5'",
  "config.model.hidden_sizes = (10**9, 10**9)", "config.model.hidden_sizes = 'x'",
  "config.model.name = 'os:system'", "config.model.name = 'none:none'", "config.engine.lanes = -1",
  "config.model.name = 'json:loads'", "config.engine.lanes = 10**12", "config.seed = 10**30",
  "config.seed = 'x'", "config.data.batch_size = 0", "config.data.image_size = 10**7",
  "config.attack.restarts = 10**15", "config.defence.update({'name': 'gaussian_noise', 'std': -1})",
  "config.local.steps = float('inf')", "config.training.steps = -3", "config.precision = 16",
  "del config.attack", "config['\\n'] = 1", "config.engine.chunk = 0.5", "return None", "return 3",
  "raise SystemExit('x')", "raise KeyError", "raise Exception('a\\nb')", "1 / 0",
  "import none_such", "def", "'''", "config.model.update({'a b': object()})",
  "config.attack.tv_weight = object()",
  "return {'data': 3}", "return [config]", "x = x", "config.data = config",
  "raise RecursionError", "raise MemoryError", "f = lambda: f(); f()",
)  # fmt: skip


# As many lanes are used as there are trials.
_VALID_LINES = ("config.engine.lanes = 10**12",)


def _config_files(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  path, command, how = place / "odd.py", "attack", ""
  if i % 5 == 4:
    content = (o.folder / "study.py").read_bytes() if i % 2 else b"\x00get_config"
    how, content, _ = damage(rng, content)
    path.write_bytes(content)
    command = "evaluate" if i % 2 else "attack"
  elif i % 5 == 3:
    grids = (
      "3", "[('seed', 5)]", "[('seed',)]", "['seed']", "[('none.such', (1,))]", "[('seed', ())]",
      "[('seed', (float('nan'),))]", "[(3, (1,))]", "[('model.dropout_rate', (2.0, -1.0))]",
      "[('seed', (object(),))]", "[('data.source', ('\\n', '\\x1b'))]",
    )  # fmt: skip
    how = grids[i // 5 % len(grids)]
    text = (o.folder / "study.py").read_text()
    path.write_text(text.replace('[("model.dropout_rate", (0.25, 0.5))]', how))
    command = "evaluate"
  else:
    how = _LINES[(i - i // 5 * 2) % len(_LINES)]
    path.write_text(
      "from jaxdia.experiment.config import config_for\n\n\ndef get_config():\n"
      f"  config = config_for('mlp', 'mnist', hidden_sizes=(16, 16))\n  config.data.count = 2\n"
      f"  config.attack.max_iterations = 2\n  {how}\n  return config\n"
    )
  arguments = [f"--config={path}", f"--workdir={place / 'run'}"]
  valid = command == "evaluate" or how in _VALID_LINES
  return Case(f"{command}: {how}", command, arguments, place / "run", valid, True)


_FLAGS = (
  "--config=", "--config=\n", "--config=configs", "--config=/dev/null", "--config=configs/mlp.py:",
  "--config.seed=", "--config.seed=9999999999999999999999", "--config.seed=1e3", "--config.=1",
  "--config.model.hidden_sizes=(1,", "--config.model.hidden_sizes=__import__('os')",
  "--config.attack.learning_rate=nan", "--config.attack.learning_rate=-inf", "--config.a\nb=1",
  "--config.attack.name=\x1b[31mdia", "--config.data.source=npz:", "--config.data.source=folder:/",
  "--config.data.source=folder:\x00", "--config.data.source=tfds:", "--config.data.source=text:x",
  "--config.data.count=-1", "--config.data.offset=99999999999", "--config.data.image_size=0",
  "--config.model.name=a:b:c", "--config.model.name=..:x", "--config.model.name=sys:exit",
  "--config.engine.lanes=0x10", "--workdir=/dev/null", "--workdir=/proc/1/none", "--none=1", "-x",
  "--config.local.epochs=0", "--config.defence.name=none\n", "--config.defence.std=1e999", "\n",
)  # fmt: skip


def _flags(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  flag = _FLAGS[i % len(_FLAGS)]
  flag = flag.replace("\x00", "\udcff")  # no command line holds a zero
  arguments = [*_ATTACK, f"--workdir={place / 'run'}", flag]
  return Case(repr(flag), "attack", arguments, place / "run", flag == "--config.defence.std=1e999")


def _updates(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  arrays, valid = load(o.folder / "gradient_0.npz"), False
  formats = ("npz", "safetensors", "msgpack", "npy", "arrays", "header", "place", "folder")
  kind = formats[i % len(formats)]
  path = place / "update.bin"
  if kind == "arrays":
    how, content = spoilt_arrays(rng, arrays)
    # An update of such numbers is audited, and the audit says that they are.
    valid = any(x in how for x in ("odd name", "not a number", "infinite", "huge ("))
    path.write_bytes(content)
  elif kind == "header":
    how, content = lying_safetensors(rng, arrays)
    path.write_bytes(content)
  elif kind == "place":
    how, path = odd_place(rng, place, "update.bin")
  elif kind == "folder":
    path.mkdir()
    how, content, _ = damage(rng, b'{"tree_metadata": {}}')
    (path / str(rng.choice(["_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"]))).write_bytes(
      content
    )
  else:
    how, content, valid = damage(rng, written(kind, arrays))
    path.write_bytes(content)
  paths = {"before": o.folder / "before.npz", "gradient": path}
  if i % 4 == 3:
    paths = {"before": path, "gradient": o.folder / "gradient_0.npz"}
  arguments = [
    *("--config=configs/audit.py", "--config.model.hidden_sizes=(64,64)", "--config.seconds=0"),
    *("--config.batch_size=2", "--config.statistics=mnist", f"--workdir={place / 'run'}"),
    *(f"--config.{name}={value}" for name, value in paths.items()),
    *(["--config.by_order=True"] if kind == "npy" else []),
  ]
  return Case(f"{kind}: {how}", "audit", arguments, place / "run", valid)


def _work_directory(
  o: Originals, place: pathlib.Path, rng: np.random.Generator, name: str, files: Sequence[str]
) -> tuple[str, pathlib.Path, bool]:
  """Copies a work directory and spoils a file of it; returns how, and if it may be valid."""
  workdir = place / "run"
  shutil.copytree(o.folder / name, workdir)
  found = sorted(path for pattern in files for path in workdir.glob(pattern))
  path = found[int(rng.integers(0, len(found)))]
  content, valid = path.read_bytes(), True
  draw = rng.random()
  if draw < 0.15:
    path.unlink()
    how, other = odd_place(rng, place, path.name, endless=False)
    if (other.exists() or other.is_symlink()) and how != "odd name":
      other.rename(path)
  elif draw < 0.35:
    how, content, _ = damage(rng, content)
    path.write_bytes(content)
  elif path.suffix == ".npz":
    how, content = spoilt_arrays(rng, load(path))
    path.write_bytes(content)
  else:
    text = content.decode().strip() or "{}"  # the rows of a run that has finished no image
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    which = int(rng.integers(0, len(lines)))
    how, spoilt = spoilt_json(rng, lines[which])
    before = "".join(line + "\n" for line in lines[:which]).encode()
    path.write_bytes(before + spoilt + b"\n" + "\n".join(lines[which + 1 :]).encode())
  return f"{path.relative_to(workdir)}: {how}", workdir, valid


_OF_EXPERIMENTS = ("config.json", "manifest.json", "sessions.jsonl", "results.jsonl", "trials/*/*")


def _interrupted(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  files = (*_OF_EXPERIMENTS, "checkpoint/*", "checkpoint/*", "lock.json")
  how, workdir, valid = _work_directory(o, place, rng, "interrupted", files)
  arguments = [*o.interrupted[1:], f"--workdir={workdir}"]
  return Case(how, "attack", arguments, workdir, valid)


def _experiment(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  how, workdir, valid = _work_directory(o, place, rng, "experiment", _OF_EXPERIMENTS)
  arguments = [*o.commands()["experiment"][1:], f"--workdir={workdir}"]
  return Case(how, "attack", arguments, workdir, valid)


def _study(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  files = ("study.json", "study.json", "sessions.jsonl", "cells/*/*.json*", "cells/*/trials/*/*")
  how, workdir, valid = _work_directory(o, place, rng, "study", files)
  arguments = [*o.commands()["study"][1:], f"--workdir={workdir}"]
  return Case(how, "evaluate", arguments, workdir, valid, True)


def _audit(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  how, workdir, valid = _work_directory(o, place, rng, "audit", ("audit.json", "*.npz"))
  arguments = [*o.commands()["audit"][1:], f"--workdir={workdir}"]
  return Case(how, "audit", arguments, workdir, valid)


def _report(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  name = ("experiment", "study")[i % 2]
  files = ["config.json", "manifest.json", "results.jsonl", "summary.json", "summary.json", "*.npz"]
  files = [f"cells/*/{file}" for file in files] + ["study.json"] * 2 if i % 2 else files
  how, workdir, valid = _work_directory(o, place, rng, name, files)
  return Case(f"{name}, {how}", "report", [f"--workdir={workdir}"], workdir, valid)


def _text(o: Originals, place: pathlib.Path, rng: np.random.Generator, i: int) -> Case:
  path, valid = place / "text.txt", True
  option = "--config.data.source=text:"
  if i % 3 == 0:
    how, path = odd_place(rng, place, "text.txt")
  elif i % 3 == 1:
    how, content, _ = damage(rng, ("Some words, é and 数. " * 20 + "\n\n").encode() * 3)
    path.write_bytes(content)
  else:
    option = "--config.data.tokenizer="
    how, content, _ = damage(rng, b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}')
    path.write_bytes(content)
  arguments = [
    *("--config=configs/text.py", "--config.data.count=1", "--config.data.batch_size=1"),
    *("--config.data.length=6", "--config.data.vocabulary=300", "--config.model.width=64"),
    *("--config.model.depth=1", "--config.model.mlp_size=64", "--config.attack.name=tokens"),
    *(f"{option}{path}", f"--workdir={place / 'run'}"),
  ]
  return Case(f"{option[14:-1]}: {how}", "text", arguments, place / "run", valid)


KINDS = {
  "npz of images": _Kind(14, _npz_images),
  "pictures": _Kind(10, _pictures),
  "config files": _Kind(24, _config_files),
  "flags": _Kind(14, _flags),
  "updates and weights": _Kind(24, _updates),
  "work directory, interrupted attack": _Kind(14, _interrupted),
  "work directory, finished attack": _Kind(8, _experiment),
  "work directory, study": _Kind(8, _study),
  "work directory, audit": _Kind(5, _audit),
  "results to report": _Kind(14, _report),
  "text and tokenizers": _Kind(5, _text),
}
