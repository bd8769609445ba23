# SPDX-License-Identifier: Apache-2.0
"""A tensor of a file cut over many devices: each process reads its own part."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.pairs import Pair, Part
from jlora.plans import Plan
from jlora.selection import is_floating

_AXIS = "shards"


class Cut(NamedTuple):
  """Into how many equal parts, and along which axis of the file's tensor."""

  axis: int
  parts: int


def cut(shape: tuple[int, ...], devices: int) -> Cut:
  """How a tensor is cut: over as many devices as divide one of its axes.

  Args:
    shape: as it lies in the file.
    devices: how many there are.

  Returns:
    Cut; the first axis where several can be cut into as many, as its parts are
    one run of bytes each. Of other axes every process reads whole rows.

  Example:
    >>> cut((6, 8), 4), cut((6, 9), 4), cut((5, 7), 4)
    (Cut(axis=1, parts=4), Cut(axis=0, parts=3), Cut(axis=0, parts=1))
  """
  return min(
    (
      Cut(axis, math.gcd(parts, size))
      for parts in range(1, devices + 1)
      for axis, size in enumerate(shape)
      if size
    ),
    key=lambda found: (-found.parts, found.axis),
    default=Cut(0, 1),
  )


def share_out(shape: tuple[int, ...]) -> NamedSharding | None:
  """Where the parts of a tensor go; None if there is only one.

  Args:
    shape: as it lies in the file.

  Returns:
    A sharding over a mesh of one axis of the first devices of all processes.

  Example:
    >>> share_out((1, 1)) is None
    True
  """
  devices = jax.devices()
  axis, parts = cut(shape, len(devices))
  if parts == 1:
    return None
  mesh = Mesh(
    np.asarray(devices[:parts]), (_AXIS,), axis_types=(AxisType.Auto,)
  )
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS))


def can_be_split(plan: Plan, pair: Pair) -> bool:
  """Whether a pair is two whole floating matrices that are to be factored.

  Args:
    plan: the run's.
    pair: one of its pairs.

  Returns:
    bool; False of stacks, of parts and of what is kept whole.

  Example:
    See `extract_checkpoint`, which splits what it is true of.

    >>> can_be_split.__name__
    'can_be_split'
  """
  if pair.whole or not plan.views[pair.path] or pair.path in plan.refused:
    return False
  return all(
    isinstance(side, Part)
    and not (side.index or side.swap)
    and is_floating(checkpoint.spec[side.name].dtype)
    and checkpoint.spec[side.name].shape == pair.shape
    for checkpoint, side in (
      (plan.base, pair.base),
      (plan.finetuned, pair.finetuned),
    )
  )
