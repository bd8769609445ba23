# SPDX-License-Identifier: Apache-2.0
"""One tensor of a merge at a time: its inputs read, its method run."""

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.deltas import is_floating
from jlora.merge_inputs import (
  Piece,
  Rooms,
  find_stored,
  open_input,
  pieces_of,
)
from jlora.merge_jobs import Job
from jlora.merging.averages import passthrough
from jlora.merging.pieces import PIECEWISE, SUMS
from jlora.merging.task_vectors import ties
from jlora.merging.thresholds import count_of
from jlora.paths import key_for

_PIECE = 2**20  # entries: inputs and result of a piece stay in the cache
_SMALL = 2**12  # that of biases and norms
_ROW = 2**10
_ONE = (("weights", (1.0,)),)


class Merger:
  """Makes tensors of a merge; safe to call from several threads.

  Programs are compiled once for each shape. Numbers are their arguments, so
  that gradients over layers compile nothing more.

  Args:
    method: `(stack, weights, base, *, key, **settings) -> array`.
    models: name -> checkpoint.
    key: PRNG key; each tensor uses its own, from its name.

  Example:
    >>> from jlora.merge_jobs import Source
    >>> from jlora.merging.averages import linear
    >>> from jlora.pairs import Part
    >>> sources = (Source("a", Part("w")), Source("b", Part("w")))
    >>> job = Job("w", (2,), np.dtype(np.float32), sources, None,
    ...           (("weights", (1.0, 3.0)),))
    >>> left, right = np.float32([0, 4]), np.float32([4, 0])
    >>> Merger(linear, {"a": {"w": left}, "b": {"w": right}}, None)(job)
    array([3., 1.], dtype=float32)
  """

  def __init__(
    self,
    method: Callable[..., Any],
    models: Mapping[str, Any],
    key: jax.Array | None,
  ):
    self._method, self._models, self._key = method, models, key
    self._plain = getattr(method, "func", method)
    self._defaults = getattr(method, "keywords", {})
    self._rooms = Rooms()
    self._compiled: dict[Any, Any] = {}
    self._lock = threading.Lock()
    self._locks: dict[Any, threading.Lock] = {}

  def pieces(self, job: Job) -> list[Piece] | list[None]:
    """The pieces that a tensor can be made by.

    Args:
      job: what it is made of.

    Returns:
      Pieces, in the order of its entries; [None] where it is made as a whole.
    """
    given = [*job.sources, *([] if job.base is None else [job.base])]
    stored = [find_stored(self._models, job, one) for one in given]
    is_cut = self._is_kept(job) or self._plain in PIECEWISE
    if is_cut and all(one and is_floating(one.dtype) for one in stored):
      return pieces_of(job.shape, _PIECE)
    return [None]

  def is_measured(self, job: Job) -> bool:
    """Whether pieces need what `measure` finds in all of them.

    Args:
      job: what a tensor is made of.

    Returns:
      bool.
    """
    if self._plain not in SUMS or self._is_kept(job):
      return False
    return not self._is_told(job, SUMS[self._plain].setting)

  def measure(self, job: Job, piece: Piece) -> np.ndarray:
    """A piece's share of what the method must be told of the whole tensor.

    Args:
      job: what it is made of.
      piece: of it.

    Returns:
      (k,) float32.
    """
    leaves = [open_input(self._models, job, one) for one in job.sources]
    of = SUMS[self._plain].of
    with self._rooms.stacked(leaves, piece, _layout(piece)) as stack:
      return np.array(self._run(_in_float32, of, stack))

  def __call__(
    self,
    job: Job,
    piece: Piece | None = None,
    measured: Sequence[np.ndarray] = (),
  ) -> np.ndarray:
    """The tensor, or a piece of it.

    Args:
      job: what it is made of.
      piece: which, of `pieces`; None is all.
      measured: where `is_measured`, of all pieces.

    Returns:
      The array, in the job's dtype and shape; a piece's as it comes.

    Raises:
      ValueError: the method's, or tensors that are not floating and differ;
        with the tensor's name.
    """
    leaves = [open_input(self._models, job, one) for one in job.sources]
    if self._is_kept(job):
      kept = leaves[0][() if piece is None else piece.index]
      return kept.astype(job.dtype, copy=False)
    if not is_floating(leaves[0].dtype):
      return _same(job, [leaf[()] for leaf in leaves])
    if job.base is not None:
      leaves.append(open_input(self._models, job, job.base))
    numbers: dict[str, Any] = {
      name: np.asarray(value, np.float32) for name, value in job.settings or ()
    }
    if measured:
      total = np.sum(measured, axis=0, dtype=np.float64)
      numbers[SUMS[self._plain].setting] = total.astype(np.float32)
    try:
      return self._merged(job, leaves, numbers, piece)
    except ValueError as error:
      raise ValueError(f"{job.name}: {error}") from error

  def _merged(self, job, leaves, numbers, piece) -> np.ndarray:
    """A method's result of inputs, the last of which is the base if any is."""
    count = len(job.sources)
    shape = None if piece is None else _layout(piece)
    key = key_for(self._key, job.name) if piece is None else None
    with contextlib.ExitStack() as rooms:
      stack, *base = (
        rooms.enter_context(self._rooms.stacked(some, piece, shape))
        for some in (leaves[:count], leaves[count:])
        if some
      )
      base = base[0][0] if base else None
      if base is not None and self._is_trimmed(job):
        numbers["threshold"] = self._thresholds(stack, base, numbers)
      fixed = (self._method, job.dtype)
      merged = np.asarray(self._run(_merge, fixed, stack, base, numbers, key))
    return merged if piece is None else merged.reshape(-1)[: piece.size]

  def check(self, job: Job) -> None:
    """Nothing, if the method takes a job's settings; traced, not compiled.

    Args:
      job: what a tensor is made of.

    Raises:
      ValueError: the method's, with the tensor's name.
    """
    if job.settings is None:
      return
    settings = {name: np.float32(value) for name, value in job.settings}
    one = jax.ShapeDtypeStruct((1, 1), np.float32)
    stack = jax.ShapeDtypeStruct((len(job.sources), 1, 1), np.float32)
    base = None if job.base is None else one
    call = functools.partial(_merge, (self._method, np.dtype(np.float32)))
    try:
      jax.eval_shape(
        lambda stack, base, key: call(stack, base, settings, key),
        stack,
        base,
        jax.random.key(0),
      )
    except ValueError as error:
      raise ValueError(f"{job.name}: {error}") from error

  def _is_told(self, job: Job, setting: str) -> bool:
    return setting in self._defaults or setting in dict(job.settings or ())

  def _is_trimmed(self, job: Job) -> bool:
    """Whether NumPy's selection does for TIES what takes XLA 31 passes."""
    is_open = self._plain is ties and not self._is_told(job, "threshold")
    return is_open and jax.default_backend() == "cpu"

  def _thresholds(self, leaves, base, numbers) -> np.ndarray:
    """The magnitude that the density of each model's changes reaches."""
    density = numbers.pop("density", self._defaults.get("density", 0.2))
    found = []
    shares = np.broadcast_to(np.float32(density), (len(leaves),))
    for leaf, share in zip(leaves, shares, strict=True):
      sizes = np.array(_magnitudes(leaf, base)).reshape(-1)
      count = int(count_of(share, sizes.size))
      at = sizes.size - count
      if count:
        sizes.partition(at)
      found.append(sizes[at] if count else np.nan)
    return np.asarray(found, np.float32)

  def _is_kept(self, job: Job) -> bool:
    """Whether the only source is the result, but for its dtype."""
    is_one = self._method is passthrough and job.settings == _ONE
    return is_one or job.settings is None

  def _run(self, function, fixed, *given):
    """A function's result by a compiled program; the first to ask compiles."""
    leaves, structure = jax.tree.flatten(given)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    signature = (function, fixed, structure, kinds)
    with self._lock:
      lock = self._locks.setdefault(signature, threading.Lock())
    with lock:
      if signature not in self._compiled:
        step = jax.jit(functools.partial(function, fixed))
        self._compiled[signature] = step.lower(*given).compile()
    return self._compiled[signature](*given)


def _in_float32(function, stack):
  return function(stack.astype(jnp.float32))


def _layout(piece: Piece) -> tuple[int, int]:
  """The shape of a piece with zeros after it: few, to compile few programs."""
  return (_SMALL if piece.size <= _SMALL else _PIECE) // _ROW, _ROW


def _same(job: Job, arrays: Sequence[np.ndarray]) -> np.ndarray:
  if all(np.array_equal(arrays[0], other) for other in arrays):
    return arrays[0]
  raise ValueError(f"{job.name}: not floating, and models differ.")


@jax.jit
def _magnitudes(leaf, base):
  return jnp.abs(leaf.astype(jnp.float32) - base.astype(jnp.float32))


def _merge(fixed, stack, base, numbers, key):
  """A method's result, in float32 and rounded once."""
  method, dtype = fixed
  numbers = dict(numbers)
  stack = stack.astype(jnp.float32)
  below = None if base is None else base.astype(jnp.float32)
  merged = method(stack, numbers.pop("weights"), below, key=key, **numbers)
  return merged.astype(dtype)
