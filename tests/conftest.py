# SPDX-License-Identifier: Apache-2.0
"""Strict numerics for every test: 8 CPU devices, no silent promotion."""

import gc
import os
import zlib

import jax
import pytest
import scipy.linalg.cython_lapack  # noqa: F401  loads what is limited next
import threadpoolctl

# Nearly all programs here run once and are small: compiling them is most of a
# test. Without LLVM's optimisations that takes two thirds of the time, and
# without emitters that put fusions through MLIR about half of what is left,
# and in one piece instead of 32 that are linked three quarters of that.
_FLAGS = " ".join((
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
))  # fmt: skip
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

# A batch of LAPACK's waits within XLA's own threads for others of them: with as
# many threads as devices all of them may wait, for ever.
os.environ.setdefault("PJRT_NPROC", "24")

# LAPACK's threads spin against XLA's over the same cores: minutes for seconds.
threadpoolctl.threadpool_limits(1, user_api="blas")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
  """Takes thousands of tests from what Python's collector looks through."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def key(request):
  """A PRNG key derived from the test's own name, stable across runs."""
  return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Compiled programs of a file go with it: they would take gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def quick_compilation():
  """Programs that run once: to make them fast would cost more."""
  was = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", was)
