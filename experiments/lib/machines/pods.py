# SPDX-License-Identifier: Apache-2.0
"""Describes pods and servers to compile for without having them."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from pallas_kernels.aot import CHIPS, ENVIRONMENT, H100


class Pod(NamedTuple):
  """A group of devices that programs can be compiled for.

  Attributes:
    chip: a key of `CHIPS`.
    platform: "tpu" or "cuda".
    name: the topology's name in `jax.experimental.topologies`.
    more: further arguments for it.
  """

  chip: str
  platform: str
  name: str
  more: dict[str, Any]


_SERVER = {"topology": "1x1x8", "target_config": H100}

#: Named as by their makers: v5p counts cores, two per chip.
PODS = {
  "v5e-16": Pod("v5e", "tpu", "v5e:4x4", {}),
  "v5p-32": Pod("v5p", "tpu", "v5p:2x2x4", {}),
  "v6e-16": Pod("v6e", "tpu", "v6e:4x4", {}),
  "v5e-4": Pod("v5e", "tpu", "v5e:2x2", {}),
  "h100-8": Pod("h100", "cuda", "h100", _SERVER),
}


def mesh_of(pod: Pod, axes: Sequence[str] = ("x", "y")) -> Mesh:
  """Makes a mesh of a pod's devices, as square as possible.

  Args:
    pod: which.
    axes: names of its two axes.

  Returns:
    Mesh with Auto axes; its devices compile and do not run.

  Raises:
    ValueError: this machine lacks the compiler.
  """
  os.environ.update(ENVIRONMENT)
  try:
    found = topologies.get_topology_desc(
      platform=pod.platform, topology_name=pod.name, **pod.more
    )
  except (RuntimeError, jax.errors.JaxRuntimeError) as error:
    raise ValueError(
      f"No compiler for {pod.name} here ({error}); pip install '.[aot]', and "
      "set JAX_PLATFORMS=cpu."
    ) from error
  devices = np.array(found.devices)
  rows = 2 ** (int(np.log2(devices.size)) // 2)
  return Mesh(devices.reshape(rows, -1), axes, axis_types=(AxisType.Auto,) * 2)


def memory_of(pod: Pod) -> int:
  """Returns the bytes of memory of one device of a pod.

  Args:
    pod: which.

  Returns:
    Bytes. On v5p both cores of a chip are one device.

  Example:
    >>> memory_of(PODS["v5e-16"]) / 2**30
    16.0
  """
  return CHIPS[pod.chip].hbm
