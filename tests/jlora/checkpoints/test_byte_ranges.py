# SPDX-License-Identifier: Apache-2.0
"""Regions equal NumPy's, cost the bytes they should, and survive threads."""

import collections
import concurrent.futures
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.checkpoints import byte_ranges
from jlora.checkpoints.byte_ranges import place_arrays, read_region, stamp_of

Slot = collections.namedtuple("Slot", "shape dtype start")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("ranges")


def ranges(n):
  """Any range with positive step inside range(n), empty ones too."""
  return st.builds(
    lambda start, stop, step: range(n)[start:stop:step],
    st.integers(0, n),
    st.integers(0, n),
    st.integers(1, 3),
  )


@settings(max_examples=200, deadline=None)
@given(data=st.data(), chunk=st.sampled_from([1, 8, 64, 2**22]))
def test_any_region_is_numpys(folder, data, chunk):
  shape = data.draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
  region = tuple(data.draw(ranges(n)) for n in shape)
  array = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
  path = folder / "any"
  path.write_bytes(b"xyz" + array.tobytes())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(byte_ranges, "_CHUNK_BYTES", chunk)
    read, count = read_region(path, Slot(shape, array.dtype, 3), region)
  expected = array[np.ix_(*region)] if shape else array
  np.testing.assert_array_equal(read, expected)
  assert read.shape == expected.shape
  assert count <= array.nbytes


@pytest.mark.parametrize(
  ("region", "count"),
  [
    ((range(8), range(6), range(10)), 8 * 240),
    ((range(2, 5), range(6), range(10)), 3 * 240),
    ((range(3, 4), range(1, 3), range(10)), 2 * 40),
    ((range(3, 4), range(2, 3), range(4, 7)), 12),
    ((range(0), range(6), range(10)), 0),
    ((range(2, 5), range(1), range(10)), 3 * 240),
  ],
)
def test_leading_ranges_read_exactly_their_bytes(folder, region, count):
  array = np.arange(480, dtype=np.float32).reshape(8, 6, 10)
  path = folder / "exact"
  array.tofile(path)
  read, counted = read_region(path, Slot(array.shape, array.dtype, 0), region)
  np.testing.assert_array_equal(read, array[np.ix_(*region)])
  assert counted == count


def test_threads_share_no_position(folder):
  array = np.random.default_rng(0).standard_normal((64, 1000))
  path = folder / "threads"
  array.tofile(path)
  slot = Slot(array.shape, array.dtype, 0)

  def row(i):
    return read_region(path, slot, (range(i, i + 1), range(1000)))[0][0]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    np.testing.assert_array_equal(list(pool.map(row, range(64))), array)


def test_changed_or_shortened_file_is_refused(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(bytes(8))
  slot, stamp = Slot((8,), np.dtype("u1"), 0), stamp_of(path)
  read_region(path, slot, (range(8),), stamp)
  path.write_bytes(bytes(7))
  with pytest.raises(ValueError, match="changed since"):
    read_region(path, slot, (range(8),), stamp)
  with pytest.raises(ValueError, match="ends at byte 7"):
    read_region(path, slot, (range(8),))
  path.unlink()
  with pytest.raises(ValueError, match="no such file"):
    read_region(path, slot, (range(8),), stamp)


def test_places_in_any_order_even_strided(tmp_path):
  a, b = np.arange(6, dtype="i4").reshape(2, 3).T, np.array(2.5)
  files = {
    tmp_path / "1": (b"head", {"a": Slot((3, 2), a.dtype, 4)}),
    tmp_path / "2": (b"", {"b": Slot((), b.dtype, 0)}),
  }
  place_arrays(files, iter([("b", b), ("a", a)]))
  assert (tmp_path / "1").read_bytes() == b"head" + a.tobytes()
  assert (tmp_path / "2").read_bytes() == b.tobytes()
  assert len(list(tmp_path.iterdir())) == 2


def test_an_array_may_come_in_parts(tmp_path):
  a = np.arange(12, dtype="i4").reshape(4, 3)
  slots = {"a": Slot(a.shape, a.dtype, 2), "b": Slot((0, 3), a.dtype, 50)}
  parts = iter([a[:1], a[1, :2], a[1, 2:], a[2:].ravel()])
  place_arrays(
    {tmp_path / "x": (b"..", slots)}, [("a", parts), ("b", iter([]))]
  )
  assert (tmp_path / "x").read_bytes() == b".." + a.tobytes()


def failing():
  yield "a", np.zeros(2, "f4")
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  ("arrays", "error", "words"),
  [
    ([], ValueError, "3 of 3.*never came: a, b, c"),
    ([("a", np.zeros(2, "f4"))], ValueError, "2 of 3.*: b, c"),
    ([("a", np.zeros(2, "f4"))] * 2, ValueError, "'a' given twice"),
    ([("x", np.zeros(2, "f4"))], ValueError, "'x' was not announced"),
    ([("a", np.zeros(3, "f4"))], ValueError, r"'a'.*\(2,\).*\(3,\) came"),
    ([("a", np.zeros(2, "f8"))], ValueError, "'a'.*float32.*float64"),
    ([("a", iter([np.zeros(1, "f4")]))], ValueError, "ended after 1 of 2"),
    (
      [("a", iter([np.zeros(1, "f4")] * 3))],
      ValueError,
      "came after 2 entries",
    ),
    ([("a", iter([np.zeros(2, "f8")]))], ValueError, "'a'.*float32.*float64"),
    (failing(), KeyboardInterrupt, None),
  ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, arrays, error, words):
  path = tmp_path / "x"
  path.write_bytes(b"old")
  slots = {
    name: Slot((2,), np.dtype("f4"), 8 * i) for i, name in enumerate("abc")
  }
  with pytest.raises(error, match=words):
    place_arrays({path: (b"", slots)}, arrays)
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_folder_must_exist(tmp_path):
  with pytest.raises(ValueError, match="not a folder"):
    place_arrays({tmp_path / "no" / "x": (b"", {})}, [])
