# SPDX-License-Identifier: Apache-2.0
"""Folders as users have them, whole and broken; slices; writers."""

import concurrent.futures
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.checkpoints.safetensors import (
  TensorSpec,
  stream_safetensors,
  write_safetensors,
)

INDEX = "model.safetensors.index.json"
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int16)


def shards(folder, weight_map=None, files=None):
  """Two shards and an index; `weight_map` may lie about them."""
  for name, tensors in (files or {"1": {"a": A}, "2": {"b": B}}).items():
    write_safetensors(folder / f"{name}.safetensors", tensors)
  if weight_map is None:
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return folder


def check(checkpoint, expected):
  assert checkpoint.keys() == expected.keys()
  assert len(checkpoint) == len(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(checkpoint[name], array)
    assert checkpoint[name].dtype == array.dtype


@pytest.mark.parametrize(
  "name", ["model.safetensors", "adapter_model.safetensors", "x.safetensors"]
)
def test_lone_file_and_its_folder(tmp_path, name):
  write_safetensors(tmp_path / name, {"a": A, "b": B})
  check(open_checkpoint(tmp_path), {"a": A, "b": B})
  check(open_checkpoint(str(tmp_path / name)), {"a": A, "b": B})
  assert open_checkpoint(tmp_path).format == "huggingface"
  assert open_checkpoint(tmp_path / name).format == "safetensors"


def test_sharded_folder_with_strangers(tmp_path):
  shards(tmp_path)
  write_safetensors(tmp_path / "consolidated.safetensors", {"c": A})
  (tmp_path / "pytorch_model.bin").touch()
  (tmp_path / "config.json").write_text("{}")
  checkpoint = open_checkpoint(tmp_path)
  check(checkpoint, {"a": A, "b": B})
  assert checkpoint.spec["b"].file == tmp_path / "2.safetensors"


def test_model_file_wins_over_strangers(tmp_path):
  write_safetensors(tmp_path / "model.safetensors", {"a": A})
  write_safetensors(tmp_path / "other.safetensors", {"b": B})
  check(open_checkpoint(tmp_path), {"a": A})


def test_links_out_of_the_folder_as_in_the_download_cache(tmp_path):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshot").mkdir()
  write_safetensors(tmp_path / "blobs" / "x", {"a": A})
  link = tmp_path / "snapshot" / "1.safetensors"
  link.symlink_to(tmp_path / "blobs" / "x")
  text = json.dumps({"weight_map": {"a": "1.safetensors"}})
  (tmp_path / "snapshot" / INDEX).write_text(text)
  check(open_checkpoint(tmp_path / "snapshot"), {"a": A})


@pytest.mark.parametrize(
  ("weight_map", "words"),
  [
    ({}, "no weight_map"),
    ([], "no weight_map"),
    ({"a": 1}, "'a' lies in 1"),
    ({"a": "1.safetensors", "b": "3.safetensors"}, "'3.safetensors', for b"),
    (
      {"a": "1.safetensors"} | {c: "2.safetensors" for c in "bx"},
      "2.*lacks.*x",
    ),
    ({"a": "1.safetensors"} | {c: "1.safetensors" for c in "b"}, "1.*lacks.*b"),
    ({"a": "1.bin"}, "needs the safetensors file '1.bin'"),
    ({"a": "../1.safetensors"}, "not the name of a file beside"),
    ({"a": "/1.safetensors"}, "not the name of a file beside"),
    ({"a": "..\\1.safetensors"}, "not the name of a file beside"),
    ({"a": "C:1.safetensors"}, "not the name of a file beside"),
    ({"a": ""}, "needs the safetensors file ''"),
    ({"a": ".."}, "needs the safetensors file '..'"),
  ],
)
def test_index_that_lies(tmp_path, weight_map, words):
  folder = tmp_path / "folder"
  folder.mkdir()
  shards(folder, weight_map)
  write_safetensors(tmp_path / "1.safetensors", {"a": A})
  with pytest.raises(ValueError, match=words):
    open_checkpoint(folder)


def test_shard_with_a_tensor_that_the_index_lacks(tmp_path):
  shards(tmp_path, files={"1": {"a": A, "x": A}, "2": {"b": B}})
  with pytest.raises(ValueError, match=r"1\.safetensors holds 1 tensors.*x"):
    open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path):
  shards(tmp_path, files={"1": {"a": A}, "2": {"b": B, "a": A}})
  with pytest.raises(ValueError, match=r"2\.safetensors holds 1 tensors.*a"):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "{}",
    '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}',
  ],
)
def test_damaged_index(tmp_path, text):
  shards(tmp_path)
  (tmp_path / INDEX).write_text(text)
  with pytest.raises(ValueError, match=INDEX):
    open_checkpoint(tmp_path)


def test_two_checkpoints_in_a_folder(tmp_path):
  shards(tmp_path)
  write_safetensors(tmp_path / "model.safetensors", {"a": A})
  with pytest.raises(ValueError, match="two checkpoints"):
    open_checkpoint(tmp_path)


def test_nothing_to_open(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    open_checkpoint(tmp_path / "no")
  with pytest.raises(ValueError, match="neither safetensors"):
    open_checkpoint(tmp_path)
  for name in "ab":
    write_safetensors(tmp_path / f"{name}.safetensors", {"a": A})
  with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
  "name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt"]
)
def test_pickles_are_not_opened(tmp_path, name):
  torch.save({"a": torch.ones(2)}, tmp_path / name)
  for path in (tmp_path, tmp_path / name):
    with pytest.raises(ValueError, match=f"{name}.*Convert first"):
      open_checkpoint(path)


def test_opening_reads_headers_only(tmp_path):
  big = np.zeros((1000, 1000), np.float32)
  path = tmp_path / "x.safetensors"
  write_safetensors(path, {"w": big, "b": B})
  tracemalloc.start()
  checkpoint = open_checkpoint(path)
  spec = checkpoint.spec["w"]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert checkpoint.bytes_read == path.stat().st_size - big.nbytes - B.nbytes
  assert peak < 100_000
  start = checkpoint.bytes_read
  assert spec == TensorSpec(
    (1000, 1000), np.dtype("f4"), big.nbytes, path, start, start + big.nbytes
  )
  assert "w" in checkpoint
  assert "v" not in checkpoint
  with pytest.raises(KeyError):
    checkpoint["v"]
  assert checkpoint.bytes_read == start


def test_rows_read_exactly_their_bytes(tmp_path):
  array = np.arange(600, dtype=np.float32).reshape(20, 30)
  write_safetensors(tmp_path / "x.safetensors", {"w": array})
  checkpoint = open_checkpoint(tmp_path)
  before = checkpoint.bytes_read
  np.testing.assert_array_equal(checkpoint.read("w", np.s_[3:8]), array[3:8])
  assert checkpoint.bytes_read - before == 5 * 120
  np.testing.assert_array_equal(checkpoint.read("w", 7), array[7])
  assert checkpoint.bytes_read - before == 6 * 120


@pytest.mark.parametrize(
  "index",
  [
    (),
    ...,
    2,
    -1,
    np.int64(1),
    np.s_[1:],
    np.s_[::2],
    np.s_[1:3, 2],
    np.s_[..., 1],
    np.s_[1, ..., 1:3],
    np.s_[:, 1:2, ::3],
    np.s_[1, 2, 3],
    np.s_[5:1],
  ],
)
def test_read_is_numpys_basic_indexing(tmp_path, index):
  array = np.arange(60).reshape(3, 4, 5)
  write_safetensors(tmp_path / "x.safetensors", {"w": array})
  read = open_checkpoint(tmp_path).read("w", index)
  np.testing.assert_array_equal(read, array[index])
  assert read.shape == array[index].shape


@pytest.mark.parametrize(
  "index",
  [
    3,
    -4,
    (0, 0, 0, 0),
    (..., ...),
    None,
    [0],
    "a",
    1.0,
    np.s_[::-1],
    np.s_[::0],
  ],
)
def test_index_that_does_not_fit(tmp_path, index):
  write_safetensors(tmp_path / "x.safetensors", {"w": np.zeros((3, 4, 5))})
  with pytest.raises(ValueError, match="'w'"):
    open_checkpoint(tmp_path).read("w", index)


def test_rewritten_file_is_refused(tmp_path):
  path = tmp_path / "x.safetensors"
  write_safetensors(path, {"a": A})
  checkpoint = open_checkpoint(path)
  write_safetensors(path, {"a": A})
  with pytest.raises(ValueError, match=r"'a'.*x\.safetensors changed"):
    checkpoint["a"]


def test_threads_read_and_count_alike(tmp_path):
  array = np.random.default_rng(0).standard_normal((64, 64))
  write_safetensors(tmp_path / "x.safetensors", {"w": array})
  checkpoint = open_checkpoint(tmp_path)
  before = checkpoint.bytes_read
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    rows = list(pool.map(lambda i: checkpoint.read("w", i % 64), range(256)))
  np.testing.assert_array_equal(rows, np.tile(array, (4, 1)))
  assert checkpoint.bytes_read - before == 4 * array.nbytes


def test_float8_comes_multiplied_and_without_its_scale(tmp_path):
  rng = np.random.default_rng(0)
  codes = rng.standard_normal((300, 200)).astype(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(1, 2, (3, 2)).astype(np.float32)
  files = {
    "1": {"l.weight": codes, "l.input_scale": np.float32(3)},
    "2": {"l.weight_scale_inv": scale},
  }
  placed = {name: f"{n}.safetensors" for n, ts in files.items() for name in ts}
  checkpoint = open_checkpoint(shards(tmp_path, placed, files))
  assert checkpoint.companions == {
    "l.weight_scale_inv": "l.weight",
    "l.input_scale": "l.weight",
  }
  assert checkpoint.spec["l.weight"].dtype == codes.dtype
  expected = codes.astype(np.float32)
  expected *= scale.repeat(128, 0)[:300].repeat(128, 1)[:, :200]
  check(checkpoint, {"l.weight": expected})
  for index in (np.s_[100:140], np.s_[120:300:7, 130], -1, np.s_[:, 120:140]):
    read = checkpoint.read("l.weight", index)
    np.testing.assert_array_equal(read, expected[index])


def test_float8_without_scale_is_refused(tmp_path):
  codes, scale = np.ones((2, 2), ml_dtypes.float8_e5m2), np.float32(2)
  tensors = {"l.weight": codes, "k.weight": codes, "k.weight_scale": scale}
  write_safetensors(tmp_path / "x.safetensors", tensors)
  words = "'l.weight' is float8_e5m2 with 0 scales.*bfloat16"
  with pytest.raises(ValueError, match=words):
    open_checkpoint(tmp_path)


def test_read_float32(tmp_path):
  tensors = {"h": np.ones((2, 2), ml_dtypes.bfloat16), "f": A, "i": B}
  write_safetensors(tmp_path / "x.safetensors", tensors)
  checkpoint = open_checkpoint(tmp_path)
  assert checkpoint.read_float32("h", 0).dtype == np.float32
  np.testing.assert_array_equal(checkpoint.read_float32("f", np.s_[1:]), A[1:])
  with pytest.raises(ValueError, match="'i' is int16"):
    checkpoint.read_float32("i")


def test_written_file_is_the_same_each_time_and_official(tmp_path):
  tensors = {"b": B, "a": A, "h": np.ones(3, ml_dtypes.bfloat16)}
  one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
  write_safetensors(one, tensors, {"y": "1", "x": "2"})
  write_safetensors(two, dict(reversed(tensors.items())), {"x": "2", "y": "1"})
  assert one.read_bytes() == two.read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == [one.name, two.name]
  loaded = load_file(one)
  assert loaded["h"].dtype == torch.bfloat16
  np.testing.assert_array_equal(loaded["a"].numpy(), A)
  for spec in open_checkpoint(one).spec.values():
    assert spec.start % spec.dtype.itemsize == 0


@pytest.mark.parametrize(
  ("tensors", "metadata", "words"),
  [
    ({"a": np.ones(2, complex)}, None, "'a' is complex128"),
    ({"a": np.ones(2, ">f4")}, None, "'a' is >f4"),
    ({"a": np.array(["x"])}, None, "'a' is <U1"),
    ({"__metadata__": A}, None, "cannot name a tensor"),
    ({1: A}, None, "1 cannot name a tensor"),
    ({"\ud800": A}, None, "not valid Unicode"),
    ({"a": A}, {"x": 1}, "strings to strings"),
  ],
)
def test_what_cannot_be_written_leaves_nothing(
  tmp_path, tensors, metadata, words
):
  with pytest.raises(ValueError, match=words):
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
  assert not list(tmp_path.iterdir())


def test_streamed_copy_of_a_checkpoint(tmp_path):
  write_safetensors(tmp_path / "1.safetensors", {"a": A, "b": B})
  source = open_checkpoint(tmp_path / "1.safetensors")
  pairs = ((name, source[name]) for name in reversed(list(source)))
  stream_safetensors(tmp_path / "2.safetensors", source.spec, pairs)
  one, two = (tmp_path / f"{i}.safetensors" for i in (1, 2))
  assert one.read_bytes() == two.read_bytes()


def test_streaming_holds_one_array(tmp_path):
  spec = {f"w{i}": ((256, 256), np.float32) for i in range(16)}
  arrays = ((name, np.ones((256, 256), np.float32)) for name in spec)
  tracemalloc.start()
  stream_checkpoint(tmp_path, spec, arrays, max_shard_bytes=2**20)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 3 * 2**18  # of 16 * 2**18 written
  assert len(open_checkpoint(tmp_path)) == 16


def test_sharded_checkpoint_is_what_transformers_writes(tmp_path):
  tensors = {
    "huge": np.ones(9, np.float32),
    "a": np.ones(2, np.float32),
    "b": np.ones(2, np.float32),
    "c": np.ones(1, np.float32),
  }
  spec = {name: (array.shape, array.dtype) for name, array in tensors.items()}
  pairs = reversed(tensors.items())
  stream_checkpoint(tmp_path / "out", spec, pairs, max_shard_bytes=12)
  index = json.loads((tmp_path / "out" / INDEX).read_text())
  assert index["metadata"]["total_size"] == 56
  assert index["weight_map"] == {
    "huge": "model-00001-of-00003.safetensors",
    "a": "model-00002-of-00003.safetensors",
    "b": "model-00003-of-00003.safetensors",
    "c": "model-00003-of-00003.safetensors",
  }
  checkpoint = open_checkpoint(tmp_path / "out")
  check(checkpoint, tensors)
  assert checkpoint.metadata == {"format": "pt"}
  for name in set(index["weight_map"].values()):
    safetensors.numpy.load_file(tmp_path / "out" / name)


def test_small_checkpoint_is_one_file(tmp_path):
  spec = {"a": (A.shape, A.dtype)}
  stream_checkpoint(tmp_path, spec, [("a", A)], metadata={"k": "v"})
  assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
  assert open_checkpoint(tmp_path).metadata == {"k": "v"}


def test_failed_checkpoint_leaves_nothing(tmp_path):
  spec = {name: ((4,), np.float32) for name in "abcd"}
  arrays = [("c", np.ones(4, np.float32))]
  with pytest.raises(ValueError, match="3 of 4.*never came: a, b, d"):
    stream_checkpoint(tmp_path, spec, arrays, max_shard_bytes=16)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="positive"):
    stream_checkpoint(tmp_path, spec, arrays, max_shard_bytes=0)


def test_no_checkpoint_is_written_over_another(tmp_path):
  shards(tmp_path)
  with pytest.raises(ValueError, match="holds a checkpoint"):
    stream_checkpoint(tmp_path, {"a": (A.shape, A.dtype)}, [("a", A)])
  check(open_checkpoint(tmp_path), {"a": A, "b": B})
