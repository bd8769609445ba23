# SPDX-License-Identifier: Apache-2.0
"""Documents of other people: whatever is wrong is told, soon, with the file."""

import json
import os
import time

import numpy as np
import pytest

import jlora
from jlora.checkpoints import documents
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.documents import (
  COUNT,
  NUMBER,
  SIZE,
  TEXT,
  check_fields,
  list_of,
  read_config,
  read_json,
  read_object,
  read_text,
)
from jlora.checkpoints.safetensors import write_safetensors
from jlora.checkpoints.yaml_documents import read_yaml


@pytest.fixture(autouse=True)
def _soon():
  """Nothing here takes long, whatever is in the file."""
  started = time.monotonic()
  yield
  assert time.monotonic() - started < 10  # about one; machines may be busy


def make(path, what):
  {
    "pipe": lambda: os.mkfifo(path),
    "folder": path.mkdir,
    "device": lambda: path.symlink_to("/dev/zero"),
    "loop": lambda: path.symlink_to(path.name),
    "nothing": lambda: None,
  }[what]()


@pytest.mark.parametrize(
  ("what", "said"),
  [
    ("pipe", "is no regular file"),
    ("folder", "is no regular file"),
    ("device", "is no regular file"),
    ("loop", "Too many levels"),
    ("nothing", "No such file"),
  ],
)
def test_only_regular_files_are_read(what, said, tmp_path):
  path = tmp_path / "x.json"
  make(path, what)
  for read in (read_text, read_json, read_object, read_config, read_yaml):
    with pytest.raises(ValueError, match=f"x.json.*{said}"):
      read(path)


@pytest.mark.parametrize(
  ("raw", "said"),
  [
    (b"\xff{}", "is not UTF-8"),
    (b"{", "is no JSON"),
    (b"[" * 100_000, "more than 64 levels"),
    (b"[" * 900 + b"]" * 900, "more than 64 levels"),
    (b'{"a":' * 70 + b"1" + b"}" * 70, "more than 64 levels"),
    (b"[" + b"[]," * 2**21 + b"[]]", "brackets; is it another file"),
    (b"9" * 5000, "is no JSON"),
  ],
)
def test_what_is_no_json_or_too_deep_is_told(raw, said, tmp_path):
  path = tmp_path / "x.json"
  path.write_bytes(raw)
  with pytest.raises(ValueError, match=f"x.json.*{said}"):
    read_json(path)


def test_what_people_write_is_read(tmp_path):
  path = tmp_path / "x.json"
  deep = "[" * 60 + "]" * 60
  for text in (deep, '{"a": "[[[["}', "\ufeff[1]", json.dumps(["["] * 1000)):
    path.write_text(text)
    assert read_json(path) == json.loads(text.lstrip("\ufeff"))
  with pytest.raises(ValueError, match="more than 4 bytes"):
    read_text(path, 4)


def test_a_name_twice_is_an_error_where_it_matters(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"a": 1, "b": 2, "a": 3}')
  assert read_json(path) == {"a": 3, "b": 2}
  with pytest.raises(ValueError, match="x.json is no JSON: 'a' is given twice"):
    read_json(path, is_unique=True)


def test_fields_are_named_with_what_they_hold():
  fields = {"r": COUNT, "names": list_of(TEXT), "alpha": NUMBER, "n": SIZE}
  good = {
    "r": np.int64(2),
    "names": [],
    "alpha": np.float32(1),
    "n": 0,
    "x": [],
  }
  assert check_fields(good, fields, "p") is good
  wrong = {"r": True, "names": ["a", 1], "alpha": float("nan"), "n": -1}
  with pytest.raises(ValueError, match="p: r is True, needed .*; mend") as told:
    check_fields(wrong, fields, "p", required=["z"])
  assert "alpha is nan, needed is a finite number of float32 and 2 more" in str(
    told.value
  )
  with pytest.raises(ValueError, match="p: z is missing"):
    check_fields({}, fields, "p", required=["z"])
  for found in (None, [], 3, "x" * 10**6):
    with pytest.raises(ValueError, match="p holds no object but") as told:
      check_fields(found, fields, "p")
    assert len(str(told.value)) < 200
  for value in (10**400, -(10**400), float("inf"), 1e39, "1", False, None):
    assert not NUMBER.fits(value)
    assert not documents.REAL.fits(value) or value == 1e39


@pytest.mark.parametrize(
  ("config", "said"),
  [
    ({"model_type": ["llama"]}, r"config.json: model_type is \['llama'\]"),
    (
      {"text_config": {"model_type": 3}},
      "config.json: text_config: model_type",
    ),
    ({"a": {"b": {"architectures": "X"}}}, "config.json: a: b: architectures"),
    ({"text_config": [1]}, "text_config is"),
    ({"_name_or_path": 3}, "_name_or_path is 3"),
    ([], "holds no object"),
  ],
)
def test_a_config_is_checked_in_its_parts_too(config, said, tmp_path):
  write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(2, "f4")})
  checkpoint = open_checkpoint(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=said):
    checkpoint.config  # noqa: B018
  with pytest.raises(ValueError, match=said):
    jlora.models.load(tmp_path)


def test_null_stands_for_nothing_in_a_config(tmp_path):
  text = '{"text_config": null, "model_type": null, "architectures": null}'
  (tmp_path / "config.json").write_text(text)
  assert read_config(tmp_path / "config.json")["text_config"] is None


LETTERS = "abcdefghi"
NESTED = "&a [x,x,x,x,x,x,x,x,x]" + "".join(
  f", &{own} [{','.join([f'*{last}'] * 9)}]"
  for last, own in zip(LETTERS, LETTERS[1:], strict=False)
)


CHAIN = "- &a0 [1]\n" + "".join(f"- &a{i + 1} [*a{i}]\n" for i in range(99))


@pytest.mark.parametrize(
  ("text", "said"),
  [
    (f"[{NESTED}]", "what aliases stand for included"),
    ("&a {x: *a}", "inside what it stands for"),
    ("[" * 20_000, "64 levels"),
    ("- " * 5000, "64 levels"),
    ("[" + "1," * 100_000 + "]", "20,000 values"),
    (f"- &a {'x' * 9999}\n" + "- *a\n" * 9999, "20,000 values"),
    (CHAIN, "64 levels"),
    ("x" * 2**19, "more than 262,144 bytes"),
    ("a: [", "cannot be read"),
    ("!!int ''", "cannot be read"),
    ("!!timestamp x", "cannot be read"),
    ("!!python/name:os.system", "cannot be read"),
    ("? {a: [1]}\n: 2", "cannot be read"),
    ("a: 1\nb: {c: 1, d: 2, c: 3}", "'c' is given twice .* line 2"),
    ("1: 1\n1: 2", "'1' is given twice"),
  ],
)
def test_yaml_that_never_ends_ends(text, said, tmp_path):
  path = tmp_path / "x.yml"
  path.write_text(text)
  with pytest.raises(ValueError, match=f"(?s)x.yml .*{said}"):
    read_yaml(path)


def test_aliases_and_documents_are_read(tmp_path):
  path = tmp_path / "x.yml"
  path.write_text("a: &x [1, .5]\nb: *x\n---\nc: {<<: {d: 1, e: 2}, e: 3}\n")
  one = {"a": [1, 0.5], "b": [1, 0.5]}
  assert read_yaml(path) == [one, {"c": {"d": 1, "e": 3}}]
  path.write_text("")
  assert read_yaml(path) == []
