# SPDX-License-Identifier: Apache-2.0
"""The product with a low-rank change: y = x w + ((x aᵀ) g) b.

These names are the door for all who are not part of the package; its own files
import from each other's files.
"""

from pallas_kernels.lora_dot.api import lora_dot as lora_dot
from pallas_kernels.lora_dot.banks.bank import Bank as Bank
from pallas_kernels.lora_dot.banks.bank import check_ids as check_ids
from pallas_kernels.lora_dot.banks.bank import empty_bank as empty_bank
from pallas_kernels.lora_dot.banks.bank import put_adapter as put_adapter
from pallas_kernels.lora_dot.banks.routes import lora_dot_many as lora_dot_many
from pallas_kernels.lora_dot.hopper.call import gpu_dot as gpu_dot
from pallas_kernels.lora_dot.partitioning import Place as Place
from pallas_kernels.lora_dot.quantised import dequantise as dequantise
from pallas_kernels.lora_dot.quantised import quantise_int8 as quantise_int8
from pallas_kernels.lora_dot.quantised import quantise_nf4 as quantise_nf4
from pallas_kernels.lora_dot.quantised import quantise_tree as quantise_tree
from pallas_kernels.lora_dot.reference import reference_dot as reference_dot
from pallas_kernels.lora_dot.tpu.call import tpu_dot as tpu_dot
from pallas_kernels.lora_dot.weights import Nf4 as Nf4
from pallas_kernels.lora_dot.weights import Scaled as Scaled
from pallas_kernels.lora_dot.xla import xla_dot as xla_dot

__all__ = [
  "Bank",
  "Nf4",
  "Place",
  "Scaled",
  "check_ids",
  "dequantise",
  "empty_bank",
  "gpu_dot",
  "lora_dot",
  "lora_dot_many",
  "put_adapter",
  "quantise_int8",
  "quantise_nf4",
  "quantise_tree",
  "reference_dot",
  "tpu_dot",
  "xla_dot",
]
