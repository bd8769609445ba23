# SPDX-License-Identifier: Apache-2.0
"""Programs for pods: compiled where the compilers are, refused in words else.

libtpu takes a lock and is no part of the tests' own environment: these run in
the one of `make test-aot`.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from experiments.lib.data.llamas import MODELS, extractions
from experiments.lib.machines.pods import PODS, memory_of

has_libtpu = importlib.util.find_spec("libtpu") is not None


def run(*words):
  return subprocess.run(
    [sys.executable, "-m", "experiments.pod_programs", *words],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )


def test_the_shapes_are_those_of_the_models():
  assert dict(extractions(MODELS["8B"])) == {
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
  }
  assert dict(extractions(MODELS["70B"]))["gate, up"] == (8192, 28672)


def test_devices_have_the_memory_that_is_published():
  gib = {name: memory_of(pod) / 2**30 for name, pod in PODS.items()}
  assert gib["v5e-16"] == 16
  assert gib["v6e-16"] == 32
  assert gib["v5p-32"] == 95


@pytest.mark.skipif(has_libtpu, reason="the compiler is there")
def test_without_a_compiler_it_says_what_to_install():
  done = run("--pod=v5e-4", "--model=tiny", "--json")
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("error: No compiler for v5e:2x2 here")
  assert ".[aot]" in last


@pytest.mark.skipif(not has_libtpu, reason="needs libtpu")
def test_a_pod_takes_a_matrix_that_is_never_put_together():
  done = run("--pod=v5e-16", "--model=square", "--program=extract", "--json")
  assert done.returncode == 0, done.stderr[-2000:]
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert rows
  for row in rows:
    m, n = row["shape"]
    assert row["memory"] < row["limit"]
    assert row["gathered"] <= (m + n) * 80 < m * n / 4
