# SPDX-License-Identifier: Apache-2.0
"""A Hopper card as the CUDA compiler sees it, and its report on a kernel."""

import re
from typing import NamedTuple

# Every device query of an H100 SXM the compiler would make, as text proto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Resources(NamedTuple):
  """What ptxas gave a kernel: registers of a thread, bytes it spills."""

  registers: int
  spilled: int


_KERNEL = re.compile(
  r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'.*?"
  r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
  r"Used (\d+) registers",
  re.DOTALL,
)


def resources(report: str) -> dict[str, Resources]:
  """Reads {kernel: Resources} from what `ptxas -v` prints.

  Args:
    report: the printed text, of any number of kernels.

  Example:
    >>> resources('''ptxas info : Compiling entry function 'f' for 'sm_90a'
    ...   0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
    ... ptxas info : Used 168 registers, used 16 barriers''')
    {'f': Resources(registers=168, spilled=12)}
  """
  return {
    name: Resources(int(registers), int(stores) + int(loads))
    for name, stores, loads, registers in _KERNEL.findall(report)
  }
