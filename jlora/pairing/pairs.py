# SPDX-License-Identifier: Apache-2.0
"""A pair: a parameter of the base and what the finetune made of it, on disk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.float8 import FLOAT8


class TensorPart(NamedTuple):
  """A tensor on disk or a slice of it, its last two axes exchanged or not."""

  name: str
  index: tuple[Any, ...] = ()
  swap: bool = False


class Stack(NamedTuple):
  """A fused tensor put together: experts stacked, their parts concatenated."""

  experts: tuple[tuple[TensorPart, ...], ...]
  swap: bool = False


class Pair(NamedTuple):
  """A parameter of the base and what the finetune made of it.

  Attributes:
    path: the parameter's name in the base, which is the adapter's.
    shape: its shape in the base.
    base: where the base's values lie.
    finetuned: where the finetuned values lie.
    note: why the two belong together, if the name alone does not say it.
    whole: the finetuned tensor is to be kept as it is (its shape differs).
  """

  path: str
  shape: tuple[int, ...]
  base: TensorPart
  finetuned: TensorPart | Stack
  note: str = ""
  whole: bool = False


class Pairing(NamedTuple):
  """All pairs, and the names on either side that found no partner."""

  pairs: list[Pair]
  only_base: list[str]
  only_finetuned: list[str]


# Bytes of a tensor that are read at a time into memory that is there: they
# stay in the cache until they are put in their place.
_PIECE = 2**19
# What is larger is read into new memory: what is kept adds up.
_KEPT = 2**25


def read_side(
  checkpoint: Any,
  side: TensorPart | Stack,
  room: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
  """The values of one side of a pair.

  Args:
    checkpoint: an open checkpoint, or any mapping from names to arrays.
    side: a Part or a Stack of it.
    room: from a number of bytes to uint8 of that many or more, which the array
      may lie in: memory that was used before costs less than new. It is asked
      for whole tensors of files, of up to 32 MiB.

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
  elif room is not None and _is_plain(checkpoint, side):
    array = _read_into(room, checkpoint, side.name)
  elif side.index and hasattr(checkpoint, "read"):
    array = checkpoint.read(side.name, side.index)
  else:
    array = checkpoint[side.name][side.index]
  return np.swapaxes(array, -1, -2) if side.swap else array


def read_region_of_side(
  checkpoint: Any, side: TensorPart | Stack, region: tuple[slice, ...]
) -> np.ndarray:
  """A region of one side of a pair.

  Args:
    checkpoint: an open checkpoint, or any mapping from names to arrays.
    side: a Part or a Stack of it.
    region: a slice for every axis of what `read_side` would give.

  Returns:
    `read(checkpoint, side)[region]`. Of a Part no more is read than
    `Checkpoint.read` needs for it; of a Stack its experts one by one, those of
    the region alone.

  Example:
    >>> whole = {"w": np.arange(6).reshape(2, 3)}
    >>> swapped = TensorPart("w", (), True)
    >>> read_region_of_side(whole, swapped, (slice(1, 3), slice(1)))
    array([[1],
           [2]])
  """
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
  """One index for an index, of integers and slices, and one of its result."""
  left, found = iter(inner), []
  for entry, size in zip(outer, shape, strict=False):
    if isinstance(entry, slice):
      run = range(size)[entry][next(left)]
      found.append(slice(run.start, run.stop))
    else:
      found.append(entry)
  return (*found, *left)


def _is_plain(checkpoint: Any, side: TensorPart) -> bool:
  """Whether a side is a whole tensor of a file, in the dtype it is read in."""
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
  """A tensor of a file, read a few rows at a time."""
  spec = checkpoint.spec[name]
  array = room(spec.nbytes)[: spec.nbytes].view(spec.dtype).reshape(spec.shape)
  rows = max(1, _PIECE * len(array) // spec.nbytes)
  for start in range(0, len(array), rows):
    part = slice(start, start + rows)
    array[part] = checkpoint.read(name, (part,))
  return array


def names_of(side: TensorPart | Stack) -> list[str]:
  """The names of the tensors a side of a pair is read from.

  Args:
    side: a Part or a Stack.

  Returns:
    Names, each once.

  Example:
    >>> names_of(TensorPart("w"))
    ['w']
  """
  if isinstance(side, TensorPart):
    return [side.name]
  return [part.name for parts in side.experts for part in parts]
