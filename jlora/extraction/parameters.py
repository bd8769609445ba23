# SPDX-License-Identifier: Apache-2.0
"""Factors the change of one parameter: compiled, or at once on the host.

Eager arrays that a CPU holds are NumPy's without a copy. To compile a program
for each of their shapes would take seconds; the step that `extract_checkpoint`
runs on NumPy arrays takes none.
"""

import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.factoring.deltas import Survey, difference, survey
from jlora.factoring.factorisers import Factoriser, krylov
from jlora.loras import Factors, Lora, exchange, from_factors
from jlora.numerics.backends import library_of, words_of
from jlora.numerics.finite import is_finite
from jlora.numerics.meshes import constrain, run_automatic, sharding_of
from jlora.views import MatrixView, in_stored_order


class Factored(NamedTuple):
  """A change and its Lora, in the order of the parameter's memory.

  Attributes:
    lora: of the delta as it lies.
    delta: (..., in, out) or (..., out, in), float32.
    sigma: (..., r) singular values found.
    sums: keyword `sums` for what reads the delta again; empty for a batch.
    is_exchanged: whether it lies as (..., out, in).
  """

  lora: Lora
  delta: Any
  sigma: Any
  sums: dict[str, Any]
  is_exchanged: bool


def factor_change(
  delta: Any,
  found: Survey,
  key: Any,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser,
  dtype: Any,
) -> Factored:
  """Factors a surveyed change as a matrix, and rounds the factors.

  Args:
    delta: from `survey`, in the parameter's own layout; of NumPy or of JAX.
    found: what `survey` found.
    key: PRNG key of the module; for NumPy, the words of one.
    view: how the layout is read as a matrix.
    rank: triplets to keep.
    factor: the factoriser; it is given the delta's `sums` if it takes them.
    dtype: storage dtype of the factors.

  Returns:
    Factored, of the delta's library.

  Example:
    >>> from jlora.factoring import svd
    >>> delta, found = survey(np.zeros((2, 3)), np.ones((2, 3)), np.float32)
    >>> factor_change(delta, found, None, view=MatrixView(), rank=1, factor=svd,
    ...               dtype=np.float32).sigma.round(4)
    array([2.4495], dtype=float32)
  """
  delta, is_exchanged = in_stored_order(delta, view)
  xp = library_of(delta)
  # For a batch the sums are over all its matrices, so they are of no use.
  known = {"sums": found.sums} if delta.ndim == 2 else {}
  given = known if _takes(factor, "sums") else {}
  factors = Factors(*map(xp.asarray, factor(delta, rank, key, **given)))
  with np.errstate(over="ignore"):  # told by `check_factors`
    lora = from_factors(factors, dtype)
  return Factored(lora, delta, factors.s, known, is_exchanged)


def check_factors(path: str, lora: Lora, dtype: Any) -> None:
  """Raises if factors of a finite change are not finite as they are stored.

  Args:
    path: the module.
    lora: a and b as stored, of NumPy or of JAX.
    dtype: what they were rounded to.

  Raises:
    ValueError: with the dtypes that hold them.

  Example:
    >>> a = np.full((1, 2), np.inf, np.float16)
    >>> check_factors("q", Lora(a, a, np.float32(1)), np.float16)
    Traceback (most recent call last):
    ...
    ValueError: q: the factors are larger than float16 holds, 65504; store them
    in bfloat16 or float32.
  """
  if not all(is_finite(np.asarray(x)) for x in (lora.a, lora.b)):
    most = float(jnp.finfo(dtype).max)
    others = "bfloat16 or float32" if most < 1e6 else "float32"
    raise ValueError(
      f"{path}: the factors are larger than {jnp.dtype(dtype).name} holds, "
      f"{most:.6g}; store them in {others}."
    )


def is_on_host(*arrays: Any) -> bool:
  """Returns whether arrays can be taken as NumPy's without moving them.

  Args:
    *arrays: of NumPy or of JAX, traced or not; None is nothing.

  Returns:
    True for eager arrays on one CPU without a mesh, and for NumPy arrays if
    JAX's default device is a CPU, or if one is of float64, which JAX would
    round.

  Example:
    >>> is_on_host(np.ones(2), jnp.ones(2)), jax.jit(is_on_host)(jnp.ones(2))
    (True, Array(False, dtype=bool))
  """
  is_cpu = jax.default_backend() == "cpu"
  is_wide = any(
    isinstance(array, np.ndarray) and array.dtype == np.float64
    for array in arrays
  )

  def is_near(array: Any) -> bool:
    if array is None:
      return True
    if isinstance(array, Tracer) or sharding_of(array) is not None:
      return False
    if isinstance(array, jax.Array):
      devices = array.devices()
      is_here = all(d.platform == "cpu" for d in devices)
      return len(devices) == 1 and (is_here or is_wide)
    return isinstance(array, np.ndarray) and (is_wide or is_cpu)

  return all(map(is_near, arrays))


def extract_on_host(
  base: Any,
  finetuned: Any,
  key: jax.Array | None,
  path: str,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser,
  dtype: Any,
) -> Lora:
  """Extracts the Lora of one parameter's change, by NumPy and LAPACK.

  Args:
    base: the parameter, any floating dtype, for which `is_on_host` is true.
    finetuned: the same shape.
    key: PRNG key of the whole run, or None.
    path: the module's path, of which its random numbers depend.
    view: how the layout is read as a matrix.
    rank: units to keep.
    factor: the factoriser, which is given NumPy arrays and the key's words.
    dtype: storage dtype.

  Returns:
    Lora of NumPy arrays, with the bits that `extract_checkpoint` gives on a CPU
    if BLAS uses one thread, as it does there; scale NaN if the change is not
    finite. Several threads may call this.

  Raises:
    ValueError: factors larger than `dtype` holds.

  Example:
    >>> w = jnp.zeros((3, 5), jnp.bfloat16)
    >>> extract_on_host(w, w + 1, None, "w", view=MatrixView(), rank=1,
    ...                 factor=krylov, dtype=jnp.float32).a.shape
    (1, 3)
  """
  left, right = np.asarray(base), np.asarray(finetuned)
  delta, found = survey(left, right, right.dtype)
  rank = min(rank, *view.shape(left.shape)[-2:])
  one = factor_change(
    delta, found, words_for(key, path), view=view, rank=rank, factor=factor,
    dtype=dtype,
  )  # fmt: skip
  lora = exchange(one.lora) if one.is_exchanged else one.lora
  if found.is_finite:
    check_factors(path, lora, dtype)
  else:
    unknown: Any = np.full_like(lora.scale, np.nan)
    lora = Lora(lora.a, lora.b, unknown)
  return lora


def words_for(key: jax.Array | None, path: str) -> np.ndarray:
  """Returns the words that NumPy draws a module's random numbers from.

  Args:
    key: PRNG key of the run, or None.
    path: the module's path.

  Example:
    >>> words_for(jax.random.key(7), "q").tolist()
    [0, 7, 4110462503]
  """
  return np.append(words_of(key), np.uint32(zlib.crc32(path.encode())))


def put_beside(tree: Any, *arrays: Any) -> Any:
  """Returns NumPy's leaves as JAX arrays, on the device others are kept on.

  Example:
    >>> put_beside(np.ones(2), jnp.ones(3)).devices() == jnp.ones(3).devices()
    True
  """
  kept = [x for x in arrays if isinstance(x, jax.Array) and x.committed]
  # jnp.asarray would compile a copy for each shape.
  return jax.device_put(tree, kept[0].sharding if kept else None)


@functools.partial(
  jax.jit, static_argnames=("view", "rank", "factor", "dtype", "sharding")
)
def extract_parameter(
  base: jax.Array,
  finetuned: jax.Array,
  key: jax.Array,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser = krylov,
  dtype: Any = jnp.float32,
  sharding: Lora | None = None,
) -> Lora:
  """Extracts the Lora of one parameter's change, read as (..., in, out).

  Args:
    base: the parameter, any floating dtype, its own layout.
    finetuned: the same shape.
    key: PRNG key of the module.
    view: how the layout is read as a matrix; static, as all below.
    rank: units to keep.
    factor: the factoriser. Equal shapes share a compilation.
    dtype: storage dtype.
    sharding: of the result's leaves, from `of_adapter`; needed for parameters
      whose type has Explicit axes. None leaves it to the compiler.

  Returns:
    Lora with a (..., r, in), b (..., r, out), scale 1; scale NaN if either
    parameter is not finite, or the factors are larger than `dtype` holds.

  Example:
    >>> w = jnp.zeros((3, 5), jnp.bfloat16)
    >>> extract_parameter(w, w + 1, jax.random.key(0), view=MatrixView(),
    ...                   rank=1).a.shape
    (1, 3)
  """

  def step(base, finetuned, key):
    """Factors the change; gives a scale of NaN if it is not finite."""
    delta, is_exchanged = in_stored_order(difference(base, finetuned), view)
    is_whole = jnp.isfinite(delta).all()
    delta = jnp.where(is_whole, delta, 0.0)  # LAPACK may not return from NaN
    lora = from_factors(factor(delta, rank, key), dtype)
    if jnp.dtype(dtype).itemsize < 4:
      is_whole &= jnp.isfinite(lora.a).all() & jnp.isfinite(lora.b).all()
    scale = jnp.where(is_whole, lora.scale, jnp.nan)
    lora = Lora(lora.a, lora.b, scale)
    return exchange(lora) if is_exchanged else lora

  if sharding is None:
    return step(base, finetuned, key)
  specs = jax.tree.map(lambda own: own.spec, sharding)
  mesh: Any = jax.tree.leaves(sharding)[0].mesh
  lora = run_automatic(step, (base, finetuned, key), lambda *_: specs, mesh)
  return constrain(lora, sharding)


def _takes(function: Callable[..., Any], name: str) -> bool:
  """Returns whether a function has a parameter of that name."""
  try:
    return name in inspect.signature(function).parameters
  except (TypeError, ValueError):  # some C functions have no signature
    return False
