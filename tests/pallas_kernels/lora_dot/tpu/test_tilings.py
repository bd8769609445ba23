# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the TPU kernel: what fits, and what is read how often."""

import hypothesis
from hypothesis import strategies as st

from pallas_kernels.lora_dot.tpu.tilings import (
  CHIPS,
  MIB,
  TILINGS,
  Problem,
  Tiling,
  cut_to,
  moved_bytes,
  refuse_tiling,
  tiling_for,
  vmem_bytes,
)
from tests.pallas_kernels.lora_dot.products import STREAMED


@hypothesis.given(
  chip=st.sampled_from(sorted(CHIPS)),
  m=st.integers(1, 20000),
  k=st.integers(1, 30000),
  n=st.integers(1, 30000),
  r=st.integers(1, 1024),
  x_bytes=st.sampled_from([2, 4]),
  w_bytes=st.sampled_from([0.5, 1, 2, 4]),
)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_every_tiling_fits(chip, m, k, n, r, x_bytes, w_bytes):
  problem = Problem(m, k, n, r, x_bytes, w_bytes, x_bytes)
  tiling = tiling_for(chip, problem)
  assert refuse_tiling(tiling, chip, problem) is None
  assert vmem_bytes(tiling, problem) <= tiling.vmem_limit_bytes


def test_the_table_stays_within_each_chip():
  assert TILINGS.keys() == CHIPS.keys()
  for chip, table in TILINGS.items():
    for tiling in table.values():
      assert tiling.vmem_limit_bytes < CHIPS[chip].vmem_bytes
    assert ("resident" in table) <= (CHIPS[chip].cores == 1)


def test_a_large_w_is_streamed_and_depth_is_cut_evenly():
  small = tiling_for("v6e", Problem(8192, 4096, 4096, 16))
  large = tiling_for("v6e", Problem(8192, 28672, 8192, 16))
  assert small.resident
  assert not large.resident
  assert 28672 % large.bk == 0
  assert cut_to(STREAMED, Problem(5, 7, 9, 1))[:3] == (5, 9, 7)


def test_a_large_w_is_read_once_for_as_many_rows_as_fit():
  wide = Problem(8192, 4096, 14336, 16)
  assert tiling_for("v6e", wide)[:3] == (2048, 512, 4096)
  # A block of the whole depth would leave room for few rows.
  assert tiling_for("v6e", Problem(8192, 28672, 8192, 16)).bk < 28672
  rows, columns = (Tiling(*block, MIB) for block in ((8, 2, 2), (2, 4, 4)))
  problem = Problem(8, 4, 8, 1)
  assert moved_bytes(rows, problem) == 2 * (8 * 4 * 4 + 4 * 8 + 8 * 8)
  assert moved_bytes(columns, problem) == 2 * (8 * 4 + 4 * 8 * 4 + 8 * 8)
