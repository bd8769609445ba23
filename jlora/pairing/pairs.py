# SPDX-License-Identifier: Apache-2.0
"""Pairs of a base parameter and its finetuned values, and how they are read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.float8 import FLOAT8


class TensorPart(NamedTuple):
  """A tensor on disk or a slice of it; `swap` exchanges its last two axes."""

  name: str
  index: tuple[Any, ...] = ()
  swap: bool = False


class Stack(NamedTuple):
  """A fused tensor to be put together from single ones.

  Attributes:
    experts: for each expert the tensors that are concatenated; the results are
      stacked.
    swap: whether the last two axes are then exchanged.
  """

  experts: tuple[tuple[TensorPart, ...], ...]
  swap: bool = False


class Rows(NamedTuple):
  """Rows of a table that has them in another order, or lacks some.

  Attributes:
    name: the table's name.
    rows: for each row of the result its row there; -1: there is none.
  """

  name: str
  rows: tuple[int, ...]


Side = TensorPart | Stack | Rows


class Pair(NamedTuple):
  """A parameter of the base, and where its base and finetuned values lie.

  Attributes:
    path: the parameter's name in the base, which is the adapter's.
    shape: its shape in the base.
    base: where the base's values lie.
    finetuned: where the finetuned values lie.
    note: why the two belong together, if the name alone does not tell.
    whole: whether the finetuned tensor is kept as it is, because its shape
      differs.
  """

  path: str
  shape: tuple[int, ...]
  base: TensorPart
  finetuned: Side
  note: str = ""
  whole: bool = False


class Pairing(NamedTuple):
  """All pairs of two checkpoints, and each side's names without a partner.

  Attributes:
    pairs: what belongs together.
    only_base: names of the base without a partner.
    only_finetuned: the same of the finetune.
    buffers: (side, name, why) of tensors that are no parameters.
  """

  pairs: list[Pair]
  only_base: list[str]
  only_finetuned: list[str]
  buffers: tuple[tuple[str, str, str], ...] = ()


# Bytes of a tensor that are read at a time into reused memory: they stay in the
# cache until they are in their place.
_PIECE = 2**19
# Larger tensors are read into new memory, since reused memory stays taken.
_KEPT = 2**25


def read_side(
  checkpoint: Any,
  side: Side,
  room: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
  """Reads the values of one side of a pair.

  Args:
    checkpoint: an open checkpoint, or any mapping from names to arrays.
    side: a TensorPart, a Stack of it or Rows of it; rows that are not there
      are NaN, and `read_pair` has the base's instead.
    room: number of bytes -> uint8 array of that size or more, in which the
      result may lie: memory that was used before costs less than new. It is
      called for whole tensors of files, of up to 32 MiB.

  Returns:
    The array, in its stored dtype (float32 for float8).

  Example:
    >>> read_side({"w": np.arange(6).reshape(2, 3)}, TensorPart("w", (1,)))
    array([3, 4, 5])
  """
  if isinstance(side, Stack):
    array = np.stack(
      [
        np.concatenate([read_side(checkpoint, part) for part in parts])
        for parts in side.experts
      ]
    )
  elif isinstance(side, Rows):
    rows = np.asarray(side.rows, int)
    array = checkpoint[side.name][rows]
    array[rows < 0] = np.nan
    return array
  elif room is not None and _is_plain(checkpoint, side):
    array = _read_into(room, checkpoint, side.name)
  elif side.index and hasattr(checkpoint, "read"):
    array = checkpoint.read(side.name, side.index)
  else:
    array = checkpoint[side.name][side.index]
  return np.swapaxes(array, -1, -2) if side.swap else array


def read_region_of_side(
  checkpoint: Any, side: Side, region: tuple[slice, ...]
) -> np.ndarray:
  """Reads a region of one side of a pair.

  Args:
    checkpoint: an open checkpoint, or any mapping from names to arrays.
    side: a TensorPart or a Stack of it.
    region: a slice for every axis of what `read_side` returns.

  Returns:
    `read_side(checkpoint, side)[region]`. Of a TensorPart no more is read than
    `Checkpoint.read` needs for the region; of a Stack only the region's
    experts, one by one; of Rows all.

  Example:
    >>> whole = {"w": np.arange(6).reshape(2, 3)}
    >>> swapped = TensorPart("w", (), True)
    >>> read_region_of_side(whole, swapped, (slice(1, 3), slice(1)))
    array([[1],
           [2]])
  """
  if isinstance(side, Rows):
    return read_side(checkpoint, side)[region]
  inner = (*region[:-2], *region[-2:][::-1]) if side.swap else region
  if isinstance(side, Stack):
    array = np.stack(
      [
        np.concatenate([read_side(checkpoint, part) for part in parts])[
          inner[1:]
        ]
        for parts in side.experts[inner[0]]
      ]
    )
  else:
    spec = getattr(checkpoint, "spec", checkpoint)[side.name]
    index = _composed(side.index, inner, spec.shape)
    is_lazy = hasattr(checkpoint, "read")
    array = (
      checkpoint.read(side.name, index)
      if is_lazy
      else checkpoint[side.name][index]
    )
  return np.swapaxes(array, -1, -2) if side.swap else array


def _composed(outer, inner, shape) -> tuple[Any, ...]:
  """Combines an index of integers and slices with an index of its result."""
  left, found = iter(inner), []
  for entry, size in zip(outer, shape, strict=False):
    if isinstance(entry, slice):
      run = range(size)[entry][next(left)]
      found.append(slice(run.start, run.stop))
    else:
      found.append(entry)
  return (*found, *left)


def _is_plain(checkpoint: Any, side: TensorPart) -> bool:
  """Returns whether a side is a whole tensor of a file that fits `room`."""
  spec: Any = getattr(checkpoint, "spec", {}).get(side.name)
  return (
    getattr(spec, "start", None) is not None
    and not side.index
    and spec.dtype not in FLOAT8
    and 0 < spec.nbytes <= _KEPT
    and len(spec.shape) > 0
  )


def _read_into(
  room: Callable[[int], np.ndarray], checkpoint: Any, name: str
) -> np.ndarray:
  """Reads a tensor of a file into reused memory, a few rows at a time."""
  spec = checkpoint.spec[name]
  array = room(spec.nbytes)[: spec.nbytes].view(spec.dtype).reshape(spec.shape)
  rows = max(1, _PIECE * len(array) // spec.nbytes)
  for start in range(0, len(array), rows):
    part = slice(start, start + rows)
    array[part] = checkpoint.read(name, (part,))
  return array


def names_of(side: Side) -> list[str]:
  """Returns the names of the tensors that a side of a pair is read from."""
  if isinstance(side, TensorPart | Rows):
    return [side.name]
  return [part.name for parts in side.experts for part in parts]
