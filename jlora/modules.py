# SPDX-License-Identifier: Apache-2.0
"""One pair of tensors at a time: read, compared, factored and measured.

On a CPU the step runs on NumPy arrays: compiling it would take longer than many
models need, and a GEMM is as fast. On accelerators it is compiled, once per
shape and dtype, and shared by all threads.
"""

import functools
import inspect
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.arrays import library_of, words_of
from jlora.certificates import certificate
from jlora.deltas import is_floating, survey
from jlora.extraction import in_stored_order
from jlora.factoring import Factoriser
from jlora.loras import Factors, exchange, from_factors
from jlora.measurements import Measured, summarise
from jlora.pairs import Pair, Stack, names_of, read
from jlora.paths import key_for
from jlora.rounding import ulp_histogram
from jlora.views import MatrixView

_EQUAL = "equal in value, not in bytes"
_COMPARED = 2**18  # bytes of a tensor that are compared at a time
# Whatever is larger than any block it saw freed, up to 32 MiB, glibc maps anew
# each time and unmaps: half of a run's page faults. One block raises that mark.
_MAPPED = 2**25 - 2**13


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
  base: Any,
  finetuned: Any,
  key: Any,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser,
  dtype: Any,
  stored: Any,
  room: np.ndarray | None = None,
) -> Measured:
  """One parameter's change, factored, rounded to storage and certified.

  Args:
    base: the parameter, any floating dtype, its own layout; of NumPy or of
      JAX, as its result.
    finetuned: the same shape.
    key: PRNG key of the module; for NumPy, words of one.
    view: how the layout is read as a matrix; static, as all below.
    rank: triplets to keep.
    factor: the factoriser; given the `sums` of the delta if it takes them.
    dtype: storage dtype of the factors.
    stored: dtype of the finetune's file, for its rounding noise.
    room: as for `survey`, for NumPy alone.

  Returns:
    Measured, its norm NaN if the change is not finite. Pure; costs the
    factoriser and a certificate.

  Example:
    >>> from jlora.factoring import svd
    >>> w = np.zeros((3, 5), np.float32)
    >>> m = measure_parameter(w, w + 1, None, view=MatrixView(), rank=1,
    ...   factor=svd, dtype=np.float32, stored=np.float32)
    >>> m.certificate.errors.shape
    (2,)
  """
  delta, found = survey(base, finetuned, stored, room)
  delta, is_exchanged = in_stored_order(delta, view)
  xp = library_of(delta)
  # Of a batch the sums are of all matrices together, and of no use.
  known = {"sums": found.sums} if delta.ndim == 2 else {}
  given = known if _takes(factor, "sums") else {}
  factors = Factors(*map(xp.asarray, factor(delta, rank, key, **given)))
  lora = from_factors(factors, dtype)
  certified = certificate(delta, lora, key, **known)
  norm = xp.where(found.is_finite, certified.norm, np.nan)
  return Measured(
    lora=exchange(lora) if is_exchanged else lora,
    sigma=factors.s,
    certificate=certified._replace(norm=norm),
    base_norm=found.base_norm,
    noise_std=found.noise_std,
    unchanged=found.unchanged,
    ulps=ulp_histogram(base, finetuned, stored),
  )


def _takes(function: Callable[..., Any], name: str) -> bool:
  """Whether a function has a parameter of that name."""
  try:
    return name in inspect.signature(function).parameters
  except (TypeError, ValueError):  # some of C have no signature
    return False


class Extractor:
  """Factors pairs of two checkpoints; safe to call from several threads.

  Args:
    factor: the factoriser.
    dtype: storage dtype of the factors.
    key: PRNG key; each module uses its own, from its path.
    on_host: whether the step runs on NumPy arrays; None: if JAX has CPUs alone.

  Attributes:
    compilations: how many distinct shapes were compiled so far.

  Example:
    >>> from jlora.factoring import svd
    >>> from jlora.pairs import Part
    >>> w = np.zeros((3, 5), np.float32)
    >>> step = Extractor(svd, np.float32, None)
    >>> pair = Pair("w", (3, 5), Part("w"), Part("w"))
    >>> step(pair, MatrixView(), 2, {"w": w}, {"w": w + 1}).status
    'extracted'
  """

  def __init__(
    self,
    factor: Factoriser,
    dtype: Any,
    key: jax.Array | None,
    on_host: bool | None = None,
  ):
    self._factor, self._dtype, self._key = factor, dtype, key
    is_cpu = on_host is None and jax.default_backend() == "cpu"
    self._on_host = is_cpu or bool(on_host)
    self._compiled: dict[Any, Any] = {}
    self._locks: dict[Any, threading.Lock] = {}
    self._lock = threading.Lock()
    self._own = threading.local()
    if self._on_host:
      np.empty(_MAPPED, np.uint8)  # freed at once, and never touched

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
    """What becomes of a pair that is not the same on both sides (`is_same`).

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
    rooms = None
    if self._on_host:
      rooms = [functools.partial(self._room, side) for side in ("base", "ft")]
    left, right = read_pair(pair, base, finetuned, rooms)
    if not is_floating(left.dtype) or not is_floating(right.dtype):
      same = np.array_equal(left, right)
      why = "" if same else f"not floating: {left.dtype} and {right.dtype}"
      return Outcome("unchanged" if same else "not representable", why)
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
      unchanged=float(measured.unchanged),
      ulps=np.asarray(measured.ulps),
    )
    if figures["norm"] == 0:
      return Outcome("unchanged", _EQUAL)
    arrays = {
      "a": np.asarray(measured.lora.a),
      "b": np.asarray(measured.lora.b),
    }
    return Outcome("extracted", "", arrays, {"shape": list(shape), **figures})

  def _measured(self, path, left, right, view, rank, stored) -> Measured:
    options = {
      "view": view,
      "rank": rank,
      "factor": self._factor,
      "dtype": self._dtype,
      "stored": stored,
    }
    if self._on_host:
      name = np.uint32(zlib.crc32(path.encode()))
      words = np.append(words_of(self._key), name)
      room = self._room("delta", left.size, np.float32)
      return measure_parameter(left, right, words, **options, room=room)
    key = key_for(self._key, path)
    return self._step(left, right, key, options)(left, right, key)

  def _room(self, name: str, size: int, dtype: Any = np.uint8) -> np.ndarray:
    """This thread's memory of a name, kept from module to module."""
    own = self._own.__dict__
    if name not in own or own[name].size < size:
      own.pop(name, None)  # given back before more is asked for
      own[name] = np.empty(size, dtype)
    return own[name]

  def _step(self, left, right, key, options):
    """The compiled step for these shapes; the first thread to ask compiles."""
    signature = (left.shape, left.dtype, right.dtype, *options.values())
    with self._lock:
      lock = self._locks.setdefault(signature, threading.Lock())
    with lock:
      if signature not in self._compiled:
        step = functools.partial(measure_parameter, **options)
        shapes = (
          jax.ShapeDtypeStruct(array.shape, array.dtype)
          for array in (left, right, key)
        )
        self._compiled[signature] = jax.jit(step).lower(*shapes).compile()
    return self._compiled[signature]


def read_pair(
  pair: Pair,
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  rooms: Sequence[Callable[[int], np.ndarray]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Both tensors of a pair, of the base's shape unless the pair is kept whole.

  Args:
    pair: which tensors.
    base: the base, name -> array.
    finetuned: the finetune. Rows it lacks (a smaller vocabulary) are filled
      with the base's: their change is zero.
    rooms: as for `read`, one for either side.

  Returns:
    (base, finetuned).

  Example:
    >>> from jlora.pairs import Part
    >>> pair = Pair("w", (2,), Part("w"), Part("w", (slice(0, 1),)))
    >>> read_pair(pair, {"w": np.zeros(2)}, {"w": np.ones(1)})[1]
    array([1., 0.])
  """
  one, two = rooms or (None, None)
  left, right = read(base, pair.base, one), read(finetuned, pair.finetuned, two)
  if not pair.whole and right.shape[:1] < left.shape[:1]:
    rest = left[right.shape[0] :].astype(right.dtype)
    right = np.concatenate([right, rest])
  return left, right


def is_same(
  pair: Pair, base: Mapping[str, Any], finetuned: Mapping[str, Any]
) -> bool:
  """Whether both tensors of a pair hold the same bytes (so NaN equals itself).

  Read a few rows at a time, up to the first that differ.

  Args:
    pair: which tensors.
    base: the base, name -> array.
    finetuned: the finetune.

  Returns:
    bool. False for what is kept whole, for stacks and for parts of tensors.

  Example:
    >>> from jlora.pairs import Part
    >>> pair = Pair("w", (2,), Part("w"), Part("w"))
    >>> is_same(pair, {"w": np.zeros(2)}, {"w": np.zeros(2)})
    True
  """
  sides = pair.base, pair.finetuned
  if pair.whole or any(
    isinstance(side, Stack) or side.index or side.swap for side in sides
  ):
    return False
  left, right = (
    getattr(checkpoint, "spec", checkpoint)[names_of(side)[0]]
    for checkpoint, side in zip((base, finetuned), sides, strict=True)
  )
  if left.dtype != right.dtype or left.shape != right.shape:
    return False
  return all(
    np.array_equal(_words(one), _words(two))
    for one, two in _rows_of(pair, left, base, finetuned)
  )


def _rows_of(pair, spec, base, finetuned):
  """Both tensors of a pair, a few rows at a time where files have rows."""
  rows = spec.shape[0] if spec.shape else 1
  step = rows
  if getattr(spec, "start", None) is not None and rows:
    step = max(1, rows * _COMPARED // max(spec.nbytes, 1))
  for start in range(0, rows, step):
    index = (slice(start, start + step),) if step < rows else ()
    yield tuple(
      read(checkpoint, side._replace(index=index))
      for checkpoint, side in ((base, pair.base), (finetuned, pair.finetuned))
    )


def _words(array: np.ndarray) -> np.ndarray:
  """The bits of an array, in the longest words that they fill."""
  bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return bits.view(np.uint64) if bits.size % 8 == 0 else bits


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
