# SPDX-License-Identifier: Apache-2.0
"""One pair of tensors at a time: read, compared, factored and measured.

The step is compiled once per shape and dtype and shared by all threads.
"""

import functools
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.certificates import certificate
from jlora.deltas import is_floating, rounding_noise
from jlora.extraction import delta_of, without_nan
from jlora.factoring import Factoriser, krylov
from jlora.loras import exchange, from_factors
from jlora.measurements import Measured, summarise
from jlora.pairs import Pair, names_of, read
from jlora.paths import key_for
from jlora.small_modules import is_small, measure_small
from jlora.views import MatrixView

_EQUAL = "equal in value, not in bytes"


class Outcome(NamedTuple):
  """What became of a pair.

  Attributes:
    status: "extracted", "unchanged", "kept whole" or "not representable".
    why: the reason, where the status alone does not say it.
    arrays: `a` and `b` of an extracted module.
    figures: its figures, for JSON.
  """

  status: str
  why: str = ""
  arrays: Mapping[str, np.ndarray] = {}
  figures: Mapping[str, Any] = {}


def measure_parameter(
  base: jax.Array,
  finetuned: jax.Array,
  key: jax.Array,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser,
  dtype: Any,
  stored: Any,
) -> Measured:
  """One parameter's change, factored, rounded to storage and certified.

  Args:
    base: the parameter, any floating dtype, its own layout.
    finetuned: the same shape.
    key: PRNG key of the module.
    view: how the layout is read as a matrix; static, as all below.
    rank: triplets to keep.
    factor: the factoriser.
    dtype: storage dtype of the factors.
    stored: dtype of the finetune's file, for its rounding noise.

  Returns:
    Measured, its norm NaN if the change is not finite. Pure; costs the
    factoriser and a certificate.

  Example:
    >>> from jlora.factoring import svd
    >>> w = jnp.zeros((3, 5))
    >>> m = measure_parameter(w, w + 1, jax.random.key(0), view=MatrixView(),
    ...   rank=1, factor=svd, dtype=jnp.float32, stored=jnp.float32)
    >>> m.certificate.errors.shape
    (2,)
  """
  delta, is_exchanged = delta_of(base, finetuned, view)
  delta, finite = without_nan(delta)
  factors = factor(delta, rank, key)
  lora = from_factors(factors, dtype)
  found = certificate(delta, lora, key)
  weights = base.astype(jnp.float32)
  return Measured(
    lora=exchange(lora) if is_exchanged else lora,
    sigma=factors.s,
    certificate=found._replace(norm=jnp.where(finite, found.norm, jnp.nan)),
    base_norm=jnp.sqrt(jnp.sum(jnp.square(weights), axis=-1).sum()),
    noise_std=rounding_noise(finetuned, stored),
  )


class Extractor:
  """Factors pairs of two checkpoints; safe to call from several threads.

  Attributes:
    compilations: how many distinct shapes were compiled so far.

  Example:
    >>> from jlora.factoring import svd
    >>> from jlora.pairs import Part
    >>> w = np.zeros((3, 5), np.float32)
    >>> step = Extractor(svd, jnp.float32, None)
    >>> pair = Pair("w", (3, 5), Part("w"), Part("w"))
    >>> step(pair, MatrixView(), 2, {"w": w}, {"w": w + 1}).status
    'extracted'
  """

  def __init__(self, factor: Factoriser, dtype: Any, key: jax.Array | None):
    self._factor, self._dtype, self._key = factor, dtype, key
    self._compiled: dict[Any, Any] = {}
    self._locks: dict[Any, threading.Lock] = {}
    self._lock = threading.Lock()

  @property
  def compilations(self) -> int:
    """Distinct shapes compiled so far."""
    return len(self._compiled)

  def __call__(
    self,
    pair: Pair,
    view: MatrixView | None,
    rank: int,
    base: Mapping[str, Any],
    finetuned: Mapping[str, Any],
  ) -> Outcome:
    """What becomes of a pair.

    Args:
      pair: which tensors.
      view: how they are read as a matrix; None: they are not factored.
      rank: triplets to keep, clipped to what the matrix has; 0: the matrix was
        not selected and is only compared.
      base: the base, name -> array.
      finetuned: the finetune.

    Returns:
      Outcome.

    Raises:
      ValueError: NaN or infinity in either tensor.
    """
    left, right = read_pair(pair, base, finetuned)
    if not is_floating(left.dtype) or not is_floating(right.dtype):
      same = np.array_equal(left, right)
      why = "" if same else f"not floating: {left.dtype} and {right.dtype}"
      return Outcome("unchanged" if same else "not representable", why)
    if not pair.whole and _is_same(left, right):
      return Outcome("unchanged")
    if not pair.whole and not (view and rank) and _is_equal(left, right):
      return Outcome("unchanged", _EQUAL)
    if view is not None and rank == 0:
      return Outcome("not representable", "not selected")
    if pair.whole or view is None:
      _check_finite(pair.path, right)
      return Outcome("kept whole")
    return self._factored(
      pair, view, rank, left, right, _stored(finetuned, pair)
    )

  def _factored(self, pair, view, rank, left, right, stored) -> Outcome:
    shape = view.shape(pair.shape)
    rank = min(rank, *shape[-2:])
    measured = self._measured(pair.path, left, right, view, rank, stored)
    norm = np.asarray(measured.certificate.norm)
    if not np.all(np.isfinite(norm)):
      _check_finite(pair.path, left, right)
      raise ValueError(
        f"{pair.path}: the change is larger than float32 holds; the checkpoint "
        "is damaged or training diverged."
      )
    figures = summarise(
      jax.tree.map(np.asarray, measured.certificate),
      np.asarray(measured.sigma),
      shape,
      base_norm=float(measured.base_norm),
      noise_std=float(measured.noise_std),
    )
    if figures["norm"] == 0:
      return Outcome("unchanged", _EQUAL)
    arrays = {
      "a": np.asarray(measured.lora.a),
      "b": np.asarray(measured.lora.b),
    }
    return Outcome("extracted", "", arrays, {"shape": list(shape), **figures})

  def _measured(self, path, left, right, view, rank, stored) -> Measured:
    if self._factor is krylov and is_small(view.shape(left.shape)):
      return measure_small(
        left, right, view=view, rank=rank, dtype=self._dtype, stored=stored
      )
    step = self._step(left, right, view, rank, stored)
    return step(left, right, key_for(self._key, path))

  def _step(self, left, right, view, rank, stored):
    """The compiled step for these shapes; the first thread to ask compiles."""
    signature = (left.shape, left.dtype, right.dtype, view, rank, stored)
    with self._lock:
      lock = self._locks.setdefault(signature, threading.Lock())
    with lock:
      if signature not in self._compiled:
        step = functools.partial(
          measure_parameter,
          view=view,
          rank=rank,
          factor=self._factor,
          dtype=self._dtype,
          stored=stored,
        )
        shapes = (
          jax.ShapeDtypeStruct(array.shape, array.dtype)
          for array in (left, right)
        )
        key = jax.eval_shape(lambda: key_for(self._key, ""))
        self._compiled[signature] = jax.jit(step).lower(*shapes, key).compile()
    return self._compiled[signature]


def read_pair(
  pair: Pair, base: Mapping[str, Any], finetuned: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
  """Both tensors of a pair, of the base's shape unless the pair is kept whole.

  Args:
    pair: which tensors.
    base: the base, name -> array.
    finetuned: the finetune. Rows it lacks (a smaller vocabulary) are filled
      with the base's: their change is zero.

  Returns:
    (base, finetuned).

  Example:
    >>> from jlora.pairs import Part
    >>> pair = Pair("w", (2,), Part("w"), Part("w", (slice(0, 1),)))
    >>> read_pair(pair, {"w": np.zeros(2)}, {"w": np.ones(1)})[1]
    array([1., 0.])
  """
  left, right = read(base, pair.base), read(finetuned, pair.finetuned)
  if not pair.whole and right.shape[:1] < left.shape[:1]:
    rest = left[right.shape[0] :].astype(right.dtype)
    right = np.concatenate([right, rest])
  return left, right


def _is_same(left: np.ndarray, right: np.ndarray) -> bool:
  """Whether two tensors hold the same bytes (so NaN equals itself)."""
  if left.dtype != right.dtype or left.shape != right.shape:
    return False
  word = np.dtype(f"u{left.dtype.itemsize}")
  return np.array_equal(
    np.ascontiguousarray(left).view(word),
    np.ascontiguousarray(right).view(word),
  )


def _is_equal(left: np.ndarray, right: np.ndarray) -> bool:
  """Whether two tensors hold the same values, whatever their dtypes."""
  return np.array_equal(left.astype(np.float32), right.astype(np.float32))


def _stored(finetuned: Mapping[str, Any], pair: Pair) -> np.dtype:
  """The dtype of the finetune's file, float8 too."""
  specs = getattr(finetuned, "spec", finetuned)
  return np.dtype(specs[names_of(pair.finetuned)[0]].dtype)


def _check_finite(path: str, *arrays: np.ndarray) -> None:
  for side, array in zip(
    ("base", "finetuned")[-len(arrays) :], arrays, strict=True
  ):
    bad = array.size - int(np.isfinite(array.astype(np.float32)).sum())
    if bad:
      raise ValueError(
        f"{path}: {bad} of {array.size} values of the {side} tensor are NaN or "
        "infinite; the checkpoint is damaged or training diverged."
      )
