# SPDX-License-Identifier: Apache-2.0
"""A script under several processes: flags, or what the cluster says by itself.

JAX reads TPU pods, Slurm's `srun` and Open MPI's `mpirun` by itself; here is
only decided whether to ask it, from the environment alone. Elsewhere every
process is given the coordinator, how many there are, and which it is.
"""

import os
import pathlib
import sys
from collections.abc import Mapping

import jax

# How long a process may be without a sign of life, to JAX's own runtime: it
# aborts the others then. The run's own watch speaks up before, except to those
# that wait for it in a collective.
_HEARTBEAT_SECONDS = 50

# What JAX needs to find the other processes by itself, and how many there are.
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)
_OPEN_MPI = (
  "OMPI_MCA_orte_hnp_uri",
  "OMPI_COMM_WORLD_SIZE",
  "OMPI_COMM_WORLD_RANK",
  "OMPI_COMM_WORLD_LOCAL_RANK",
)
_LAUNCHERS = ((_SLURM, "SLURM_NTASKS"), (_OPEN_MPI, "OMPI_COMM_WORLD_SIZE"))
# Launchers' names for how many and which.
_NUMBERS = (
  ("SLURM_NTASKS", "SLURM_PROCID"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
  ("PMI_SIZE", "PMI_RANK"),
)
_HOSTNAMES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def join(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> int:
  """Joins the other processes of a run, where there are several.

  Initialises `jax.distributed` then.

  Args:
    coordinator: as for `arguments_for`, as all below.
    num_processes: how many there are.
    process_id: which one this is.

  Returns:
    Which one this is; 0 for the first, which alone should print results.

  Raises:
    ValueError: flags that do not go together, or other processes that cannot be
      found.
  """
  arguments = arguments_for(
    os.environ, coordinator, num_processes, process_id, has_tpu=_has_tpu()
  )
  if arguments is None:
    return 0
  _keep_output_clean()
  try:
    jax.distributed.initialize(
      **arguments, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"The other processes were not found: {error}. Give --coordinator, "
      "--num_processes and --process_id; with --num_processes=1 this one works "
      "alone."
    ) from error
  return jax.process_index()


def _keep_output_clean() -> None:
  """Sends what JAX's runtime (Gloo) prints to standard error.

  It knows file descriptor 1 alone; Python's own output keeps where that led.
  """
  sys.stdout.flush()
  sys.stdout = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)


def arguments_for(
  environment: Mapping[str, str],
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  has_tpu: bool,
) -> dict | None:
  """Returns what to call `jax.distributed.initialize` with; None: not at all.

  Args:
    environment: variables.
    coordinator: of the flag.
    num_processes: of the flag, or else of the launcher.
    process_id: of the flag, or else of the launcher.
    has_tpu: whether this machine has TPU chips that JAX may use.

  Returns:
    Arguments, empty where JAX finds all by itself; None: there is one process.

  Raises:
    ValueError: only some of the flags where the rest is not known, or several
      processes of a launcher that JAX does not know.
  """
  if num_processes == 1:
    return None
  size, rank = _numbers(environment)
  if coordinator is None:
    if num_processes is not None or process_id is not None:
      raise ValueError(
        "--num_processes and --process_id need --coordinator=HOST:PORT."
      )
    return _found(environment, size, has_tpu)
  count = num_processes or size
  index = rank if process_id is None else process_id
  if count is None or index is None:
    raise ValueError(
      "--coordinator needs --num_processes and --process_id, as no launcher "
      "says them."
    )
  if index >= count:
    raise ValueError(
      f"--process_id is {index}, but processes go from 0 to {count - 1}."
    )
  return {
    "coordinator_address": coordinator,
    "num_processes": count,
    "process_id": index,
  }


def _numbers(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
  for size, rank in _NUMBERS:
    if environment.get(size, "").isdigit() and rank in environment:
      return int(environment[size]), int(environment[rank])
  return None, None


def _found(
  environment: Mapping[str, str], size: int | None, has_tpu: bool
) -> dict | None:
  """Returns empty arguments where JAX finds several processes by itself."""
  for names, count in _LAUNCHERS:
    if all(name in environment for name in names):
      return {} if int(environment[count]) > 1 else None
  if size is not None and size > 1 and "SLURM_JOB_ID" not in environment:
    raise ValueError(
      f"A launcher started {size} processes, but JAX does not know it: give "
      "--coordinator=HOST:PORT, or --num_processes=1 to work alone."
    )
  if not has_tpu or environment.get("JAX_PLATFORMS", "tpu") == "cpu":
    return None
  for name in _HOSTNAMES:
    if name in environment:
      return {} if "," in environment[name] else None
  return None if "TPU_SKIP_MDS_QUERY" in environment else {}


def _has_tpu() -> bool:
  """Returns whether there are chips, by their device files."""
  files = pathlib.Path("/dev").glob("accel[0-9]*")
  groups = pathlib.Path("/dev/vfio").glob("[0-9]*")
  return "linux" in sys.platform and any((*files, *groups))
