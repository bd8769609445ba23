# SPDX-License-Identifier: Apache-2.0
"""Compiles for a chip that is not there, in a process of its own.

libtpu reads its flags once, takes a lock, and may abort or hang: every
compilation gets a child process, one at a time, with a limit on its seconds.
"""

import contextlib
import fcntl
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from pallas_kernels.aot.chips import TPUS
from pallas_kernels.aot.gpus import Resources
from pallas_kernels.aot.pipelines import Pipeline

ROOT = pathlib.Path(__file__).parents[2]

# No such machine is asked for anything; without these libtpu looks for one.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "",  # the compilers as they come, whatever tests are run with
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}


class Request(NamedTuple):
  """What a child compiles; everything in it can be pickled."""

  function: Callable
  arguments: tuple[tuple[tuple[int, ...], str], ...]
  chip: str
  profile: bool


class Compiled(NamedTuple):
  """A compiled program, read but never run.

  refused: why there is none, the compiler's own words; None if there is one.
  seconds: of the child's compilation alone.
  text: the schedule, as HLO text.
  pipelines: of its Pallas calls.
  temporaries, code: bytes.
  cycles: {instruction: the compiler's estimate}, None if none was given.
  ptxas: {kernel: registers and spills} of Mosaic GPU kernels.
  """

  refused: str | None
  seconds: float = 0.0
  text: str = ""
  pipelines: tuple[Pipeline, ...] = ()
  temporaries: int = 0
  code: int = 0
  cycles: dict[str, int] | None = None
  ptxas: dict[str, Resources] = {}


@contextlib.contextmanager
def _alone(chip):
  """Holds a lock while compiling for a TPU: one at a time on a machine."""
  if chip not in TPUS:
    yield
    return
  path = pathlib.Path(tempfile.gettempdir(), "libtpu.lock")
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _environment(request, folder):
  """Returns the child's variables; compilers report into the folder."""
  found = os.environ | ENVIRONMENT
  found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
  found["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  found["MOSAIC_GPU_DUMP_TO"] = str(folder / "mosaic")
  if request.profile:
    found["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_static_llo_profile_to={folder / 'profile'}"
    )
  return found


def _run(request, folder, limit):
  """Runs a child; returns why it left no result, or None."""
  asked, answer = folder / "asked", folder / "answer"
  asked.write_bytes(pickle.dumps(request))
  command = [sys.executable, "-m", "pallas_kernels.aot.child", str(folder)]
  with (folder / "log").open("wb") as log, _alone(request.chip):
    try:
      subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=_environment(request, folder),
        timeout=limit,
        check=False,
      )
    except subprocess.TimeoutExpired:
      return f"timed out after {limit:g} s"
  if answer.exists():
    return None
  last = (folder / "log").read_text(errors="replace").strip().splitlines()
  return f"aborted: {last[-1] if last else 'without a word'}"


def compile_apart(
  function: Callable,
  arguments: Sequence[jax.ShapeDtypeStruct],
  chip: str,
  *,
  profile: bool = False,
  limit: float = 300.0,
) -> Compiled:
  """Compiles a program for one device of a chip, in a child process.

  Args:
    function: of arrays; it is pickled, so a function at the top of a module
      or a `functools.partial` of one.
    arguments: shapes and dtypes.
    chip: a key of `CHIPS`.
    profile: ask for the static cycles of every instruction. The compiler may
      abort or hang over that; it is then compiled again without.
    limit: seconds a child may take.

  Returns:
    Compiled. One that was refused, aborted or timed out says so in `refused`.
  """
  structs = tuple((tuple(a.shape), str(a.dtype)) for a in arguments)
  request = Request(function, structs, chip, profile)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    failure = _run(request, folder, limit)
    if failure is None:
      return pickle.loads((folder / "answer").read_bytes())
  if profile:
    return compile_apart(function, arguments, chip, limit=limit)
  return Compiled(failure, time.perf_counter() - start)
