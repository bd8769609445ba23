# SPDX-License-Identifier: Apache-2.0
"""One algorithm for arrays of NumPy and of JAX: what the two do differently.

JAX arrays are traced, compiled and sharded. NumPy arrays stay on the host,
where nothing has to be compiled and every size may depend on values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.numerics.meshes import run_automatic


def library_of(x: Any) -> Any:
  """The module whose functions take an array: `numpy` or `jax.numpy`.

  Args:
    x: an array or scalar of either.

  Returns:
    `numpy` for its arrays and scalars, else `jax.numpy`.

  Example:
    >>> library_of(np.ones(2)).__name__, library_of(jnp.ones(2)).__name__
    ('numpy', 'jax.numpy')
  """
  return np if isinstance(x, np.ndarray | np.generic) else jnp


def branch(which: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
  """`yes()` or `no()`, as `which` is true or false.

  Args:
    which: a bool scalar of either library.
    yes: without arguments.
    no: without arguments, its result shaped as the other's.

  Returns:
    The result of the one; `lax.cond` for JAX.

  Example:
    >>> branch(np.bool_(True), lambda: 1, lambda: 2)
    1
  """
  if library_of(which) is np:
    return yes() if which else no()
  return jax.lax.cond(which, yes, no)


def repeat(times: int, step: Callable[[Any, Any], Any], x: Any) -> Any:
  """`step(turn, x)` applied so many times.

  Args:
    times: static.
    step: (turn, x) -> x of the same shape.
    x: an array of either library.

  Returns:
    The last x; compiled once for JAX.

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
  """`step(state)` applied as long as `go_on(state)`.

  Args:
    go_on: state -> bool scalar.
    step: state -> state of the same shapes.
    state: a tuple of arrays, all of one library.

  Returns:
    The last state.

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
  """An array with a part of it replaced.

  Args:
    x: an array; NumPy's is written to.
    part: as many axes.
    corner: where the part begins on each axis.

  Returns:
    The array.

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
  """Some rows of an array.

  Args:
    x: an array.
    start: the first, may be traced.
    count: how many; static.

  Returns:
    (count, ...).

  Example:
    >>> rows_at(np.arange(4), 1, 2)
    array([1, 2])
  """
  if library_of(x) is jnp:
    return jax.lax.dynamic_slice_in_dim(x, start, count)
  return x[start : start + count]


def normal(key: Any, shape: tuple[int, ...], like: Any) -> Any:
  """Standard normal float32 values, of the library of another array.

  Args:
    key: a PRNG key, None for `key(0)`, or for the host uint32 words.
    shape: of the result.
    like: an array of the library that is wanted.

  Returns:
    `shape` float32. The libraries draw differently, each always the same.

  Example:
    >>> normal(None, (2, 3), np.ones(1)).dtype
    dtype('float32')
  """
  if library_of(like) is jnp:
    return jax.random.normal(jax.random.key(0) if key is None else key, shape)
  return np.random.default_rng(words_of(key)).standard_normal(shape, np.float32)


def words_of(key: Any) -> np.ndarray:
  """The uint32 words of a PRNG key, on the host.

  Args:
    key: a PRNG key, typed or raw; None for `key(0)`, without asking JAX; words
      stay as they are.

  Returns:
    (words,) uint32.

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
  """A function of single items, applied along leading axes.

  Args:
    function: arrays -> a tuple of arrays.
    axes: how many leading axes there are; static.
    arrays: with those axes first, all of one library.
    places: where the results lie on a mesh with Explicit axes, as for
      `run_automatic`; None keeps the leading axes of the first array.

  Returns:
    The function's results with those axes first; `vmap` for JAX.

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
  """`rows @ matrix`, in the order that is fastest for how the matrix lies.

  Args:
    rows: (k, m), few of them.
    matrix: (m, n), of the same library.

  Returns:
    (k, n). Of a transposed NumPy matrix it is a view of (n, k): BLAS is about a
    fifth faster with the large matrix on the left, untransposed.

  Example:
    >>> times(np.ones((1, 2)), np.array([[1.0, 2.0], [3.0, 4.0]]).T)
    array([[3., 7.]])
  """
  is_turned = library_of(matrix) is np and matrix.T.flags.c_contiguous
  if is_turned and not matrix.flags.c_contiguous:
    return (matrix.T @ rows.T).T
  return rows @ matrix


def scaled(x: Any, factor: Any) -> Any:
  """An array times a number, in the same memory if it is NumPy's.

  Args:
    x: an array that nobody else holds.
    factor: a number, or whatever broadcasts to x.

  Returns:
    `x * factor`.

  Example:
    >>> scaled(np.ones(2), 3.0)
    array([3., 3.])
  """
  if library_of(x) is np:
    x *= factor
    return x
  return x * factor
