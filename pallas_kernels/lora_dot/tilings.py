# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the TPU kernel for each chip, and the memory they fill."""

from typing import NamedTuple

MIB = 2**20


class Tiling(NamedTuple):
  """Rows, columns and depth of a block, and what the compiler may fill."""

  bm: int
  bn: int
  bk: int
  vmem_limit_bytes: int


# chip -> regime -> tiling. "rows": training and prefill; "few": decode.
TILINGS = {
  "v4": {
    "rows": Tiling(512, 512, 512, 14 * MIB),
    "few": Tiling(64, 512, 1024, 14 * MIB),
  },
  "v5e": {
    "rows": Tiling(1024, 512, 2048, 48 * MIB),
    "few": Tiling(64, 512, 4096, 48 * MIB),
  },
  "v5p": {
    "rows": Tiling(512, 1024, 1024, 48 * MIB),
    "few": Tiling(64, 512, 4096, 48 * MIB),
  },
  "v6e": {
    "rows": Tiling(1024, 512, 4096, 64 * MIB),
    "few": Tiling(64, 512, 4096, 64 * MIB),
  },
  "v7x": {
    "rows": Tiling(1024, 512, 2048, 48 * MIB),
    "few": Tiling(64, 512, 4096, 48 * MIB),
  },
}
