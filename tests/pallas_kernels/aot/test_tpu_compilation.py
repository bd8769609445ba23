# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler takes every tiling in the table, and refuses bad ones.

`make test-aot`: no TPU is needed, but its compiler is; one process each.
"""

import functools
import importlib.util
import os
import time

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot.chips import CHIPS, MIB, TPUS, excess_vmem
from pallas_kernels.aot.compiling import compile_apart
from pallas_kernels.aot.schedules import hbm_bytes
from pallas_kernels.bench import programs
from pallas_kernels.lora_dot.tpu.call import tpu_dot
from pallas_kernels.lora_dot.tpu.kernel import lora_matmul
from pallas_kernels.lora_dot.tpu.tilings import TILINGS, Tiling
from pallas_kernels.lora_dot.weights import Nf4

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is absent: pip install '.[aot]'",
)

# A problem for which each regime was made: (rows, depth, columns).
PROBLEMS = {
  "resident": (8192, 4096, 4096),
  "whole": (8192, 2048, 14336),
  "rows": (8192, 4096, 14336),
  "few": (64, 4096, 4096),
}
TABLE = [(chip, regime) for chip in TPUS for regime in TILINGS[chip]]


def struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def layer(m, k, n, r, dtype=jnp.bfloat16):
  shapes = (m, k), (k, n), (r, k), (r, n)
  return [struct(*shape, dtype=dtype) for shape in shapes]


def compiled(function, arguments, chip):
  found = compile_apart(function, arguments, chip)
  assert found.refused is None, found.refused
  return found


@pytest.mark.parametrize(("chip", "regime"), TABLE)
@pytest.mark.parametrize("transpose_w", [False, True])
def test_every_tiling_compiles(chip, regime, transpose_w):
  tiling = TILINGS[chip][regime]
  m, k, n = PROBLEMS[regime]
  x, w, a, b = layer(m, k, n, 16)
  w = struct(n, k) if transpose_w else w
  run = functools.partial(tpu_dot, tiling=tiling, transpose_w=transpose_w)
  found = compiled(run, [x, w, a, b], chip)
  (pipeline,) = found.pipelines
  assert excess_vmem(CHIPS[chip], pipeline.limit) is None
  assert pipeline.vmem <= pipeline.limit
  # y is the result; what else the program keeps must be small.
  assert found.temporaries < 2 * m * n // 8


@pytest.mark.parametrize("chip", TPUS)
def test_the_table_s_choice_compiles_with_its_derivatives(chip):
  sizes = programs.Sizes(2048, 4096, 4096, 16)
  arguments = programs.arguments("fused", True, sizes)
  found = compiled(programs.fused_step, arguments, chip)
  assert len(found.pipelines) == 2  # forward, and dx by the same kernel


@pytest.mark.parametrize(
  ("m", "k", "n", "r"),
  [
    (1, 4096, 4096, 16),
    (37, 576, 1536, 3),  # nothing is a multiple of a tile
    (300, 1000, 777, 1),
    (2048, 4096, 4096, 256),
    (256, 512, 512, 1024),
  ],
)
def test_odd_shapes_and_ranks_compile(m, k, n, r):
  compiled(tpu_dot, layer(m, k, n, r), "v5e")


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("depth", [14336, 28672])
def test_decoding_through_a_deep_matrix_reads_everything_once(chip, depth):
  x, w, a, b = layer(64, depth, 4096, 16)
  (pipeline,) = compiled(tpu_dot, [x, w, a, b], chip).pipelines
  assert pipeline.vmem <= pipeline.limit
  if depth == 14336 or chip != "v4":  # whose memory holds half of the other
    assert max(pipeline.reads) == 1


@pytest.mark.parametrize("chip", TPUS)
def test_float32_compiles(chip):
  compiled(tpu_dot, layer(512, 1024, 1024, 16, jnp.float32), chip)


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("codes", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_matrices_compile(chip, codes):
  if codes == jnp.float8_e4m3fn and not CHIPS[chip].fp8:
    pytest.skip(f"{chip} has no float8")
  x, w, a, b = layer(512, 1024, 1024, 16)
  scale = struct(1, 1024, dtype=jnp.float32)
  codes = struct(*w.shape, dtype=codes)
  compiled(programs.int8, [x, codes, scale, a, b], chip)


@pytest.mark.parametrize("chip", TPUS)
def test_four_bits_compile_and_are_read_once(chip):
  sizes = programs.Sizes(64, 2048, 1024, 16)
  arguments = programs.arguments("nf4", False, sizes)
  found = compiled(programs.nf4, arguments, chip)
  least = programs.least_bytes("nf4", False, sizes)
  assert hbm_bytes(found.text, found.pipelines) <= 1.05 * least


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("transpose_w", [False, True])
def test_four_bits_stay_decoded_where_they_fit(chip, transpose_w):
  tiling = TILINGS[chip]["resident"]._replace(bn=512)
  run = functools.partial(resident_nf4, transpose_w=transpose_w, tiling=tiling)
  sizes = programs.Sizes(2048, 2048, 2048, 16)
  arguments = programs.arguments("nf4", False, sizes)
  found = compiled(run, arguments, chip)
  least = programs.least_bytes("nf4", False, sizes)
  assert hbm_bytes(found.text, found.pipelines) <= 1.05 * least


def resident_nf4(x, codes, absmax, a, b, transpose_w, tiling):
  w = Nf4(codes, absmax, 2048)
  return tpu_dot(x, w, a, b, transpose_w=transpose_w, tiling=tiling)


@pytest.mark.parametrize(
  ("m", "r", "megabytes"),
  [(8, 16, 33.7), (64, 16, 34.6), (1024, 16, 50.3), (8192, 16, 167.8)],
)
def test_bytes_of_the_base_are_those_of_its_arrays(m, r, megabytes):
  arguments = programs.arguments(
    "base", False, programs.Sizes(m, 4096, 4096, r)
  )
  found = compiled(programs.base, arguments, "v5e")
  assert hbm_bytes(found.text) / 1e6 == pytest.approx(megabytes, abs=0.06)


@pytest.mark.parametrize(
  ("m", "r", "megabytes"),
  [(8, 16, 34.0), (64, 16, 35.4), (1024, 16, 59.0), (8192, 16, 302.8)],
)
def test_bytes_of_three_products(m, r, megabytes):
  sizes = programs.Sizes(m, 4096, 4096, r)
  arguments = programs.arguments("unfused", False, sizes)
  found = compiled(programs.unfused, arguments, "v5e")
  assert hbm_bytes(found.text) / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_the_fused_kernel_writes_y_once_and_reads_x_and_w_once():
  sizes = programs.Sizes(8192, 4096, 4096, 16)
  arguments = programs.arguments("fused", False, sizes)
  found = compiled(programs.fused, arguments, "v5e")
  moved = hbm_bytes(found.text, found.pipelines)
  assert moved <= 1.05 * programs.least_bytes("base", False, sizes)


GOOD = Tiling(256, 256, 512, 48 * MIB)


def refusal(tiling, arguments, chip="v5e"):
  """What the compiler says of the bare kernel, past all checks of ours."""
  run = functools.partial(
    lora_matmul, gate=None, transpose_w=False, tiling=tiling
  )
  return compile_apart(run, arguments, chip).refused or ""


def test_the_compiler_refuses_what_is_no_block():
  said = refusal(GOOD._replace(bn=64), layer(1024, 2048, 1024, 16))
  assert "divisible by 8 and 128" in said


def test_the_compiler_refuses_blocks_that_overflow_the_limit():
  tiling = GOOD._replace(bm=1024, bn=1024, vmem_limit_bytes=4 * MIB)
  said = refusal(tiling, layer(1024, 2048, 1024, 16))
  assert "RESOURCE_EXHAUSTED" in said


def test_the_compiler_refuses_half_precision():
  said = refusal(GOOD, layer(1024, 2048, 1024, 16, jnp.float16))
  assert "vector type" in said


def test_the_compiler_takes_a_limit_no_chip_has():
  # Why `refuse_tiling` and `excess_vmem` exist. If this fails they may go.
  tiling = GOOD._replace(vmem_limit_bytes=500 * MIB)
  assert refusal(tiling, layer(1024, 2048, 1024, 16)) == ""


def test_a_door_that_is_closed_says_why():
  half = layer(1024, 2048, 1024, 16, jnp.float16)
  assert "x is float16" in (compile_apart(tpu_dot, half, "v5e").refused or "")


def _forever(x):
  while True:
    time.sleep(1)


def _abort(x):
  os.abort()


def test_a_child_that_hangs_or_dies_is_an_answer():
  hung = compile_apart(_forever, [struct(8, 128)], "v5e", limit=6)
  assert "timed out after 6 s" in (hung.refused or "")
  died = compile_apart(_abort, [struct(8, 128)], "v5e")
  assert "aborted" in (died.refused or "")
