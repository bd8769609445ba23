# SPDX-License-Identifier: Apache-2.0
"""Opens the inputs of a merge, cuts them into pieces and stacks them."""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.float8 import FLOAT8
from jlora.merging.checkpoints.planning import InputTensor, Job
from jlora.merging.checkpoints.tokens import gather_rows
from jlora.pairing.pairs import Rows, TensorPart, read_side

_ALIGNED = 64  # XLA uses memory of this alignment without copying it
_READ = 2**18  # entries read at a time: they stay in the cache


class Piece(NamedTuple):
  """A part of an array whose entries lie one after the other.

  Attributes:
    index: index of the leading axes.
    size: number of entries.
    start: position of its first entry in the flat array.
  """

  index: tuple[Any, ...]
  size: int
  start: int = 0


class Stored(NamedTuple):
  """A whole tensor in a file, of which `[index]` reads a part.

  Attributes:
    checkpoint: an open checkpoint.
    name: the tensor's name.
    shape: its shape.
    dtype: its stored dtype.
  """

  checkpoint: Any
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  def __getitem__(self, index: Any) -> np.ndarray:
    return self.checkpoint.read(self.name, index)


def find_stored(
  models: Mapping[str, Any], job: Job, source: InputTensor
) -> Stored | None:
  """Returns an input that is a whole tensor of a file, else None.

  Args:
    models: name -> checkpoint.
    job: the tensor's job.
    source: one of its inputs.

  Returns:
    Stored. None for what cannot be read as it lies in the file: parts of
    tensors, fused experts, float8, weights that an adapter changes, orbax
    leaves.
  """
  model, side = models[source.model], source.side
  if not hasattr(model, "read") or not isinstance(side, TensorPart):
    return None
  spec = model.spec[side.name]
  is_whole = side == TensorPart(side.name) and tuple(spec.shape) == job.shape
  if not is_whole or spec.start is None or spec.dtype in FLOAT8:
    return None
  return Stored(model, side.name, job.shape, spec.dtype)


def open_input(
  models: Mapping[str, Any], job: Job, source: InputTensor
) -> Stored | np.ndarray:
  """Opens an input of a tensor; reads it unless it is a `Stored`.

  Args:
    models: name -> checkpoint, the reference first.
    job: the tensor's job.
    source: one of its inputs.

  Returns:
    Stored if possible, else the array in the job's shape; rows that the model
    lacks are the reference's.

  Example:
    >>> job = Job("w", (2,), np.dtype(np.float32), (), None, None)
    >>> one = InputTensor("a", TensorPart("w"))
    >>> open_input({"a": {"w": np.ones(2)}}, job, one)
    array([1., 1.])
  """
  if stored := find_stored(models, job, source):
    return stored
  if isinstance(source.side, Rows):
    return read_by_token(models, source)
  array = read_side(models[source.model], source.side)
  if array.shape[:1] < job.shape[:1]:
    first = next(iter(models.values()))
    rest = read_side(first, TensorPart(job.name, (slice(len(array), None),)))
    array = np.concatenate([array, rest.astype(array.dtype)])
  return array


def read_by_token(models: Mapping[str, Any], source: InputTensor) -> np.ndarray:
  """Reads a table whose rows are in the order of the result's tokens.

  Args:
    models: name -> checkpoint.
    source: an input whose side is `Rows`.

  Returns:
    (rows, ...) in the stored dtype, float32 where rows of others stand in it.

  Raises:
    ValueError: the side is something else.

  Example:
    >>> source = InputTensor("a", Rows("w", (1, -1)), ((1, (("b", "v", 0),)),))
    >>> models = {"a": {"w": np.ones((2, 1))}, "b": {"v": np.zeros((1, 1))}}
    >>> read_by_token(models, source).tolist()
    [[1.0], [0.0]]
  """
  if not isinstance(source.side, Rows):
    raise ValueError(f"{source} is no table in the order of tokens.")
  fills = {
    row: tuple(((model, name), number) for model, name, number in given)
    for row, given in source.fills
  }
  keys = dict.fromkeys(key for given in fills.values() for key, _ in given)
  tables = {
    (model, name): read_side(models[model], TensorPart(name))
    for model, name in keys
  }
  own = read_side(models[source.model], TensorPart(source.side.name))
  return gather_rows(tables, own, source.side.rows, fills)


def pieces_of(shape: Sequence[int], limit: int) -> list[Piece]:
  """Cuts an array into pieces, in the order of its entries.

  Args:
    shape: the array's shape.
    limit: the most entries of a piece.

  Returns:
    Pieces; a single one with index `()` if the array is no larger than `limit`.

  Example:
    >>> pieces_of((3, 2), 4)
    [Piece(index=(slice(0, 2, None),), size=4, start=0),
     Piece(index=(slice(2, 3, None),), size=2, start=4)]
    >>> [piece.index for piece in pieces_of((1, 3), 2)]
    [(0, slice(0, 2, None)), (0, slice(2, 3, None))]
  """
  size = math.prod(shape)
  if size <= limit:
    return [Piece((), size)]
  count, row = shape[0], size // shape[0]
  if row > limit:
    inner = pieces_of(shape[1:], limit)
    return [
      Piece((at, *piece.index), piece.size, at * row + piece.start)
      for at in range(count)
      for piece in inner
    ]
  step = limit // row
  ends = [(at, min(at + step, count)) for at in range(0, count, step)]
  return [Piece((slice(a, b),), (b - a) * row, a * row) for a, b in ends]


class Rooms:
  """Buffers for stacked inputs, reused; several threads may use them at once.

  The kernel clears new memory page by page, which takes longer than most
  merges.

  Example:
    >>> with Rooms().stacked([np.ones(3), np.zeros(3)]) as stack:
    ...   stack
    array([[1., 1., 1.],
           [0., 0., 0.]], dtype=float32)
  """

  def __init__(self):
    self._free: list[np.ndarray] = []
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def stacked(
    self,
    inputs: Sequence[Stored | np.ndarray],
    piece: Piece | None = None,
    shape: tuple[int, ...] | None = None,
  ) -> Iterator[np.ndarray]:
    """Stacks inputs, or one piece of each, for the duration of the context.

    Args:
      inputs: n of one shape, floating.
      piece: which piece of each; None is all.
      shape: shape of the result for a piece, zeros after its last entry.

    Yields:
      (n, ...) in the inputs' dtype; float32 if they differ or it is wider.
    """
    kinds = {one.dtype for one in inputs}
    kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    kind = kind if kind.itemsize <= 4 else np.dtype(np.float32)
    own = inputs[0].shape if shape is None else shape
    with self._taken((len(inputs), *own), kind) as stack:
      for at, one in enumerate(inputs):
        _fill(stack[at, ...], one, piece)
      yield stack

  @contextlib.contextmanager
  def _taken(
    self, shape: tuple[int, ...], dtype: np.dtype
  ) -> Iterator[np.ndarray]:
    """Lends a buffer of the given shape, allocated if none is free."""
    nbytes = math.prod(shape) * dtype.itemsize
    with self._lock:
      fits = [at for at, room in enumerate(self._free) if len(room) >= nbytes]
      at = min(fits, key=lambda at: len(self._free[at]), default=None)
      room = None if at is None else self._free.pop(at)
    if room is None:
      room = np.empty(nbytes + _ALIGNED, np.uint8)
      room = room[-room.ctypes.data % _ALIGNED :][:nbytes]
    try:
      yield room[:nbytes].view(dtype).reshape(shape)
    finally:
      with self._lock:
        self._free.append(room)


def _fill(
  out: np.ndarray, one: Stored | np.ndarray, piece: Piece | None
) -> None:
  """Reads an input, or a piece of it, into an array."""
  with np.errstate(over="ignore"):  # of float64; the merger tells
    if piece is None:
      for part in pieces_of(one.shape, _READ):
        out[part.index] = one[part.index]
      return
    flat = out.reshape(-1)
    flat[: piece.size] = one[piece.index].reshape(-1)
    flat[piece.size :] = 0
