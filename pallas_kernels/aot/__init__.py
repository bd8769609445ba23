# SPDX-License-Identifier: Apache-2.0
"""Compiles for accelerators that are not here, and reads the result."""

from pallas_kernels.aot.chips import CHIPS as CHIPS
from pallas_kernels.aot.compiling import ENVIRONMENT as ENVIRONMENT
from pallas_kernels.aot.gpus import H100 as H100

__all__ = ["CHIPS", "ENVIRONMENT", "H100"]
