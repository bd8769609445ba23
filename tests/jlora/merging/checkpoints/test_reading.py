# SPDX-License-Identifier: Apache-2.0
"""Inputs of merges: which are read in pieces, cut without gaps, memory lent."""

import concurrent.futures
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.checkpoints.planning import InputTensor, Job
from jlora.merging.checkpoints.reading import (
  Rooms,
  find_stored,
  open_input,
  pieces_of,
)
from jlora.pairing.pairs import Stack, TensorPart


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 30))
def test_pieces_are_contiguous_and_cover(shape, limit):
  array = np.arange(math.prod(shape)).reshape(shape)
  parts = [array[piece.index].ravel() for piece in pieces_of(shape, limit)]
  assert [len(part) for part in parts] == [
    piece.size for piece in pieces_of(shape, limit)
  ]
  assert max(map(len, parts)) <= limit
  np.testing.assert_array_equal(np.concatenate(parts), array.ravel())


@pytest.fixture
def models(tmp_path):
  """A file, the same in orbax, in float8, and with an adapter; name -> open."""
  w = np.arange(12, dtype=np.float32).reshape(4, 3)
  write_safetensors(tmp_path / "w.safetensors", {"q.weight": w})
  codes = w.astype(ml_dtypes.float8_e4m3fn)
  scaled = {"q.weight": codes, "q.weight_scale": np.float32([1])}
  write_safetensors(tmp_path / "f8.safetensors", scaled)
  save_orbax(tmp_path / "orbax", {"q.weight": w})
  base = open_checkpoint(tmp_path / "w.safetensors")
  lora = jlora.Lora(np.ones((1, 3), "f4"), np.ones((1, 4), "f4"), np.float32(1))
  jlora.save_peft(tmp_path / "lora", {"q.weight": lora}, like=base.spec)
  return {
    "file": base,
    "orbax": open_checkpoint(tmp_path / "orbax"),
    "float8": open_checkpoint(tmp_path / "f8.safetensors"),
    "adapted": jlora.formats.adapted.AdaptedCheckpoint(base, tmp_path / "lora"),
  }


def job_of(shape=(4, 3)):
  return Job("q.weight", shape, np.dtype(np.float32), (), None, None)


def test_only_whole_tensors_of_files_are_read_in_pieces(models):
  whole = TensorPart("q.weight")
  assert find_stored(models, job_of(), InputTensor("file", whole)) is not None
  rest = [InputTensor(name, whole) for name in ("orbax", "float8", "adapted")]
  rest += [
    InputTensor("file", whole._replace(swap=True)),
    InputTensor("file", whole._replace(index=(slice(0, 4),))),
    InputTensor("file", Stack(((whole,),))),
  ]
  w = models["file"]["q.weight"]
  expected = [w, w, w + 1, w.T, w, w[None]]
  for source, array in zip(rest, expected, strict=True):
    assert find_stored(models, job_of(), source) is None
    found = open_input(models, job_of(array.shape), source)
    np.testing.assert_array_equal(found, array)


def test_rows_that_a_source_lacks_are_the_references(models):
  few = InputTensor("file", TensorPart("q.weight", (slice(0, 2),)))
  assert find_stored(models, job_of(), few) is None
  found = open_input(models, job_of(), few)
  np.testing.assert_array_equal(found, models["file"]["q.weight"])


@pytest.mark.parametrize(
  ("kinds", "kind"),
  [
    (("float16", "float16"), "float16"),
    (("bfloat16", "float32"), "float32"),
    (("float64", "float64"), "float32"),
  ],
)
def test_stacks_are_exact_and_aligned(kinds, kind):
  arrays = [np.arange(6).reshape(2, 3).astype(one) for one in kinds]
  with Rooms().stacked(arrays) as stack:
    assert stack.dtype == np.dtype(kind)
    assert stack.ctypes.data % 64 == 0
    np.testing.assert_array_equal(stack, np.stack(arrays).astype(kind))


def test_a_piece_is_followed_by_zeros():
  rooms, array = Rooms(), np.arange(1, 7, dtype=np.float32).reshape(3, 2)
  with rooms.stacked([np.full(8, 9, np.float32)]):
    pass  # what was there before must not show
  (first, last) = pieces_of(array.shape, 4)
  with rooms.stacked([array], last, (2, 4)) as stack:
    assert stack.tolist() == [[[5, 6, 0, 0], [0, 0, 0, 0]]]
  with rooms.stacked([array], first, (1, 4)) as stack:
    assert stack.tolist() == [[[1, 2, 3, 4]]]


def test_scalars_and_empty_arrays_are_stacked():
  with Rooms().stacked([np.float32(2), np.float32(3)]) as stack:
    assert stack.tolist() == [2, 3]
  with Rooms().stacked([np.zeros((0, 3), "f4")]) as stack:
    assert stack.shape == (1, 0, 3)


def test_rooms_are_used_again_but_never_shared():
  rooms = Rooms()
  with rooms.stacked([np.ones(4, "f4")]) as one:
    first = one.ctypes.data
    with rooms.stacked([np.zeros(4, "f4")]) as two:
      assert two.ctypes.data != first
      assert one.sum() == 4
  with rooms.stacked([np.ones(2, "f4")]) as three:
    assert three.ctypes.data in (first, two.ctypes.data)

  def hold(value):
    with rooms.stacked([np.full(1000, value)]) as stack:
      return all((stack == value).all() for _ in range(20))

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(hold, range(200)))
