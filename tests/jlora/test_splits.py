# SPDX-License-Identifier: Apache-2.0
"""Tensors cut over devices: how, which, and what is read for them."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_pairs import write_pair

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.meshes import place
from jlora.pairing import common_rows, keep_whole
from jlora.pairs import Part, read_region
from jlora.paths import matching
from jlora.plans import plan_run
from jlora.splits import can_be_split, cut, share_out

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(shapes.map(tuple), st.integers(1, 16))
def test_a_cut_is_into_as_many_equal_parts_as_there_can_be(shape, devices):
  axis, parts = cut(shape, devices)
  assert 1 <= parts <= devices
  assert shape[axis] % parts == 0
  assert not any(
    size % more == 0 for size in shape for more in range(parts + 1, devices + 1)
  )
  assert all(size % parts for size in shape[:axis])


@pytest.mark.parametrize(
  ("shape", "devices", "axis", "parts"),
  [
    ((64, 48), 4, 0, 4),
    ((27, 64), 4, 1, 4),
    ((128256, 8192), 256, 0, 256),  # Llama 3: 256 * 501 rows
    ((6, 9), 4, 0, 3),
    ((5, 7), 4, 0, 1),
    ((), 4, 0, 1),
    ((0, 4), 4, 1, 4),
  ],
)
def test_cuts(shape, devices, axis, parts):
  assert cut(shape, devices) == (axis, parts)


def test_a_tensor_that_nothing_divides_is_not_spread():
  assert share_out((11, 13)) is None
  assert share_out((16, 3)).spec == jax.sharding.PartitionSpec("shards")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(16, 6), (7, 16), (6, 7), (8, 3, 5)])
def test_shards_are_the_tensor_and_leading_ones_are_read_alone(
  tmp_path, shape, dtype
):
  w = np.random.default_rng(0).normal(size=shape).astype(dtype)
  write_safetensors(tmp_path / "w.safetensors", {"w": w})
  checkpoint = open_checkpoint(tmp_path / "w.safetensors")
  before, sharding = checkpoint.bytes_read, share_out(shape)
  read = functools.partial(read_region, checkpoint, Part("w"))
  array = place(shape, sharding, read)
  np.testing.assert_array_equal(np.asarray(array), w)
  assert array.dtype == dtype
  axis, parts = cut(shape, jax.device_count())
  assert len({str(shard.index) for shard in array.addressable_shards}) == parts
  times = parts if axis else 1  # of inner axes whole rows are read
  assert checkpoint.bytes_read - before == times * w.nbytes


def test_only_two_whole_matrices_that_are_factored_can_be_split(tmp_path):
  base = {
    "model.q.weight": np.ones((4, 6), np.float32),
    "model.k.weight": np.ones((4, 6), np.float32),
    "model.norm.weight": np.ones(4, np.float32),
    "model.embed_tokens.weight": np.ones((8, 4), np.float32),
    "model.ids.weight": np.ones((4, 4), np.int32),
  }
  grown = {"model.embed_tokens.weight": np.ones((9, 4), np.float32)}
  pair = write_pair(tmp_path, base, base | grown)
  for vocabulary in (keep_whole, common_rows):
    plan = plan_run(*pair, matching(exclude=".*k[.]weight"), vocabulary)
    fit = {p.path for p in plan.pairing.pairs if can_be_split(plan, p)}
    assert fit == {"model.q.weight"}
