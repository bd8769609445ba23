# SPDX-License-Identifier: Apache-2.0
"""Merges one tensor at a time: reads its inputs and runs the method."""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.merging.arrays.averages import passthrough
from jlora.merging.arrays.draws import place_of
from jlora.merging.checkpoints.on_host import (
  LARGEST,
  small_programs,
  works_on_host,
)
from jlora.merging.checkpoints.piecewise import (
  DRAWN,
  is_piecewise,
  told_of,
  unbind,
  whole_sums_of,
)
from jlora.merging.checkpoints.planning import Job
from jlora.merging.checkpoints.reading import (
  Piece,
  Rooms,
  find_stored,
  open_input,
  pieces_of,
)
from jlora.messages import name_some
from jlora.numerics.backends import words_of
from jlora.numerics.finite import is_finite, not_finite, rounded
from jlora.pairing.comparison import stored_dtype
from jlora.paths import key_for
from jlora.runs.compiled import Programs
from jlora.selection import is_floating

_PIECE = 2**20  # entries: a piece's inputs and result stay in the cache
_SMALL = 2**12  # entries of a piece that is a bias or a norm
_ROW = 2**10
_ONE = (("weights", (1.0,)),)


class Merger:
  """The method of a merge, run on one tensor or piece; thread-safe.

  Programs are compiled once for each shape. Numbers are their arguments, so
  gradients over layers need no further compilation.

  Args:
    method: `(stack, weights, base, *, key, **settings) -> array`.
    models: name -> checkpoint.
    key: PRNG key; each tensor uses its own, from its name.
    jobs: all that will be merged: where programs would have little to do,
      NumPy merges and nothing is compiled.

  Example:
    >>> from jlora.merging.checkpoints.planning import InputTensor
    >>> from jlora.merging import linear
    >>> from jlora.pairing.pairs import TensorPart
    >>> given = [InputTensor(name, TensorPart("w")) for name in "ab"]
    >>> job = Job("w", (2,), np.dtype(np.float32), tuple(given), None,
    ...           (("weights", (1.0, 3.0)),))
    >>> left, right = np.float32([0, 4]), np.float32([4, 0])
    >>> Merger(linear, {"a": {"w": left}, "b": {"w": right}}, None)(job)
    array([3., 1.], dtype=float32)
  """

  def __init__(
    self,
    method: Callable[..., Any],
    models: Mapping[str, Any],
    key: Any,
    jobs: Iterable[Job] = (),
  ):
    words = words_of(key)
    self._key = words if words.shape == (2,) else key  # of another generator
    self._method, self._models = method, models
    self._plain, self._defaults = unbind(method)
    self._sums = whole_sums_of(method)
    self._rooms = Rooms()
    self._told = told_of(method)
    self._programs = Programs()
    self._works_on_host = works_on_host(method)
    self._small = small_programs(
      (self._program(job), math.prod(job.shape)) for job in jobs
    )

  def pieces(self, job: Job) -> list[Piece] | list[None]:
    """Lists the pieces that a tensor is made in.

    Args:
      job: what the tensor is made of.

    Returns:
      Pieces in the order of the entries; [None] if it is made as a whole.
    """
    return pieces_of(job.shape, _PIECE) if self._is_cut(job) else [None]

  def _is_cut(self, job: Job) -> bool:
    """Returns whether a tensor is made in pieces."""
    if not self.is_copied(job) and not is_piecewise(self._method):
      return False
    given = [*job.sources, *([] if job.base is None else [job.base])]
    stored = [find_stored(self._models, job, one) for one in given]
    return all(one and is_floating(one.dtype) for one in stored)

  def is_copied(self, job: Job) -> bool:
    """Returns whether the only source is the result, up to its dtype.

    Args:
      job: what a tensor is made of.

    Returns:
      bool.
    """
    is_one = self._method is passthrough and job.settings == _ONE
    return is_one or job.settings is None

  def is_measured(self, job: Job) -> bool:
    """Returns whether pieces need the sums that `measure` computes.

    Args:
      job: what a tensor is made of.

    Returns:
      bool.
    """
    if self._sums is None or self.is_copied(job) or 0 in job.shape:
      return False
    return not self._is_told(job, self._sums.setting)

  def measure(self, job: Job, piece: Piece) -> np.ndarray:
    """Computes a piece's share of the sums that its method needs.

    Args:
      job: what the tensor is made of.
      piece: one piece of it.

    Returns:
      float32, of one shape for all pieces; `__call__` adds them up.

    Raises:
      ValueError: the tensor is not `is_measured`.
    """
    if self._sums is None:
      raise ValueError(f"{job.name}: its method needs no sums.")
    fixed = (self._sums.of, np.dtype(np.float32))
    return self._called(fixed, job, self._open(job), _numbers(job), piece)

  def __call__(
    self,
    job: Job,
    piece: Piece | None = None,
    measured: Sequence[np.ndarray] = (),
  ) -> np.ndarray:
    """Merges a tensor, or a piece of it.

    Args:
      job: what the tensor is made of.
      piece: one of `pieces`; None is the whole tensor.
      measured: the `measure` of every piece, if `is_measured`.

    Returns:
      The array in the job's dtype and shape; a piece's entries are flat, or as
      they lie if the tensor is only copied.

    Raises:
      ValueError: as the method; tensors that are not floating and differ; NaN
        or infinity in a parameter; or a result that its dtype does not hold.
        Names the tensor.
    """
    if 0 in job.shape:  # methods look for the largest of what there is
      return np.empty(job.shape, job.dtype)
    leaves = self._open(job)
    if self.is_copied(job):
      return _copied(job, leaves[0][() if piece is None else piece.index])
    if not is_floating(job.dtype):
      return _same(job, [leaf[()] for leaf in leaves[: len(job.sources)]])
    numbers = _numbers(job)
    if measured and self._sums is not None:
      total = np.sum(measured, axis=0, dtype=np.float64)
      numbers[self._sums.setting] = total.astype(np.float32)
    # Without x64 there is no float64 in JAX.
    narrow = np.dtype(np.float32) if job.dtype.itemsize > 4 else job.dtype
    merged = self._called((self._method, narrow), job, leaves, numbers, piece)
    if piece is not None:
      merged = merged.reshape(-1)[: piece.size]
    if not is_finite(merged):
      raise _why_not_finite(job, leaves, narrow)
    return merged.astype(job.dtype, copy=False)

  def _open(self, job: Job) -> list[Any]:
    """Opens a tensor's inputs, and last its base if it has one."""
    given = [*job.sources, *([] if job.base is None else [job.base])]
    return [open_input(self._models, job, one) for one in given]

  def _called(self, fixed, job, leaves, numbers, piece) -> np.ndarray:
    """Runs a function on opened inputs, called as methods are."""
    count, is_on_host = len(job.sources), self.is_on_host(job)
    shape = None if piece is None else _layout(piece, is_on_host)
    is_drawn = self._plain in DRAWN
    is_keyed = piece is None or is_drawn
    key = key_for(self._key, job.name) if is_keyed else None
    if piece is not None and is_drawn:
      numbers["start"] = place_of(piece.start)
    with contextlib.ExitStack() as rooms:
      stack, *base = (
        rooms.enter_context(self._rooms.stacked(some, piece, shape))
        for some in (leaves[:count], leaves[count:])
        if some
      )
      base = base[0][0] if base else None
      # In pieces each entry is made of the same of the inputs, unless dropped.
      if piece is None or is_drawn:
        every = [*stack, *([] if base is None else [base])]
        if not all(map(is_finite, every)):
          raise _why_not_finite(job, leaves, stack.dtype)
      if base is not None and not is_on_host and self._is_told_first(job):
        numbers |= self._told_first(stack, base, numbers)
      try:
        if is_on_host:
          with np.errstate(all="ignore"):  # as XLA does
            return np.asarray(_merge(fixed, stack, base, numbers, key))
        return np.asarray(self._run(_merge, fixed, stack, base, numbers, key))
      except ValueError as error:
        raise ValueError(f"{job.name}: {error}") from error

  def is_on_host(self, job: Job) -> bool:
    """Returns whether NumPy merges a tensor, and nothing is compiled for it.

    Args:
      job: what the tensor is made of.

    Returns:
      bool; hangs on sizes alone.
    """
    if not self._works_on_host or self._program(job) not in self._small:
      return False
    return math.prod(job.shape) <= LARGEST or self._is_cut(job)

  def _program(self, job: Job) -> Hashable:
    """Returns what the tensors have in common that a program merges."""
    shape = None if self._is_cut(job) else job.shape
    return shape, len(job.sources), job.base is not None, job.dtype

  def check(self, job: Job) -> None:
    """Raises unless the method accepts a job's settings; compiles nothing.

    Args:
      job: what a tensor is made of.

    Raises:
      ValueError: as the method; names the tensor.
    """
    if job.settings is None:
      return
    settings = _numbers(job)
    if self._works_on_host:
      self._check_on_host(job, settings)
      return
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
    except (TypeError, ValueError) as error:  # settings lack, or are not known
      raise ValueError(f"{job.name}: {error}") from error

  def check_kinds(self, job: Job) -> None:
    """Raises unless all inputs of a tensor are floating as it is, or none is.

    Args:
      job: what a tensor is made of; headers are looked at.

    Raises:
      ValueError: names the tensor, and each model with its dtype.
    """
    given = [*job.sources, *([] if job.base is None else [job.base])]
    dtypes = {
      one.model: stored_dtype(self._models[one.model], one.side)
      for one in given
    }
    if len({is_floating(x) for x in (job.dtype, *dtypes.values())}) > 1:
      said = name_some(f"{name} {dtype}" for name, dtype in dtypes.items())
      raise ValueError(
        f"{job.name} is {job.dtype} in the result and of several kinds in the "
        f"models: {said}. Integers are not merged with floats; dequantise them "
        "first."
      )

  def _check_on_host(self, job: Job, settings: dict[str, Any]) -> None:
    """Raises unless the method accepts settings, by merging a few zeros."""
    zeros = np.zeros((len(job.sources), 1, 1), np.float32)
    base = None if job.base is None else zeros[0]
    fixed = (self._method, np.dtype(np.float32))
    try:
      with np.errstate(all="ignore"):
        _merge(fixed, zeros, base, settings, np.zeros(2, np.uint32))
    except (TypeError, ValueError) as error:  # settings lack, or are not known
      raise ValueError(f"{job.name}: {error}") from error

  def _is_told(self, job: Job, setting: str) -> bool:
    """Returns whether an argument of the method is already set."""
    return setting in self._defaults or setting in dict(job.settings or ())

  def _is_told_first(self, job: Job) -> bool:
    """Returns whether the host finds something before the method runs."""
    if self._told is None or self._is_told(job, self._told.setting):
      return False
    return jax.default_backend() == "cpu"

  def _told_first(self, stack, base, numbers) -> dict[str, Any]:
    """Finds it, and drops the setting that it replaces."""
    told: Any = self._told
    given = numbers.pop(told.instead_of, told.default)
    return {told.setting: told.of(stack, base, given)}

  def _run(self, function, fixed, *given):
    """Runs a function compiled; compiles it on the first call."""
    leaves, structure = jax.tree.flatten(given)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    step = jax.jit(functools.partial(function, fixed))
    program = self._programs.get(
      (function, fixed, structure, kinds), lambda: step.lower(*given).compile()
    )
    return program(*given)


def _numbers(job: Job) -> dict[str, Any]:
  """Returns the job's settings as float32 numbers."""
  return {name: np.float32(value) for name, value in job.settings or ()}


def _layout(piece: Piece, is_on_host: bool) -> tuple[int, ...]:
  """Returns the shape of a piece; to compile few programs one of two."""
  if is_on_host:
    return (piece.size,)
  return (_SMALL if piece.size <= _SMALL else _PIECE) // _ROW, _ROW


def _why_not_finite(job: Job, leaves, dtype: np.dtype) -> ValueError:
  """Returns the error for a tensor that is not finite; names the model."""
  given = [*job.sources, *([job.base] if job.base else [])]
  for one, leaf in zip(given, leaves, strict=True):
    if not is_finite(array := leaf[()]):
      return not_finite(f"{job.name} of {one.model}", array, array.dtype)
  return ValueError(
    f"{job.name}: merged it has values that {dtype.name} does not hold, over "
    f"{float(jnp.finfo(dtype).max):.6g}; give another `dtype` or weights."
  )


def _copied(job: Job, array: np.ndarray) -> np.ndarray:
  """Returns a tensor that is copied, in the job's dtype.

  Parameters must be finite. What is no parameter, a mask say, stays as it is,
  but what was finite must be in the dtype, too.
  """
  if not is_floating(job.dtype):
    return _as_integers(job, array)
  if job.settings is not None:
    return rounded(f"{job.name} of {job.sources[0].model}", array, job.dtype)
  if array.dtype == job.dtype or not is_finite(array):
    with np.errstate(over="ignore"):
      return array.astype(job.dtype, copy=False)
  return rounded(job.name, array, job.dtype)


def _same(job: Job, arrays: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the first array if all are equal, else raises."""
  if all(np.array_equal(arrays[0], other) for other in arrays):
    return _as_integers(job, arrays[0])
  raise ValueError(
    f"{job.name}: not floating, and models differ, so that there is no mean: "
    "make them alike, or merge without all but one of them."
  )


def _as_integers(job: Job, array: np.ndarray) -> np.ndarray:
  """Returns integers in the job's dtype; raises if it does not hold them."""
  found = array.astype(job.dtype, copy=False)
  if np.array_equal(found, array):
    return found
  raise ValueError(
    f"{job.name} of {job.sources[0].model} is {array.dtype}, and its values "
    f"are not those of {job.dtype}, which the result has: save it in that "
    "dtype, or take another base_model."
  )


def _merge(fixed, stack, base, numbers, key):
  """Runs a method in float32 and rounds its result once."""
  method, dtype = fixed
  numbers = dict(numbers)
  stack = stack.astype(jnp.float32)
  below = None if base is None else base.astype(jnp.float32)
  merged = method(stack, numbers.pop("weights"), below, key=key, **numbers)
  return merged.astype(dtype)
