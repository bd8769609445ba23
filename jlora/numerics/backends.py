# SPDX-License-Identifier: Apache-2.0
"""What NumPy and JAX do differently, behind one function each.

With them an algorithm is written once. JAX arrays are traced, compiled and
sharded. NumPy arrays stay on the host, where nothing has to be compiled and
sizes may depend on values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.numerics.meshes import run_automatic


def library_of(x: Any) -> Any:
  """Returns the module whose functions take an array: `numpy` or `jax.numpy`.

  Args:
    x: an array or scalar of either.

  Returns:
    `numpy` for its arrays and scalars, else `jax.numpy`.

  Example:
    >>> library_of(np.ones(2)).__name__, library_of(jnp.ones(2)).__name__
    ('numpy', 'jax.numpy')
  """
  return np if isinstance(x, np.ndarray | np.generic) else jnp


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
