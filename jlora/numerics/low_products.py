# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix kept in bfloat16 and added up in float32.

Where a processor has units for products of bfloat16 they take a third of
float32's time or less. Rows lose about 1e-3 of themselves: directions are found
all the same, and are then measured in full.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import library_of

#: Multiplies a few rows by a matrix.
Multiply = Callable[[Any], Any]

# What Linux calls x86's matrix units. Its vectors of bfloat16 (avx512_bf16) are
# twice as fast as float32's, and a whole extraction gained nothing by them.
_UNITS = "amx_bf16"
# Below this many entries the call of a compiled product costs what it saves.
_LARGE = 2**21
# XLA reads arrays of NumPy in place that begin at a multiple of this.
_ALIGNED = 64


def is_faster(matrix: Any) -> bool:
  """Returns whether products in bfloat16 pay for a matrix, where it lies.

  It is known of a processor, not measured: the same machine gives the same
  factors each time.

  Args:
    matrix: (m, n), of NumPy or of JAX, also traced.

  Returns:
    True for two million entries or more, on TPUs, GPUs and CPUs with AMX.

  Example:
    >>> is_faster(np.ones((3, 3), np.float32))
    False
  """
  if matrix.shape[-1] * matrix.shape[-2] < _LARGE:
    return False
  on_host = library_of(matrix) is np or jax.default_backend() == "cpu"
  return not on_host or _has_units()


@functools.cache
def _has_units() -> bool:
  """Reads whether this machine's processor has units for bfloat16."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return False
  lines = (line for line in text.splitlines() if line.startswith("flags"))
  return _UNITS in next(lines, "").split()


def low_products(matrix: Any, half: Any) -> tuple[Multiply, Multiply]:
  """Makes the products of rows with a matrix, in bfloat16.

      rows -> rows a half²,   rows -> rows aᵀ half²

  Args:
    matrix: a, (m, n) float32; of NumPy or of JAX.
    half: a power of two, whose square scales a.

  Returns:
    Both: (k, m) -> (k, n), and (k, n) -> (k, m), float32 of the same library.
    Costs a copy of half the matrix's size. NumPy's products are compiled, once
    for each shape.

  Example:
    >>> forward, back = low_products(np.eye(2, 3, dtype=np.float32),
    ...                              np.float32(2))
    >>> forward(np.ones((1, 2), np.float32))
    array([[4., 4., 0.]], dtype=float32)
    >>> back(np.ones((1, 3), np.float32))
    array([[4., 4.]], dtype=float32)
  """
  if library_of(matrix) is jnp:
    low = (matrix * half).astype(jnp.bfloat16)
    return (
      lambda rows: _along_rows(rows, low) * half,
      lambda rows: _along_columns(rows, low) * half,
    )
  is_turned = not matrix.flags.c_contiguous and matrix.T.flags.c_contiguous
  low = _on_cpu(matrix.T if is_turned else matrix, half)

  def run(product: Any, rows: np.ndarray) -> np.ndarray:
    """Calls a compiled product; the result may be written to."""
    return np.multiply(product(rows, low), half, dtype=np.float32)

  products = _compiled_rows, _compiled_columns
  forward, back = reversed(products) if is_turned else products
  return functools.partial(run, forward), functools.partial(run, back)


def _on_cpu(matrix: np.ndarray, half: Any) -> jax.Array:
  """Returns a scaled matrix in bfloat16, a JAX array over NumPy's memory."""
  room = np.empty(matrix.size + _ALIGNED // 2, jnp.bfloat16)
  start = -room.ctypes.data % _ALIGNED // room.itemsize
  low = room[start : start + matrix.size].reshape(matrix.shape)
  np.multiply(matrix, half, out=low, casting="unsafe")
  return jax.device_put(low, jax.local_devices(backend="cpu")[0])


def _along_rows(rows: Any, low: Any) -> Any:
  """Computes `rows low`."""
  return _contract(rows, low, 0)


def _along_columns(rows: Any, low: Any) -> Any:
  """Computes `rows lowᵀ`."""
  return _contract(rows, low, 1)


def _contract(rows: Any, low: Any, axis: int) -> Any:
  """Adds up products over the columns of rows and an axis of the matrix."""
  return jax.lax.dot_general(
    rows.astype(low.dtype),
    low,
    (((1,), (axis,)), ((), ())),
    precision=jax.lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


_compiled_rows = jax.jit(_along_rows)
_compiled_columns = jax.jit(_along_columns)
