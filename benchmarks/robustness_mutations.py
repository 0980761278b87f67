"""Ways to spoil files, of which `robustness_cases.py` makes cases."""

import io
import json
import os
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

ODD_NAMES = ("new\nline", "escape\x1b[31m", "return\rcarriage", "\u202eleft", "\udcff", "long" * 70)


def damage(rng: np.random.Generator, content: bytes) -> tuple[str, bytes, bool]:
  """Returns bytes that are not what they were, how they were changed, and if they may be valid."""
  changed, size = bytearray(content), len(content)
  place = int(rng.integers(0, max(size, 1)))
  how = str(rng.choice(["empty", "cut", "bits", "bytes", "twice", "zeros", "noise", "shifted"]))
  if how == "empty":
    return how, b"", False
  if how == "cut":
    return how, content[: int(rng.integers(1, size))], True
  if how == "bits":
    for at in rng.integers(0, size, rng.integers(1, 9)):
      changed[at] ^= 1 << int(rng.integers(0, 8))
  elif how == "bytes":
    changed[place : place + 64] = rng.bytes(64)
  elif how == "twice":
    changed += content
  elif how == "zeros":
    changed[place : place + 256] = bytes(len(changed[place : place + 256]))
  elif how == "noise":
    return how, rng.bytes(max(size, 64)), False
  else:
    del changed[place : place + 3]
  return how, bytes(changed), True


def odd_place(
  rng: np.random.Generator, place: pathlib.Path, name: str, endless: bool = True
) -> tuple[str, pathlib.Path]:
  """Returns a path at which there is no such file, or none that can be read as one.

  Args:
    rng: that chooses.
    place: a folder.
    name: of the file there.
    endless: whether it may be a pipe or a device, which have no end.
  """
  path = place / name
  ways = ["missing", "folder", "loop", "broken link", "odd name"]
  how = str(rng.choice(ways + ["pipe", "device"] * endless))
  if how == "folder":
    path.mkdir()
  elif how == "loop":
    path.symlink_to(path)
  elif how == "pipe":
    os.mkfifo(path)
  elif how == "broken link":
    path.symlink_to(place / "nowhere")
  elif how == "device":
    path.symlink_to("/dev/zero")
  elif how == "odd name":
    path = (
      place / (str(rng.choice(ODD_NAMES[:-1])) + name)
      if rng.random() < 0.8
      else (place / ODD_NAMES[-1])
    )
    if rng.random() < 0.7 and len(path.name) < 100:
      path.write_bytes(b"")
  return how, path


def spoilt_arrays(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> tuple[str, bytes]:
  """Returns an npz with right sums in which an array is not as it should be."""
  name = str(rng.choice(list(arrays)))
  array = arrays[name]
  spoilt = {
    "objects": np.array([{"a": 1}], object),
    "text": np.full(array.shape, "x"),
    "complex": np.zeros(array.shape, complex),
    "not a number": np.full(array.shape, np.nan),
    "infinite": np.full(array.shape, np.inf),
    "negative and huge": np.full(array.shape, -1e30),
    "another shape": array[..., None] if rng.random() < 0.5 else array.reshape(-1)[:-1],
    "no entries": np.zeros((0, *array.shape[1:]), array.dtype),
    "a number": np.float32(1),
    "records": np.zeros(array.shape, [("a", "f4"), ("b", "i4")]),
    "dates": np.zeros(array.shape, "datetime64[s]"),
  }
  how = str(
    rng.choice([*spoilt, "missing", "huge header", "bomb", "odd name", "no header", "bad zip"])
  )
  changed = {k: v for k, v in arrays.items() if k != name}
  members: dict[str, bytes] = {}
  if how in spoilt:
    changed[name] = spoilt[how]
  elif how == "odd name":
    changed["../" + str(rng.choice(ODD_NAMES[:4]))] = array
  elif how == "huge header":
    members[name] = _npy_header(array.dtype, (10**7, 10**6, 28, 28)[: int(rng.integers(1, 5))])
  elif how == "bomb":
    members[name] = _npy_header(np.dtype("f4"), (2**30,)) + bytes(2**20)
  elif how == "no header":
    members[name] = rng.bytes(100)
  buffer = io.BytesIO()
  np.savez(buffer, **changed)
  with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
    for key, content in members.items():
      with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
        file.write(content)
        for _ in range(4095 if how == "bomb" else 0):  # 4 GiB of zeros are 4 MiB in the file
          file.write(bytes(2**20))
  content = bytearray(buffer.getvalue())
  if how == "bad zip":  # of an unknown method, or encrypted
    start = content.rfind(b"PK\x01\x02")
    content[start + 10 if rng.random() < 0.5 else start + 8] = 99
  return f"{how} ({name})", bytes(content)


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
  buffer = io.BytesIO()
  described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(buffer, described)
  return buffer.getvalue()


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of an npz."""
  with np.load(path) as file:
    return dict(file)


def spoilt_json(rng: np.random.Generator, text: str) -> tuple[str, bytes]:
  """Returns JSON in which one value is another, is missing, or which is none."""
  how = str(rng.choice(["value", "value", "value", "value", "missing", "text"]))
  if how == "text" or text == "{}":
    texts = {
      "nothing": b"", "null": b"null", "a list": b"[]", "an object": b"{}", "a number": b"3",
      "not UTF-8": b"\xff\xfe{}", "a mark": b"\xef\xbb\xbf" + text.encode(), "deep": b"[" * 10**5,
      "half": text.encode()[: len(text) // 2], "NaN": b'{"a": NaN}', "digits": b"1" * 10**5,
    }  # fmt: skip
    which = str(rng.choice(list(texts)))
    return f"all: {which}", texts[which]
  value = json.loads(text)
  path, inner = [], value
  while isinstance(inner, (dict, list)) and inner and (not path or rng.random() < 0.85):
    keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    path.append(keys[int(rng.integers(0, len(keys)))])
    holder, inner = inner, inner[path[-1]]
  where = ".".join(map(str, path))
  if how == "missing":
    del holder[path[-1]]
    return f"{where} is missing", json.dumps(value).encode()
  odd = (None, "text", "", -1, 10**30, 1e308, True, [], {}, [None], {"a": {"b": []}}, 0.5, "\x00\n")
  holder[path[-1]] = odd[int(rng.integers(0, len(odd)))]
  return f"{where} is {holder[path[-1]]!r}", json.dumps(value).encode()


def written(kind: str, arrays: dict[str, np.ndarray]) -> bytes:
  """Returns arrays as a file: npz, safetensors, msgpack, or npy (one after another)."""
  if kind == "safetensors":
    from safetensors.numpy import save

    return save(arrays)
  if kind == "msgpack":
    from flax import serialization

    return serialization.msgpack_serialize(dict(arrays))
  buffer = io.BytesIO()
  if kind == "npz":
    np.savez(buffer, **arrays)
  else:
    for array in arrays.values():
      np.save(buffer, array)
  return buffer.getvalue()


def lying_safetensors(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> tuple[str, bytes]:
  """Returns a safetensors file whose header says what is not so."""
  content = written("safetensors", arrays)
  size = struct.unpack("<Q", content[:8])[0]
  header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
  name = next(key for key in header if key != "__metadata__")
  one = header[name]
  lies: dict[str, Any] = {
    "offsets": {"data_offsets": [0, 10**15]}, "negative": {"data_offsets": [-8, 8]},
    "backwards": {"data_offsets": one["data_offsets"][::-1]}, "shape": {"shape": [10**9, 10**9]},
    "type": {"dtype": "X99"}, "few bits": {"dtype": "F8_E4M3"}, "text": {"shape": "x"},
  }  # fmt: skip
  how = str(rng.choice([*lies, "length", "no object", "name", "metadata"]))
  if how in lies:
    header[name] = one | lies[how]
  elif how == "name":
    header["a\nb\x1b"] = header.pop(name)
  elif how == "metadata":
    header["__metadata__"] = {"a": 3}
  text = b"[1]" if how == "no object" else json.dumps(header).encode()
  length = 2**60 if how == "length" else len(text)
  return how, struct.pack("<Q", length) + text + body
