# SPDX-License-Identifier: Apache-2.0
"""The table of tilings fits the table of chips; bad tilings are refused."""

import pytest

from pallas_kernels.aot.chips import CHIPS, MIB, TPUS, excess_vmem
from pallas_kernels.lora_dot.tpu import tilings
from pallas_kernels.lora_dot.tpu.tilings import (
  TILINGS,
  Problem,
  Tiling,
  refuse_tiling,
)


def test_every_chip_has_tilings_and_a_topology():
  assert set(TILINGS) == set(TPUS)


@pytest.mark.parametrize("chip", TPUS)
def test_both_tables_have_the_same_memory(chip):
  assert tilings.CHIPS[chip].vmem_bytes == CHIPS[chip].vmem


@pytest.mark.parametrize("chip", TPUS)
def test_no_tiling_claims_more_than_the_chip_has(chip):
  for tiling in TILINGS[chip].values():
    assert excess_vmem(CHIPS[chip], tiling.vmem_limit_bytes) is None


GOOD = Tiling(256, 256, 512, 48 * MIB)
SMALL = Problem(1024, 2048, 1024, 16)


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"bn": 64}, "multiple of 128"),
    ({"bm": 4}, "multiple of 128"),
    ({"bk": 192}, "multiple of 128"),
    # The compiler takes this limit in silence.
    ({"vmem_limit_bytes": 500 * MIB}, "is over the"),
    ({"bm": 1024, "bn": 1024, "bk": 2048, "vmem_limit_bytes": 4 * MIB}, "fill"),
  ],
)
def test_bad_tilings_are_refused_before_the_compiler(chip, change, reason):
  limit = min(GOOD.vmem_limit_bytes, CHIPS[chip].vmem)
  tiling = GOOD._replace(vmem_limit_bytes=limit)
  assert refuse_tiling(tiling, chip, SMALL) is None
  assert reason in refuse_tiling(tiling._replace(**change), chip, SMALL)
