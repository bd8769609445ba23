# SPDX-License-Identifier: Apache-2.0
"""The product with a low-rank change: y = x w + ((x aᵀ) g) b."""

from pallas_kernels.lora_dot.api import lora_dot as lora_dot
from pallas_kernels.lora_dot.mosaic import tpu_dot as tpu_dot
from pallas_kernels.lora_dot.partitioning import Place as Place
from pallas_kernels.lora_dot.reference import reference_dot as reference_dot
from pallas_kernels.lora_dot.weights import Scaled as Scaled
from pallas_kernels.lora_dot.xla import xla_dot as xla_dot

__all__ = [
  "Place",
  "Scaled",
  "lora_dot",
  "reference_dot",
  "tpu_dot",
  "xla_dot",
]
