# SPDX-License-Identifier: Apache-2.0
"""What of a change is no matrix: found, weighed, and kept as `Shift` programs.

Norms, scales and biases have no factors. They are returned densely, or named.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.adapting.programs import Shift
from jlora.extraction.parameters import is_on_host, put_beside
from jlora.factoring.deltas import difference
from jlora.messages import name_some
from jlora.numerics.sums import norm_of
from jlora.selection import Select, is_floating

Shape = tuple[int, ...]


def rest_of(
  leaves: Mapping[str, Any], modules: Mapping[str, Any], select: Select
) -> list[str]:
  """Lists the floating parameters that are selected, but are no matrices.

  A selection that looks at axes (`is_matrix`) would refuse every vector. So it
  is asked what it would say if the parameter was a matrix.

  Args:
    leaves: path -> anything with `.shape` and `.dtype`.
    modules: the paths that are read as matrices.
    select: `(path, leaf) -> bool`.

  Returns:
    Paths.

  Example:
    >>> leaves = {"q/kernel": np.ones((2, 3)), "q/bias": np.ones(3)}
    >>> rest_of(leaves, {"q/kernel"}, lambda path, leaf: len(leaf.shape) == 2)
    ['q/bias']
  """

  def is_wanted(path: str, leaf: Any) -> bool:
    return select(path, leaf) or (
      len(leaf.shape) < 2
      and select(path, jax.ShapeDtypeStruct((2, 2), leaf.dtype))
    )

  return [
    path
    for path, leaf in leaves.items()
    if path not in modules and is_floating(leaf.dtype) and is_wanted(path, leaf)
  ]


def shift_of(base: Any, finetuned: Any, dtype: Any) -> Shift:
  """Returns a parameter's whole change as a program.

  Args:
    base: the parameter, any floating dtype; of NumPy or of JAX.
    finetuned: the same shape.
    dtype: storage dtype of the change.

  Returns:
    Shift of a JAX array. Elementwise: keeps its inputs' sharding.

  Example:
    >>> shift_of(jnp.ones(2, jnp.bfloat16), jnp.array([1.0, 3.0]), jnp.float32)
    Shift(delta=Array([0., 2.], dtype=float32))
  """
  if is_on_host(base, finetuned):
    delta = difference(np.asarray(base), np.asarray(finetuned))
    with np.errstate(over="ignore"):  # it is infinite then, as under jit
      return Shift(put_beside(delta.astype(dtype), base, finetuned))
  return Shift(jnp.asarray(difference(base, finetuned)).astype(dtype))


def change_norm(base: Any, finetuned: Any) -> float | None:
  """Returns the Frobenius norm of a change; None where it is traced.

  Args:
    base: the parameter; of NumPy or of JAX.
    finetuned: the same shape.

  Example:
    >>> change_norm(jnp.zeros(2), np.array([3.0, 4.0]))
    5.0
  """
  if isinstance(base, Tracer) or isinstance(finetuned, Tracer):
    return None
  if is_on_host(base, finetuned):
    delta = difference(np.asarray(base), np.asarray(finetuned))
    return norm_of(delta)
  norm = _norm(base, finetuned)
  # A jitted function may close over arrays of several devices.
  return None if isinstance(norm, Tracer) else float(norm)


@jax.jit
def _norm(base: Any, finetuned: Any) -> jax.Array:
  """Computes the norm of a change, wherever it lies."""
  return jnp.sqrt(jnp.sum(jnp.square(difference(base, finetuned))))


def warn_of_rest(
  norms: Mapping[str, float | None], whole: float, shapes: Mapping[str, Shape]
) -> None:
  """Warns of changes that are left out because they are no matrices.

  Args:
    norms: path -> norm of the change of what is left out; None where it is
      traced, so that nobody knows whether it changed.
    whole: the norm of all changes, these included.
    shapes: path -> shape.

  Warns:
    UserWarning: names up to three, those that changed most first, with shapes
      and shares of the whole; of traced ones those of two axes or more.

  Example:
    >>> norms, shapes = {"n": 3.0, "bias": 0.0}, {"n": (4,), "bias": (4,)}
    >>> with warnings.catch_warnings(record=True, action="always") as seen:
    ...   warn_of_rest(norms, 5.0, shapes)
    >>> str(seen[0].message).split(", ")[1]
    '60.0% of the change: n (4,) 60.0%. `shifts=True` returns them too.'
  """
  changed = {path: norm for path, norm in norms.items() if norm}
  if changed:
    share = lambda norm: f"{norm / whole:.1%}"  # noqa: E731
    named = [
      f"{path} {shapes[path]} {share(changed[path])}"
      for path in sorted(changed, key=lambda path: -changed[path])
    ]
    together = share(math.hypot(*changed.values()))
    warnings.warn(
      f"{len(changed)} changed parameters are no matrices and left out, "
      f"{together} of the change: {name_some(named)}. `shifts=True` returns "
      "them too.",
      stacklevel=3,
    )
  wide = [
    f"{path} {shapes[path]}"
    for path, norm in norms.items()
    if norm is None and len(shapes[path]) > 1
  ]
  if wide:
    warnings.warn(
      f"{len(wide)} parameters are no matrices and left out, changed or not: "
      f"{name_some(wide)}. `shifts=True` returns them too.",
      stacklevel=3,
    )


def warn_of_others(base: Mapping[str, Any], finetuned: Mapping[str, Any]):
  """Warns of leaves that differ and that no program can carry: not floating.

  Numbers of Python are such leaves too, as they are no arrays.

  Args:
    base: path -> leaf.
    finetuned: the same paths; traced leaves are passed over.

  Example:
    >>> with warnings.catch_warnings(record=True, action="always") as seen:
    ...   warn_of_others({"step": np.int32(3)}, {"step": np.int32(4)})
    >>> print(seen[0].message)
    1 leaves that differ are not floating and left out: step.
  """
  others = [
    path
    for path, leaf in base.items()
    if path in finetuned
    and _is_number(leaf)
    and _is_number(finetuned[path])
    and not (_is_floating(leaf) and _is_floating(finetuned[path]))
    and not np.array_equal(leaf, finetuned[path])
  ]
  if others:
    warnings.warn(
      f"{len(others)} leaves that differ are not floating and left out: "
      f"{name_some(others)}.",
      stacklevel=3,
    )


def _is_floating(leaf: Any) -> bool:
  """Returns whether a leaf is an array of floating dtype, so is a parameter."""
  return hasattr(leaf, "dtype") and is_floating(leaf.dtype)


def _is_number(leaf: Any) -> bool:
  """Returns whether a leaf's values can be looked at here."""
  if isinstance(leaf, int | float | complex):
    return True
  if isinstance(leaf, Tracer) or not isinstance(
    leaf, jax.Array | np.ndarray | np.generic
  ):
    return False
  is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
  return is_here and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
