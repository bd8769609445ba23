# SPDX-License-Identifier: Apache-2.0
"""What NumPy and JAX do differently, behind one function each.

With them an algorithm is written once. JAX arrays are traced, compiled and
sharded. NumPy arrays stay on the host, where nothing has to be compiled and
sizes may depend on values.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.numerics.meshes import run_automatic

_SORTED = 2**16  # entries that NumPy sorts at a time: they stay in the cache


def library_of(*arrays: Any) -> Any:
  """Returns the module whose functions take arrays: `numpy` or `jax.numpy`.

  Args:
    arrays: arrays or scalars of either; others, as Python's numbers, go with
      both.

  Returns:
    `numpy` if there are only its arrays and scalars, else `jax.numpy`.

  Example:
    >>> library_of(np.ones(2)).__name__, library_of(jnp.ones(2)).__name__
    ('numpy', 'jax.numpy')
    >>> library_of(np.ones(2), 0.5, jnp.ones(2)).__name__
    'jax.numpy'
  """
  if any(isinstance(x, jax.Array) for x in arrays):
    return jnp
  return (
    np if any(isinstance(x, np.ndarray | np.generic) for x in arrays) else jnp
  )


def single(value: Any, *beside: Any) -> Any:
  """Converts a number to float32, in the library of the arrays it meets.

  Example:
    >>> single(0.5, np.ones(2))
    array(0.5, dtype=float32)
  """
  xp = library_of(value, *beside)
  return xp.asarray(value).astype(xp.float32)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles a function for JAX arrays; NumPy's are worked on as it says.

  Example:
    >>> compiled(lambda x: x + 1)(np.float32(1))
    np.float32(2.0)
  """
  program = jax.jit(function)

  @functools.wraps(function)
  def run(*arrays):
    return (function if library_of(*arrays) is np else program)(*arrays)

  return run


def batched(
  function: Callable[..., Any], in_axes: int | tuple[int | None, ...] = 0
) -> Callable[..., Any]:
  """Maps a function over an axis of its arrays: `jax.vmap`, a loop for NumPy.

  Args:
    function: arrays -> an array.
    in_axes: as of `jax.vmap`.

  Returns:
    A function of arrays with that axis, whose result has it first.

  Example:
    >>> batched(np.sum)(np.ones((2, 3)))
    array([3., 3.])
  """

  def run(*arrays):
    if library_of(*arrays) is jnp:
      return jax.vmap(function, in_axes)(*arrays)
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(arrays)
    given = [
      itertools.repeat(x) if axis is None else np.moveaxis(x, axis, 0)
      for x, axis in zip(arrays, axes, strict=True)
    ]
    return np.stack([function(*each) for each in zip(*given, strict=False)])

  return run


def ranks_along(x: Any, axis: int) -> Any:
  """Returns the place of each entry in the order of its vector along an axis.

  Args:
    x: (...) float32, not negative; NaN is the largest.
    axis: of the vectors.

  Returns:
    (...) int32, 0 for the smallest; of equal entries the first is first.

  Example:
    >>> ranks_along(np.float32([3, 1, 3]), 0)
    array([1, 0, 2], dtype=int32)
  """
  if library_of(x) is jnp:
    return jnp.argsort(jnp.argsort(x, axis=axis), axis=axis)
  if not x.size:
    return np.zeros(x.shape, np.int32)
  rows = np.ascontiguousarray(np.moveaxis(x, axis, -1), np.float32)
  at = np.arange(rows.shape[-1], dtype=np.int32)
  ranks = np.empty(rows.shape, np.int32)
  flat, bits = ranks.reshape(-1, at.size), rows.view(np.uint32)
  bits = bits.reshape(-1, at.size)
  few = max(_SORTED // at.size, 1)
  for start in range(0, len(bits), few):
    # Bits are in the order of values. Sorting pairs takes a third of argsort.
    pairs = bits[start : start + few].astype(np.uint64) << np.uint64(32)
    pairs |= at.astype(np.uint64)
    pairs.sort(axis=-1)
    order = (pairs & np.uint64(2**32 - 1)).astype(np.int64)
    np.put_along_axis(flat[start : start + few], order, at[None], axis=-1)
  return np.moveaxis(ranks, -1, axis)


def log_softmax(x: Any) -> Any:
  """Computes the logarithm of the softmax over the last axis."""
  if library_of(x) is jnp:
    return jax.nn.log_softmax(x, axis=-1)
  below = x - x.max(axis=-1, keepdims=True)
  return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def wide_dtype(*arrays: Any) -> Any:
  """Returns the dtype in which arrays are subtracted: float64 if any has it.

  Args:
    arrays: of any floating dtypes.

  Example:
    >>> wide_dtype(np.ones(2, np.float16), np.ones(2)).__name__
    'float64'
  """
  is_wide = any(x.dtype == np.float64 for x in arrays)
  return np.float64 if is_wide else np.float32


def branch(which: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
  """Calls `yes` or `no`, as `which` is true or false; `lax.cond` for JAX.

  Both take no arguments, and their results have the same shapes.

  Example:
    >>> branch(np.bool_(True), lambda: 1, lambda: 2)
    1
  """
  if library_of(which) is np:
    return yes() if which else no()
  return jax.lax.cond(which, yes, no)


def repeat(times: int, step: Callable[[Any, Any], Any], x: Any) -> Any:
  """Applies `step(turn, x)` a fixed number of times; compiled once for JAX.

  Args:
    times: static.
    step: (turn, x) -> x of the same shape.
    x: an array of either library.

  Example:
    >>> repeat(3, lambda turn, x: x + turn, np.float32(0))
    np.float32(3.0)
  """
  if library_of(x) is jnp:
    return jax.lax.fori_loop(0, times, step, x)
  for turn in range(times):
    x = step(turn, x)
  return x


def run_while(
  go_on: Callable[[Any], Any], step: Callable[[Any], Any], state: Any
) -> Any:
  """Applies `step(state)` as long as `go_on(state)` is true; returns the state.

  Args:
    go_on: state -> bool scalar.
    step: state -> state of the same shapes.
    state: a tuple of arrays, all of one library.

  Example:
    >>> run_while(lambda s: s[0] < 4, lambda s: (2 * s[0],), (np.int32(1),))
    (np.int32(4),)
  """
  if library_of(state[0]) is jnp:
    return jax.lax.while_loop(go_on, step, state)
  while go_on(state):
    state = step(state)
  return state


def put(x: Any, part: Any, corner: tuple[Any, ...]) -> Any:
  """Replaces a part of an array; a NumPy array is changed in place.

  Args:
    x: an array.
    part: with as many axes.
    corner: where the part begins on each axis.

  Example:
    >>> put(np.zeros(3), np.ones(2), (1,))
    array([0., 1., 1.])
  """
  if library_of(x) is jnp:
    return jax.lax.dynamic_update_slice(x, part, corner)
  ends = (start + size for start, size in zip(corner, part.shape, strict=True))
  x[tuple(slice(*ends) for ends in zip(corner, ends, strict=True))] = part
  return x


def rows_at(x: Any, start: Any, count: int) -> Any:
  """Returns `count` rows from `start` on; the start may be traced."""
  if library_of(x) is jnp:
    return jax.lax.dynamic_slice_in_dim(x, start, count)
  return x[start : start + count]


def normal(key: Any, shape: tuple[int, ...], like: Any) -> Any:
  """Draws standard normal float32 values, in the library of another array.

  Args:
    key: a PRNG key; None for `key(0)`; on the host also its uint32 words.
    shape: of the result.
    like: an array of the wanted library.

  Returns:
    `shape` float32. NumPy and JAX draw different values, each always the same.
  """
  if library_of(like) is jnp:
    return jax.random.normal(jax.random.key(0) if key is None else key, shape)
  return np.random.default_rng(words_of(key)).standard_normal(shape, np.float32)


def words_of(key: Any) -> np.ndarray:
  """Returns the uint32 words of a PRNG key, on the host.

  Args:
    key: a PRNG key, typed or raw. None gives the words of `key(0)` without
      calling JAX; words come back unchanged.

  Example:
    >>> words_of(None), words_of(jax.random.key(7))
    (array([0, 0], dtype=uint32), array([0, 7], dtype=uint32))
  """
  if key is None:
    return np.zeros(2, np.uint32)
  if isinstance(key, np.ndarray):
    return key
  return np.asarray(
    jax.random.key_data(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    else key
  )


def over_leading(
  function: Callable[..., Any],
  axes: int,
  *arrays: Any,
  places: Callable[..., Any] | None = None,
) -> Any:
  """Maps a function of single items over leading axes; `vmap` for JAX.

  Args:
    function: arrays -> a tuple of arrays.
    axes: how many leading axes there are; static.
    arrays: with those axes first, all of one library.
    places: where the results lie on a mesh with Explicit axes, as for
      `run_automatic`; None keeps the leading axes of the first array.

  Returns:
    The function's results with those axes first.

  Example:
    >>> over_leading(lambda x: (x.sum(),), 1, np.ones((2, 3)))
    (array([3., 3.]),)
  """
  if library_of(arrays[0]) is jnp:
    for _ in range(axes):
      function = jax.vmap(function)
    lead = lambda first, *_: PartitionSpec(*first[:axes])  # noqa: E731
    return run_automatic(function, arrays, places or lead)
  if axes == 0:
    return function(*arrays)
  found = [
    over_leading(function, axes - 1, *each)
    for each in zip(*arrays, strict=True)
  ]
  return jax.tree.map(lambda *parts: np.stack(parts), *found)


def times(rows: Any, matrix: Any) -> Any:
  """Computes `rows @ matrix` in the order that is fastest for the memory.

  Args:
    rows: (k, m), few of them.
    matrix: (m, n), of the same library.

  Returns:
    (k, n). For a transposed NumPy matrix it is a view of (n, k): BLAS is about
    a fifth faster with the large matrix on the left, untransposed.
  """
  is_turned = library_of(matrix) is np and matrix.T.flags.c_contiguous
  if is_turned and not matrix.flags.c_contiguous:
    return (matrix.T @ rows.T).T
  return rows @ matrix


def scaled(x: Any, factor: Any) -> Any:
  """Multiplies an array by a number, in place if it is NumPy's.

  Nobody else may hold the array.
  """
  if library_of(x) is np:
    x *= factor
    return x
  return x * factor
