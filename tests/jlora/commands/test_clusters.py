# SPDX-License-Identifier: Apache-2.0
"""Whether a script joins others, and as which, by flags and launchers."""

import pytest

from jlora.commands.clusters import arguments_for

SRUN = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
}
MPIRUN = {
  "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
# Open MPI 5 says no coordinator.
MPIRUN_5 = {k: v for k, v in MPIRUN.items() if "hnp" not in k}
POD = {"TPU_WORKER_HOSTNAMES": "host-0,host-1"}


def arguments(environment, *flags, has_tpu=False):
  return arguments_for(
    environment, *(flags or (None, None, None)), has_tpu=has_tpu
  )


@pytest.mark.parametrize(
  ("environment", "has_tpu", "joins"),
  [
    ({}, False, False),
    (SRUN, False, True),
    (SRUN | {"SLURM_NTASKS": "1"}, False, False),
    # In sbatch's own script, not under srun: there is one process.
    ({k: v for k, v in SRUN.items() if "STEP" not in k}, False, False),
    (MPIRUN, False, True),
    (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, False, False),
    (POD, True, True),
    (POD, False, False),
    (POD | {"JAX_PLATFORMS": "cpu"}, True, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, False),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True, True),
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, False),
    ({}, True, True),  # a TPU VM, whose metadata server JAX asks
  ],
)
def test_what_jax_is_asked_to_find(environment, has_tpu, joins):
  found = arguments(environment, has_tpu=has_tpu)
  assert found == ({} if joins else None)


@pytest.mark.parametrize(
  ("environment", "flags", "count", "index"),
  [
    ({}, ("host:1", 2, 0), 2, 0),
    (SRUN, ("host:1", None, None), 4, 3),
    (SRUN, ("host:1", 8, 5), 8, 5),
    (MPIRUN_5, ("host:1", None, None), 2, 1),
    ({"PMI_SIZE": "3", "PMI_RANK": "2"}, ("host:1", None, None), 3, 2),
  ],
)
def test_a_coordinator_is_told_how_many_and_which(
  environment, flags, count, index
):
  assert arguments(environment, *flags) == {
    "coordinator_address": "host:1",
    "num_processes": count,
    "process_id": index,
  }


@pytest.mark.parametrize("environment", [{}, SRUN, MPIRUN_5, POD])
def test_one_process_is_alone_whatever_there_is(environment):
  assert arguments(environment, None, 1, None, has_tpu=True) is None


@pytest.mark.parametrize(
  ("environment", "flags", "message"),
  [
    ({}, (None, 2, 0), "need --coordinator"),
    ({}, (None, None, 0), "need --coordinator"),
    ({}, ("host:1", None, None), "needs --num_processes and --process_id"),
    ({}, ("host:1", 2, 2), "--process_id is 2, but processes go from 0 to 1"),
    (MPIRUN_5, (None, None, None), "started 2 processes, but JAX does not"),
  ],
)
def test_flags_that_do_not_go_together(environment, flags, message):
  with pytest.raises(ValueError, match=message):
    arguments(environment, *flags)
