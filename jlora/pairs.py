# SPDX-License-Identifier: Apache-2.0
"""A pair: a parameter of the base and what the finetune made of it, on disk."""

from typing import Any, NamedTuple

import numpy as np


class Part(NamedTuple):
  """A tensor on disk or a slice of it, its last two axes exchanged or not."""

  name: str
  index: tuple[Any, ...] = ()
  swap: bool = False


class Stack(NamedTuple):
  """A fused tensor put together: experts stacked, their parts concatenated."""

  experts: tuple[tuple[Part, ...], ...]
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
  base: Part
  finetuned: Part | Stack
  note: str = ""
  whole: bool = False


class Pairing(NamedTuple):
  """All pairs, and the names on either side that found no partner."""

  pairs: list[Pair]
  only_base: list[str]
  only_finetuned: list[str]


def read(checkpoint: Any, side: Part | Stack) -> np.ndarray:
  """The values of one side of a pair.

  Args:
    checkpoint: an open checkpoint, or any mapping from names to arrays.
    side: a Part or a Stack of it.

  Returns:
    The array, in its stored dtype (float32 for float8).

  Example:
    >>> read({"w": np.arange(6).reshape(2, 3)}, Part("w", (1,)))
    array([3, 4, 5])
  """
  if isinstance(side, Stack):
    array = np.stack(
      [
        np.concatenate([read(checkpoint, part) for part in parts])
        for parts in side.experts
      ]
    )
  elif side.index and hasattr(checkpoint, "read"):
    array = checkpoint.read(side.name, side.index)
  else:
    array = checkpoint[side.name][side.index]
  return np.swapaxes(array, -1, -2) if side.swap else array


def names_of(side: Part | Stack) -> list[str]:
  """The names of the tensors a side of a pair is read from.

  Args:
    side: a Part or a Stack.

  Returns:
    Names, each once.

  Example:
    >>> names_of(Part("w"))
    ['w']
  """
  if isinstance(side, Part):
    return [side.name]
  return [part.name for parts in side.experts for part in parts]
