# SPDX-License-Identifier: Apache-2.0
"""Fetches counted from index maps equal those of a walk over the grid."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot.pipelines import pipelines_of

MAPS = {
  "x": lambda i, j, k: (i, k),
  "w": lambda i, j, k: (k, j),
  "still": lambda i, j, k: (0, 0),
  "frozen": lambda i, j, k: (0, jnp.where(j == 0, k, 0)),
}


def body(x, y, scratch):
  del scratch
  y[...] = x[...]


def call(index_map, block, grid, x, out, *, buffers=None, limit=None):
  mode = None if buffers is None else pl.Buffered(buffers)
  return pl.pallas_call(
    body,
    grid=grid,
    in_specs=[pl.BlockSpec(block, index_map, pipeline_mode=mode)],
    out_specs=pl.BlockSpec(block, MAPS["still"]),
    out_shape=jax.ShapeDtypeStruct(out, x.dtype),
    scratch_shapes=[pltpu.VMEM((16, 128), jnp.float32)],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit),
    name="probe",
  )(x)


def walk(index_map, block, grid, shape):
  """The same count, one step after another."""
  last, moved = None, 0
  for step in itertools.product(*map(range, grid)):
    index = tuple(int(i) for i in index_map(*step))
    if index != last:
      ends = zip(index, block, shape, strict=True)
      moved += math.prod(max(min(s, n - i * s), 0) for i, s, n in ends)
    last = index
  return moved / math.prod(shape)


@settings(max_examples=20, deadline=None)
@given(
  st.sampled_from(sorted(MAPS)),
  st.tuples(*[st.integers(1, 3)] * 3),
  st.tuples(st.integers(1, 40), st.integers(1, 300)),
)
def test_fetches_are_those_of_a_walk(name, grid, shape):
  struct = jax.ShapeDtypeStruct(shape, jnp.float32)
  f = functools.partial(call, MAPS[name], (8, 128), grid, out=(8, 128))
  (found,) = pipelines_of(lambda x: f(x=x), struct)
  assert found.reads == (
    pytest.approx(walk(MAPS[name], (8, 128), grid, shape)),
  )
  assert found.operands == (shape,)


def matmul_reads(nk):
  struct = jax.ShapeDtypeStruct((32, 128 * nk), jnp.float32)
  f = functools.partial(call, MAPS["x"], (8, 128), (4, 3, nk), out=(8, 128))
  return pipelines_of(jax.jit(lambda x: f(x=x)), struct)[0].reads[0]


def test_rows_are_read_again_for_every_column_block_unless_depth_is_one():
  assert matmul_reads(nk=1) == 1.0
  assert matmul_reads(nk=2) == 3.0


def test_memory_counts_buffers_and_scratch():
  struct = jax.ShapeDtypeStruct((32, 256), jnp.bfloat16)
  run = functools.partial(call, MAPS["x"], (8, 128), (4, 1, 2), out=(8, 128))
  (double,) = pipelines_of(lambda x: run(x=x), struct)
  (single,) = pipelines_of(lambda x: run(x=x, buffers=1), struct)
  block, scratch = 8 * 128 * 2, 16 * 128 * 4
  assert double.vmem == 4 * block + scratch
  assert single.vmem == 3 * block + scratch


def test_the_limit_and_the_name_are_reported():
  struct = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  f = functools.partial(call, MAPS["x"], (8, 128), (1, 1, 1), out=(8, 128))
  (found,) = pipelines_of(lambda x: f(x=x, limit=2**20), struct)
  assert (found.limit, found.name) == (2**20, "probe")
  assert pipelines_of(lambda x: f(x=x), struct)[0].limit is None


def test_calls_are_found_behind_derivatives():
  @jax.custom_vjp
  def double(x):
    return call(MAPS["x"], (8, 128), (1, 1, 1), x, (8, 128))

  double.defvjp(lambda x: (double(x), None), lambda _, dy: (double(dy),))
  step = jax.grad(lambda x: double(x).sum())
  assert len(pipelines_of(step, jnp.ones((8, 128)))) == 2


def test_fetches_that_depend_on_data_are_an_error():
  spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(2,),
    in_specs=[pl.BlockSpec((8, 128), lambda i, ids: (ids[i], 0))],
    out_specs=pl.BlockSpec((8, 128), lambda i, ids: (i, 0)),
  )

  def gather(ids, x):
    return pl.pallas_call(
      lambda ids, x, y: y.__setitem__(..., x[...]),
      grid_spec=spec,
      out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
    )(ids, x)

  with pytest.raises(ValueError, match="depend on data"):
    pipelines_of(gather, jnp.zeros(2, jnp.int32), jnp.ones((16, 128)))
