# SPDX-License-Identifier: Apache-2.0
"""The table of chips agrees with itself and with what jax knows."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot.chips import CHIPS, MIB, TPUS, bound, excess_vmem

VERSIONS = {
  "v4": pltpu.ChipVersion.TPU_V4,
  "v5e": pltpu.ChipVersion.TPU_V5E,
  "v5p": pltpu.ChipVersion.TPU_V5P,
  "v6e": pltpu.ChipVersion.TPU_V6E,
  "v7x": pltpu.ChipVersion.TPU_7X,
}
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "v7x": 2}


@pytest.mark.parametrize("name", TPUS)
def test_the_table_agrees_with_jax(name):
  chip, share = CHIPS[name], CORES[name]
  info = pltpu.get_tpu_info_for_chip(VERSIONS[name], share // chip.devices)
  assert chip.vmem == info.vmem_capacity_bytes
  assert chip.flops / share == pytest.approx(info.bf16_ops_per_second, rel=0.01)
  # jax rounds, and has 2460 GB/s for v5p where the data sheet has 2765.
  assert chip.bandwidth / share == pytest.approx(
    info.mem_bw_bytes_per_second, rel=0.13
  )
  assert chip.hbm / share == pytest.approx(info.hbm_capacity_bytes, rel=0.01)


@pytest.mark.parametrize("name", CHIPS)
def test_a_square_product_of_many_rows_is_bound_by_compute(name):
  m, k = 8192, 4096
  flops, moved = 2 * m * k * k, 2 * (2 * m * k + k * k)
  assert bound(CHIPS[name], flops, moved).by == "compute"
  decode = bound(CHIPS[name], 2 * 8 * k * k, 2 * k * k)
  assert decode.by == "memory"


def test_the_roofline_of_one_product():
  # 275 GFLOP on 197 TFLOP/s: 1.40 ms
  found = bound(CHIPS["v5e"], 2 * 8192 * 4096 * 4096, 0)
  assert found.seconds == pytest.approx(1.395e-3, rel=1e-3)
  # Two devices share a v4 chip: each has half of everything.
  half = bound(CHIPS["v4"], 275e12, 0)
  assert half == (2.0, "compute")


def test_memory_no_chip_has_is_refused():
  assert excess_vmem(CHIPS["v5e"], 128 * MIB) is None
  assert excess_vmem(CHIPS["v5e"], None) is None
  assert "129.0 MiB" in excess_vmem(CHIPS["v5e"], 129 * MIB)
