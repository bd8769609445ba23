# SPDX-License-Identifier: Apache-2.0
"""The child process of `compile_apart`: compiles one request, then ends."""

import pathlib
import pickle
import re
import sys
import time

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels.aot.chips import CHIPS, TPUS
from pallas_kernels.aot.compiling import Compiled, Request
from pallas_kernels.aot.gpus import H100, resources
from pallas_kernels.aot.pipelines import pipelines_of


def _device(chip):
  """Returns a device of the chip's topology, to compile for."""
  if chip in TPUS:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=CHIPS[chip].topology
    )
  else:
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology_name=CHIPS[chip].topology,
      topology="1x1x1",
      target_config=H100,
    )
  return topology.devices[0]


def cycles_in(folder: pathlib.Path) -> dict[str, int] | None:
  """Reads {instruction: estimated cycles} from profiles; None if empty."""
  found = {}
  for file in sorted(folder.glob("*.textproto")):
    text = file.read_text(encoding="utf-8", errors="replace")
    name = re.search(r'hlo_op_name: "([^"]+)"', text)
    cycles = re.search(r"estimated_cycles: (\d+)", text)
    if name and cycles:
      found[name[1]] = int(cycles[1])
  return found or None


def _ptxas_in(folder):
  """Reads each kernel's registers and spills from a folder of dumps."""
  files = sorted(folder.glob("*.ptxas"))
  return resources("\n".join(f.read_text(errors="replace") for f in files))


def compile_here(request: Request, folder: pathlib.Path) -> Compiled:
  """Compiles the request in this process, or says why it was refused."""
  device = _device(request.chip)
  sharding = SingleDeviceSharding(device)
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for shape, dtype in request.arguments
  ]
  mesh = Mesh(np.array([device]), ("_",))
  start = time.perf_counter()
  try:
    # A kernel that asks for the chip it runs on is told the target.
    with use_abstract_mesh(mesh.abstract_mesh):
      lowered = jax.jit(request.function).lower(*arguments)
      program = lowered.compile()
  except Exception as error:  # every refusal is an answer, whatever its class
    reason = f"{type(error).__name__}: {error}"
    return Compiled(reason, time.perf_counter() - start)
  seconds = time.perf_counter() - start
  pipelines = []
  if request.chip in TPUS:
    with use_abstract_mesh(mesh.abstract_mesh):
      pipelines = pipelines_of(
        request.function,
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments),
      )
  memory = program.memory_analysis()
  return Compiled(
    None,
    seconds,
    program.as_text() or "",
    tuple(pipelines),
    memory.temp_size_in_bytes if memory else 0,
    memory.generated_code_size_in_bytes if memory else 0,
    cycles_in(folder / "profile"),
    _ptxas_in(folder / "mosaic"),
  )


def main() -> None:
  """Reads the request in the folder that is named, writes its answer."""
  folder = pathlib.Path(sys.argv[1])
  (folder / "profile").mkdir()
  (folder / "mosaic").mkdir()
  request = pickle.loads((folder / "asked").read_bytes())
  answer = pickle.dumps(compile_here(request, folder))
  (folder / "partial").write_bytes(answer)
  (folder / "partial").rename(folder / "answer")


if __name__ == "__main__":
  main()
