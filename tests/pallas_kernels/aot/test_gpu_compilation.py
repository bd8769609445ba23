# SPDX-License-Identifier: Apache-2.0
"""The CUDA compiler takes the Hopper kernel and spills no register.

`make test-aot`: no GPU is needed, but its compiler is; one process each.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot.compiling import compile_apart
from pallas_kernels.lora_dot.hopper.call import gpu_dot
from pallas_kernels.lora_dot.hopper.kernel import HopperTiling

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="the CUDA compiler is absent: pip install '.[aot]'",
)


def layer(m, k, n, r, dtype=jnp.bfloat16):
  shapes = (m, k), (k, n), (r, k), (r, n)
  return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


ALONE = HopperTiling(paired=False)


@pytest.mark.parametrize(
  ("m", "k", "n", "r", "dtype", "options"),
  [
    (8192, 4096, 4096, 16, jnp.bfloat16, {}),
    (2048, 4096, 14336, 64, jnp.bfloat16, {"transpose_w": True}),
    (8192, 14336, 4096, 16, jnp.bfloat16, {"tiling": ALONE}),
    (8, 4096, 4160, 256, jnp.float16, {}),
  ],
)
def test_the_hopper_kernel_compiles_without_spills(m, k, n, r, dtype, options):
  x, w, a, b = layer(m, k, n, r, dtype)
  if "transpose_w" in options:
    w = jax.ShapeDtypeStruct(w.shape[::-1], dtype)
  run = functools.partial(gpu_dot, **options)
  found = compile_apart(run, [x, w, a, b], "h100")
  assert found.refused is None, found.refused
  assert "lora_dot" in found.text
  if not found.ptxas:
    pytest.skip("ptxas left no report: the toolkit's ptxas is not installed")
  assert found.ptxas["lora_dot"].spilled == 0
  # Three warpgroups of 128 threads share 65536 registers.
  assert found.ptxas["lora_dot"].registers * 3 * 128 <= 65536


def test_what_the_kernel_does_not_take_is_refused():
  single = layer(128, 64, 256, 8, jnp.float32)
  said = compile_apart(gpu_dot, single, "h100").refused or ""
  assert "x is float32" in said
