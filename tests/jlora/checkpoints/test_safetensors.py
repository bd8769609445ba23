# SPDX-License-Identifier: Apache-2.0
"""The official library is the oracle: what it refuses is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import (
  DTYPES,
  lay_out_file,
  read_header,
  write_safetensors,
)

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def save(path, header, data=b"abcd", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(length.to_bytes(8, "little") + text + data)
  return path


def entry(**changes):
  return {"a": ENTRY | changes}


BROKEN = {
  "empty": (b"", None),
  "array": (b"[]", None),
  "not JSON": (b"{", None),
  "not UTF-8": (b'{"\xff": 1}', None),
  "lone surrogate": (json.dumps({"\ud800": ENTRY}).encode(), None),
  "nested deeply": (b'{"a":' + b"[" * 200_000, None),
  "huge number": (b'{"a":' + b"9" * 5000 + b"}", None),
  "header beyond the file": ({}, 2**40),
  "header length overflows": ({}, 2**64 - 1),
  "entry lacks dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, None),
  "unknown dtype": (entry(dtype="F4"), None),
  "dtype is a list": (entry(dtype=[]), None),
  "shape is a string": (entry(shape="1"), None),
  "shape is nested": (entry(shape=[[1]]), None),
  "shape is a float": (entry(shape=[1.0]), None),
  "shape is a boolean": (entry(shape=[True]), None),
  "shape is negative": (entry(shape=[-1]), None),
  "shape is minus zero": (
    json.dumps({"a": ENTRY, "b": ENTRY | {"shape": [0]}})
    .encode()
    .replace(
      b'"shape": [0], "data_offsets": [0, 4]',
      b'"shape": [-0], "data_offsets": [4, 4]',
    ),
    None,
  ),
  "shape is too small": (entry(shape=[2]), None),
  "shape wraps at 64 bits": (entry(shape=[2**62 + 1]), None),
  "shape is empty but huge": (
    {"a": ENTRY, "b": ENTRY | {"shape": [0, 2**62], "data_offsets": [4, 4]}},
    None,
  ),
  "too many axes": (entry(shape=[1] * 65), None),
  "offsets reversed": (entry(data_offsets=[4, 0]), None),
  "one offset": (entry(data_offsets=[4]), None),
  "offsets are floats": (entry(data_offsets=[0, 4.0]), None),
  "beyond the file": (entry(shape=[2], data_offsets=[0, 8]), None),
  "hole in front": (entry(shape=[0], data_offsets=[4, 4]), None),
  "overlap": ({"a": ENTRY, "b": ENTRY}, None),
  "trailing bytes": ({}, None),
  "metadata not strings": ({"a": ENTRY, "__metadata__": {"x": 1}}, None),
  "metadata is a list": ({"a": ENTRY, "__metadata__": []}, None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_header_is_a_value_error_naming_the_file(tmp_path, case):
  header, length = BROKEN[case]
  path = save(tmp_path / "x.safetensors", header, length=length)
  with pytest.raises(ValueError, match=r"x\.safetensors"):
    open_checkpoint(path)


@pytest.mark.parametrize(
  ("length", "words"),
  [(33, "invalid header length"), (2**26, "invalid"), (2**63, "too large")],
)
def test_a_lying_header_length(tmp_path, length, words):
  path = save(tmp_path / "x.safetensors", b"{}", bytes(30), length)
  with pytest.raises(ValueError, match=f"x.safetensors .*{words}"):
    read_header(path)


@pytest.mark.parametrize("size", range(8))
def test_shorter_than_eight_bytes(tmp_path, size):
  path = tmp_path / "x.safetensors"
  path.write_bytes(bytes(size))
  with pytest.raises(ValueError, match="too small; download or save it again"):
    read_header(path)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"dtype": "F8_E8M0", "shape": [4]}, "dtype 'F8_E8M0'"),
    ({"shape": [1] * 65}, r"no array can have the shape \(1, 1"),
  ],
)
def test_what_numpy_cannot_hold_names_the_tensor(tmp_path, change, words):
  path = save(tmp_path / "x.safetensors", entry(**change))
  with pytest.raises(ValueError, match=f"x.safetensors: tensor 'a'.*{words}"):
    read_header(path)


def test_accepts_what_the_official_reader_accepts(tmp_path):
  header = {
    "__metadata__": None,
    "a": ENTRY,
    "none": ENTRY | {"shape": [0, 3], "data_offsets": [4, 4], "more": 1},
    "list": ["F32", [0], [4, 4]],
    "": ENTRY | {"shape": [], "data_offsets": [4, 8]},
  }
  text = b"  " + json.dumps(header).encode() + b"   "
  path = save(tmp_path / "x.safetensors", text, b"abcdefgh")
  expected = safetensors.numpy.load_file(path)
  checkpoint = open_checkpoint(path)
  assert checkpoint.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(checkpoint[name], array)
    assert checkpoint[name].shape == array.shape


def test_header_is_read_and_nothing_else(tmp_path):
  path = tmp_path / "x.safetensors"
  tensors = {"w": np.zeros((100, 100), np.float32), "b": np.zeros(7, np.int8)}
  write_safetensors(path, tensors, {"k": "v"})
  header = read_header(path)
  assert header.nbytes == path.stat().st_size - 40_007
  assert header.metadata == {"k": "v"}
  assert header.spec["w"].start == header.nbytes  # widest first
  assert header.spec["b"].end == path.stat().st_size


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_agrees_with_torch(tmp_path, code):
  dtype = DTYPES[code]
  data = np.random.default_rng(0).integers(0, 2, (3, 4)).astype(dtype)
  if code.startswith("F8"):
    data = np.arange(256, dtype=np.uint8).view(dtype)  # every code, NaN too
  path = tmp_path / "x.safetensors"
  extra = {"x_scale": np.float32(1)} if code.startswith("F8") else {}
  write_safetensors(path, {"x": data} | extra)
  tensor = safetensors.torch.load_file(path)["x"]
  read = open_checkpoint(path)["x"]
  if code.startswith("F8"):
    np.testing.assert_array_equal(read, tensor.float().numpy())
  else:
    assert read.dtype == dtype
    assert (
      read.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    )


def test_official_files_read_back(tmp_path):
  path = tmp_path / "x.safetensors"
  tensors = {
    "h": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "s": torch.tensor(2.5),
    "e": torch.zeros(0, 4, dtype=torch.int16),
    "ünï/code": torch.tensor([True, False]),
  }
  safetensors.torch.save_file(tensors, path, {"format": "pt"})
  checkpoint = open_checkpoint(path)
  assert checkpoint["h"].dtype == ml_dtypes.bfloat16
  assert checkpoint.metadata == {"format": "pt"}
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(
      checkpoint[name].astype(np.float64), tensor.double().numpy()
    )


def test_laid_out_like_the_official_writer():
  tensors = {"b": np.ones(2, np.float64), "a": np.ones(3, np.float64)}
  head, _ = lay_out_file(
    "x", {k: (v.shape, v.dtype) for k, v in tensors.items()}
  )
  assert safetensors.numpy.save(tensors).startswith(head)


def base_file():
  tensors = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.int16),
    "c": np.zeros((0, 5), np.float16),
    "d": np.array(7, np.uint8),
  }
  return safetensors.numpy.save(tensors, {"k": "v"})


def check_against_official(path):
  """Either a ValueError, or the same arrays as the official library's."""
  try:
    arrays = dict(open_checkpoint(path))
  except ValueError:
    return
  expected = dict(safetensors.deserialize(path.read_bytes()))
  assert arrays.keys() == expected.keys()
  for name, array in arrays.items():
    assert list(array.shape) == expected[name]["shape"]
    assert array.tobytes() == bytes(expected[name]["data"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(scratch, data):
  scratch.write_bytes(data)
  check_against_official(scratch)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files(scratch, data):
  content = bytearray(base_file())
  header = 8 + int.from_bytes(content[:8], "little")
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, header - 1))
    content[at] = data.draw(
      st.sampled_from(b'0123456789-,:[]{}" \\.eFIU') | st.integers(0, 255)
    )
  cut = data.draw(st.just(0) | st.integers(0, len(content)))
  scratch.write_bytes(bytes(content[: len(content) - cut]))
  check_against_official(scratch)


NUMBERS = st.integers(0, 30) | st.sampled_from([-1, 2**31, 2**63, 2**64, 2**70])


@settings(max_examples=200, deadline=None)
@given(
  shape=st.lists(NUMBERS, max_size=3),
  offsets=st.lists(NUMBERS, min_size=1, max_size=3),
  code=st.sampled_from(["F32", "I16", "U8", "BOOL", "C64", "F6", "F8_E8M0"]),
)
def test_edited_numbers(scratch, shape, offsets, code):
  content = base_file()
  length = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + length])
  header["b"] = {"dtype": code, "shape": shape, "data_offsets": offsets}
  save(scratch, header, content[8 + length :])
  check_against_official(scratch)


@pytest.mark.parametrize("kept", ["none", "all", "some"])
def test_truncation_is_refused(tmp_path, kept):
  content = base_file()
  sizes = {"none": 0, "all": len(content), "some": len(content) - 1}
  path = tmp_path / "x.safetensors"
  path.write_bytes(content[: sizes[kept]])
  if kept == "all":
    assert len(open_checkpoint(path)) == 4
  else:
    with pytest.raises(ValueError, match=r"x\.safetensors"):
      open_checkpoint(path)


@pytest.mark.parametrize("name", ["x" * 4097, "a/" * 65 + "w"])
def test_names_that_no_model_has_are_refused(tmp_path, name):
  """Whoever looks at names does so with regexes, prefix by prefix."""
  path = tmp_path / "x.safetensors"
  write_safetensors(path, {name: np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=r"x\.safetensors: a tensor's name has"):
    open_checkpoint(path)
  write_safetensors(path, {name[2:]: np.ones(2, np.float32)})
  assert len(open_checkpoint(path)) == 1
