# SPDX-License-Identifier: Apache-2.0
"""How often the block pipeline of a Pallas call fetches its operands."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


class Pipeline(NamedTuple):
  """What one Pallas call moves.

  operands, results: their shapes.
  reads, writes: how many times over each is fetched or stored.
  vmem: bytes of the blocks' buffers and the scratch memory, unpadded.
  limit: the call's `vmem_limit_bytes`, or None.
  """

  name: str
  operands: tuple[tuple[int, ...], ...]
  results: tuple[tuple[int, ...], ...]
  reads: tuple[float, ...]
  writes: tuple[float, ...]
  vmem: int
  limit: int | None


def _inner(value) -> Iterator[Any]:
  """Yields the jaxprs in an equation's parameter."""
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _inner(item)


def _calls(jaxpr) -> Iterator[Any]:
  """Yields the equations that are Pallas calls, at any depth."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for value in equation.params.values():
      for inner in _inner(value):
        yield from _calls(inner)


def _sides(mapping):
  """Returns a block's shape; a squeezed axis has no size of its own."""
  return tuple(
    int(getattr(side, "block_size", 1) if not isinstance(side, int) else side)
    for side in mapping.block_shape
  )


def _steps(grid):
  """Lists all points of the grid, the last axis fastest: (steps, axes)."""
  return np.indices(grid).reshape(len(grid), -1).T.astype(np.int32)


def _piped(mapping):
  """Returns whether the pipeline moves the blocks, not the kernel itself."""
  space = str(getattr(mapping.transformed_block_aval, "memory_space", ""))
  return "any" not in space.lower()


def _passes(mapping, grid, scalars):
  """Computes how many times over an array is moved.

  That is elements moved over elements there are.

  A block moves when its index differs from the step before; at an edge only
  what lies inside the array moves.
  """
  if not _piped(mapping):
    return 1.0
  shape, sides = mapping.array_aval.shape, _sides(mapping)
  run = core.jaxpr_as_fun(mapping.index_map_jaxpr)
  if scalars:
    raise ValueError(
      "an index map that reads prefetched scalars: its fetches depend on data"
    )
  steps = jnp.asarray(_steps(grid))
  index = np.stack([np.asarray(i) for i in jax.vmap(lambda s: run(*s))(steps)])
  changed = np.any(np.diff(index, axis=1) != 0, axis=0)
  index = index[:, np.concatenate([[True], changed])].astype(np.int64)
  side, size = np.array(sides)[:, None], np.array(shape)[:, None]
  inside = np.clip(size - index * side, 0, side)
  return float(np.prod(inside, axis=0).sum() / math.prod(shape))


def _buffers(mapping):
  """Counts the bytes of a block's buffers, two unless it says otherwise."""
  if not _piped(mapping):
    return 0
  count = getattr(mapping.pipeline_mode, "buffer_count", None) or 2
  return count * math.prod(_sides(mapping)) * mapping.array_aval.dtype.itemsize


def _scratch(aval):
  """Counts the bytes of one scratch memory; semaphores have none."""
  dtype = getattr(aval, "dtype", None)
  return math.prod(aval.shape) * getattr(dtype, "itemsize", 0)


def _limit(parameters):
  """Finds `vmem_limit_bytes` in a dict of backends or in the parameters."""
  if isinstance(parameters, dict):
    parameters = next(iter(parameters.values()), None)
  return getattr(parameters, "vmem_limit_bytes", None)


def _pipeline(equation):
  """Counts what one Pallas call moves."""
  mapping = equation.params["grid_mapping"]
  scalars, grid = mapping.num_index_operands, mapping.grid
  if mapping.num_dynamic_grid_bounds:
    raise ValueError(f"{equation.params['name']}: the grid's size is not fixed")
  blocks = list(mapping.block_mappings)
  times = [_passes(block, grid, scalars) for block in blocks]
  split = len(blocks) - mapping.num_outputs
  count = mapping.num_scratch_operands
  kernel = equation.params["jaxpr"].invars
  scratch = kernel[len(kernel) - count :]
  return Pipeline(
    equation.params["name"],
    tuple(tuple(v.aval.shape) for v in equation.invars),
    tuple(tuple(v.aval.shape) for v in equation.outvars),
    (1.0,) * scalars + tuple(times[:split]),
    tuple(times[split:]),
    sum(map(_buffers, blocks)) + sum(_scratch(v.aval) for v in scratch),
    _limit(equation.params["compiler_params"]),
  )


def pipelines_of(function: Callable, *arguments) -> list[Pipeline]:
  """Counts what every Pallas call of a function moves to and from HBM.

  The pipeline fetches a block when its index differs from the last step's, so
  a matrix whose block changes with the innermost axis is read as many times as
  the outer axes have steps. That is counted here by evaluating the index maps
  over the whole grid.

  Args:
    function: of arrays.
    *arguments: arrays or `jax.ShapeDtypeStruct`.

  Returns:
    One Pipeline for each call, in the order of the program.

  Raises:
    ValueError: if a grid or an index map depends on data.

  Approximation: every operand is taken to go through the pipeline; one that
  the kernel copies by itself counts once.

  Example:
    >>> pipelines_of(jnp.sin, jnp.ones(3))
    []
  """
  program = jax.make_jaxpr(function)(*arguments)
  return [_pipeline(equation) for equation in _calls(program.jaxpr)]
