# SPDX-License-Identifier: Apache-2.0
"""Pairs compared on disk: by rows, in parts, and what cannot be compared."""

import jax
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.pairing.comparison import check_finite, is_same
from jlora.pairing.pairs import Pair, Stack, TensorPart


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("changed", [None, 0, 6])
def test_unchanged_tensors_are_found_by_rows(
  tmp_path, monkeypatch, rows, changed
):
  monkeypatch.setattr("jlora.pairing.comparison._COMPARED", rows * 5 * 4)
  left = np.full((7, 5), np.nan, np.float32)
  right = left.copy()
  if changed is not None:
    right[changed, 4] = 1
  checkpoints = []
  for name, w in (("base", left), ("ft", right)):
    write_safetensors(tmp_path / f"{name}.safetensors", {"w": w})
    checkpoints.append(open_checkpoint(tmp_path / f"{name}.safetensors"))
  pair = Pair("w", (7, 5), TensorPart("w"), TensorPart("w"))
  assert is_same(pair, *checkpoints) == (changed is None)
  for parts in (2, 3, 9):
    before = [checkpoint.bytes_read for checkpoint in checkpoints]
    found = [
      is_same(pair, *checkpoints, (part, parts)) for part in range(parts)
    ]
    assert all(found) == (changed is None)
    assert found.count(False) == (changed is not None)
    read = [
      checkpoint.bytes_read - count
      for checkpoint, count in zip(checkpoints, before, strict=True)
    ]
    if changed is None:
      assert read == [left.nbytes, left.nbytes]  # all rows, each once


def test_only_whole_tensors_of_one_dtype_and_shape_can_be_the_same():
  w = np.ones((4, 4), np.float32)
  sides = {"w": w}, {"w": w, "h": w.astype(np.float16), "s": w[:2]}
  plain = Pair("w", (4, 4), TensorPart("w"), TensorPart("w"))
  assert is_same(plain, *sides)
  for other in (
    TensorPart("h"), TensorPart("s"), TensorPart("w", swap=True),
    TensorPart("w", (slice(0, 4),)),
    Stack(((TensorPart("w"),),)),
  ):  # fmt: skip
    assert not is_same(plain._replace(finetuned=other), *sides)


def test_values_that_are_no_numbers_are_counted_wherever_they_lie():
  bad = np.ones((4, 4), np.float16)
  bad[1, 2] = np.inf
  good = np.ones((4, 4), np.float32)
  for wrap in (np.asarray, jax.numpy.asarray):
    check_finite("w", wrap(good), wrap(good))
    with pytest.raises(ValueError, match="w: 1 of 16 values of the finetuned"):
      check_finite("w", wrap(good), wrap(bad))
    with pytest.raises(ValueError, match="1 of 16 values of the base"):
      check_finite("w", wrap(bad), wrap(good))
