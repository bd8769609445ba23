# SPDX-License-Identifier: Apache-2.0
"""Damage to a folder of files, held as {relative name: bytes}.

A change knows the kind of its file: fields of JSON and YAML get values of other
types, headers of safetensors other shapes and places. What has no such form is
cut short, or gets other bytes. Some names become folders, pipes or links.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Files = dict[str, bytes]

DEEP = "[" * 100_000
# What stands in place of a file's name instead of a file.
PLACES = ("folder", "pipe", "loop", "device", "nothing")
ODD = (
  None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(10**30), 10**400, 0.5, -0.0,
  1e308, float("nan"), float("inf"), "", "q", "a\0b", "../x", "/dev/zero",
  "x" * 3000, "\ud800", "(.+)+#", "(", ".*" * 20, "(a|a)*b", "\\1", "9" * 5000,
  [], {}, [[]], [None], ["q", 3], {"q": None}, {"": ""}, {"q": [1]}, "1e5",
  "[]",
)  # fmt: skip


def damage(files: Files, dice: random.Random) -> tuple[Files, dict[str, str]]:
  """Changes one file, seldom two; returns all, and names that are no files."""
  files, places = dict(files), {}
  for _ in range(dice.choice((1, 1, 1, 2))):
    # Small files first: what is read into structures lies there.
    weights = [1 + 9 * (len(files[name]) < 20_000) for name in files]
    name = dice.choices(sorted(files), weights)[0]
    if dice.random() < 0.06:
      places[name] = dice.choice(PLACES)
    else:
      files[name] = change_of(name, dice)(files[name], dice)
  return files, places


def change_of(name: str, dice: random.Random) -> Callable[..., bytes]:
  """Chooses a change that suits a file's name."""
  plain = dice.choice((flipped, cut, doubled, inserted, replaced))
  own = {
    ".json": json_changed,
    ".yml": yaml_changed,
    ".safetensors": header_changed,
    "_METADATA": json_changed,
    "_CHECKPOINT_METADATA": json_changed,
    ".zarray": json_changed,
    "_sharding": json_changed,
    "zarr.json": json_changed,
  }
  for end, change in own.items():
    if name.endswith(end) and dice.random() < 0.75:
      return change
  return plain


def flipped(raw: bytes, dice: random.Random) -> bytes:
  """Some bytes are others."""
  out = bytearray(raw)
  for _ in range(dice.choice((1, 1, 2, 8)) if out else 0):
    # Mostly near the start, where headers are.
    end = len(out) if dice.random() < 0.4 else min(len(out), 200)
    out[dice.randrange(end)] ^= 1 << dice.randrange(8)
  return bytes(out)


def cut(raw: bytes, dice: random.Random) -> bytes:
  """The end is missing, or something in the middle."""
  if len(raw) < 2:
    return b""
  first, last = sorted((dice.randrange(len(raw)), dice.randrange(len(raw))))
  return raw[:first] if dice.random() < 0.5 else raw[:first] + raw[last:]


def doubled(raw: bytes, dice: random.Random) -> bytes:
  """A part is there twice."""
  at = dice.randrange(len(raw) + 1)
  return raw[:at] + raw[dice.randrange(at + 1) :]


def inserted(raw: bytes, dice: random.Random) -> bytes:
  """Something else stands in between."""
  at = dice.randrange(len(raw) + 1)
  more = dice.choice((b"\0", b"\xff", b'"', b"{", b"]", b",", b"\n", b"9" * 50))
  return raw[:at] + more + raw[at:]


def replaced(raw: bytes, dice: random.Random) -> bytes:
  """Something else altogether."""
  texts = (
    "",
    "null",
    "[]",
    "3",
    '"x"',
    "{}",
    "{",
    DEEP,
    "{" * 50_000,
    "\0" * 9,
  )
  codes = [text.encode() for text in texts]
  return dice.choice([*codes, b"\xff\xfe{}", b"\xef\xbb\xbf{}", raw * 2])


def json_changed(raw: bytes, dice: random.Random) -> bytes:
  """A field of a JSON document is another; what is none is flipped."""
  try:
    found = json.loads(raw)
  except (ValueError, RecursionError):
    return flipped(raw, dice)
  text = json.dumps(field_changed(found, dice))
  if dice.random() < 0.03:  # a name that is there twice
    text = text[:1] + '"x": 1, "x": 2, ' + text[1:]
  return text.encode("utf-8", "surrogatepass")


def yaml_changed(raw: bytes, dice: random.Random) -> bytes:
  """A field of a YAML document is another, or it has what only YAML has."""
  odd = (
    "*x", "&x [*x]", "!!int ''", "!!python/name:os.system", "? [a]", "<<: 3",
    "2001-13-01", "1:2:3", ".nan", "- &a [1]\n- *a", "!!binary '='", "%YAML 9",
    "---\n---", "!!set {a}", "0o8", "1e999", "0x_", "!!timestamp x",
  )  # fmt: skip
  if dice.random() < 0.3:
    at = raw.find(b":", dice.randrange(len(raw) or 1)) + 1
    more = dice.choice(odd).encode()
    return raw[:at] + b" " + more + b"\n" + raw[at:]
  try:
    text = yaml.safe_dump(field_changed(yaml.safe_load(raw), dice))
  except Exception:
    return flipped(raw, dice)
  return text.encode("utf-8", "surrogatepass")


def header_changed(raw: bytes, dice: random.Random) -> bytes:
  """The header of a safetensors file is another."""
  size = int.from_bytes(raw[:8], "little")
  if dice.random() < 0.15:
    wrong = dice.choice((0, 1, size - 1, size + 1, 2**30, 2**63, 2**64 - 1))
    return wrong.to_bytes(8, "little", signed=False) + raw[8:]
  if dice.random() < 0.2:
    return flipped(raw, dice)
  try:
    found = json.loads(raw[8 : 8 + size])
    names = [name for name in found if name != "__metadata__"]
    assert all("shape" in found[name] for name in names)
  except (ValueError, TypeError, AssertionError, RecursionError):
    return flipped(raw, dice)
  kind, name = dice.randrange(6), dice.choice(names or [""])
  if kind == 0 and names:
    found[name]["dtype"] = dice.choice(
      ("I8", "F64", "BOOL", "F8_E4M3", "X", "U8")
    )
  elif kind == 1 and names:
    found[name]["shape"] = dice.choice(
      ([], [0], [2**40], [-1], [1] * 70, [2, 3])
    )
  elif kind == 2 and names:
    other = f"{dice.choice(names)}{dice.choice(('', '.weight', 'x' * 300))}"
    found[other] = found.pop(name)
  elif kind == 3 and names:
    shape = found[name]["shape"]
    found[name]["shape"] = dice.choice((shape[::-1], [*shape, 1], shape[:-1]))
  elif kind == 4:
    metadata = found.get("__metadata__")
    if isinstance(metadata, dict):
      found["__metadata__"] = _by_inner_json(metadata, dice)
  else:
    found = field_changed(found, dice)
  text = json.dumps(found).encode("utf-8", "surrogatepass")
  return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def _by_inner_json(metadata: dict[str, Any], dice: random.Random) -> Any:
  """Strings of the metadata that are JSON themselves have another field."""
  return {
    name: json_changed(str(text).encode(), dice).decode("utf-8", "replace")
    for name, text in metadata.items()
  }


def field_changed(found: Any, dice: random.Random) -> Any:
  """Returns a document in which one place has something else."""
  found = json.loads(json.dumps(found))
  places = [((), found)]
  for path, one in places:
    if len(places) < 5000 and isinstance(one, dict | list):
      inner = one.items() if isinstance(one, dict) else enumerate(one)
      places += [((*path, key), x) for key, x in inner]
  path, old = dice.choice(places)
  if not path:
    return dice.choice((_other(old, dice), [found], {"x": found}))
  holder = found
  for key in path[:-1]:
    holder = holder[key]
  last, kind = path[-1], dice.randrange(8)
  if kind == 0:
    holder.pop(last)
  elif kind == 1 and isinstance(holder, dict):
    holder[dice.choice(("", "x", "r", "\ud800"))] = holder.pop(last)
  elif kind == 2:
    holder[last] = dice.choice(([old], {"x": old}, str(old)))
  elif kind == 3:
    holder[last] = json.loads(json.dumps(dice.choice(places)[1]))
  elif kind == 4 and isinstance(holder, list):
    holder.insert(last, _other(old, dice))
  else:
    holder[last] = _other(old, dice)
  return found


def _other(old: Any, dice: random.Random) -> Any:
  """Returns a value that stands for an old one, near it or of another type."""
  if isinstance(old, bool) or dice.random() < 0.7:
    return dice.choice(ODD)
  if isinstance(old, int | float):
    return dice.choice((old + 1, -old, old * 1000, str(old), [old]))
  if isinstance(old, str):
    return dice.choice((old[:-1], old + "x", old.upper(), old * 50, [old]))
  return dice.choice(ODD)


def write(
  files: Files, places: dict[str, str], times: dict[str, int], folder: Path
) -> None:
  """Fills a folder with files, and what stands in the place of some.

  What was in it goes; times, in nanoseconds, are of those that did not change.
  """
  for old in folder.iterdir():
    shutil.rmtree(old) if _is_folder(old) else old.unlink()
  for name, raw in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name not in places:
      path.write_bytes(raw)
      if name in times:
        os.utime(path, ns=(times[name], times[name]))
    elif places[name] == "folder":
      path.mkdir()
    elif places[name] == "pipe":
      os.mkfifo(path)
    elif places[name] == "loop":
      path.symlink_to(path.name)
    elif places[name] == "device":
      path.symlink_to("/dev/zero")


def _is_folder(path: Path) -> bool:
  """Whether a path is a folder itself, and no link to one."""
  return path.is_dir() and not path.is_symlink()


def times_of(folder: Path) -> dict[str, int]:
  """Returns when each file was written last, in nanoseconds."""
  return {name: (folder / name).stat().st_mtime_ns for name in read(folder)}


def read(folder: Path) -> Files:
  """Reads all files of a folder and those inside it."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }
