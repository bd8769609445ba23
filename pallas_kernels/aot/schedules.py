# SPDX-License-Identifier: Apache-2.0
"""Counts the HBM bytes of a compiled TPU program in its schedule's text.

`cost_analysis()` counts accesses of on-chip memory as well, and asynchronous
copies twice. The text of the schedule says where every array lies: one whose
layout names no memory space is in HBM.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.aot.pipelines import Pipeline

_BITS = {
  **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
  **dict.fromkeys(("pred", "s8", "u8"), 8),
  **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e8m0fnu"), 8),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 16),
  **dict.fromkeys(("f32", "s32", "u32"), 32),
  **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")

# These name or wait for bytes that another line moves.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "opt-barrier", "add-dependency"),
}
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")
_LOOPS = ("while", "conditional", "call")


class Array(NamedTuple):
  """An array as the schedule writes it."""

  dtype: str
  shape: tuple[int, ...]
  in_hbm: bool
  nbytes: int


class Move(NamedTuple):
  """The HBM bytes that one instruction reads and writes."""

  name: str
  operation: str
  read: int
  written: int


def _padded(shape, layout):
  """Returns the shape as stored: minor axes rounded up to the first tile."""
  order = [int(i) for i in re.findall(r"\d+", layout.split(":")[0])]
  tile = re.search(r":T\(([\d,]+)\)", layout)
  shape = list(shape)
  if tile:
    sides = [int(side) for side in tile[1].split(",")]
    for axis, side in zip(order, reversed(sides), strict=False):
      shape[axis] = -(-shape[axis] // side) * side
  return shape


def arrays(text: str) -> list[Array]:
  """Reads the arrays of a type as HLO text writes it, tuples flattened.

  Args:
    text: such as `(bf16[8,16]{1,0:T(8,128)(2,1)}, f32[]{:S(2)})`.

  Returns:
    One Array each; nbytes is what it fills, the padding of its tiles included.

  Raises:
    ValueError: if an element type has no known size.

  Example:
    >>> arrays("bf16[8,16]{1,0:T(8,128)(2,1)}")[0].nbytes
    2048
  """
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    if dtype in ("token", "opaque"):
      continue
    if dtype not in _BITS:
      raise ValueError(
        f"{dtype}[{dims}]: no size is known for {dtype}; "
        f"add it to {__name__}._BITS"
      )
    shape = tuple(int(d) for d in dims.split(",") if d)
    bits = math.prod(_padded(shape, layout)) * _BITS[dtype]
    in_hbm = not re.search(r"S\([1-9]\d*\)", layout)
    found.append(Array(dtype, shape, in_hbm, -(-bits // 8)))
  return found


def _hbm(found):
  """Counts the bytes of the arrays that lie in HBM."""
  return sum(array.nbytes for array in found if array.in_hbm)


def _elements(text):
  """Splits a tuple's text into its top-level elements."""
  parts, depth, start = [], 0, 1
  for i, letter in enumerate(text):
    depth += (letter in "({[") - (letter in ")}]")
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      parts.append(text[start:i])
      start = i + 1
  return parts


def _operands(rest):
  """Finds an instruction's operands by name; `rest` follows its bracket."""
  depth = 1
  for i, letter in enumerate(rest):
    depth += (letter in "({[") - (letter in ")}]")
    if depth == 0:
      return re.findall(r"%([\w.\-]+)", rest[:i])
  return re.findall(r"%([\w.\-]+)", rest)


def _started(name, operation, result, read):
  """Counts an asynchronous copy: ((source), destination, context)."""
  parts = _elements(result)
  # A copy names its destination first, a slice names it after its source.
  target = arrays(parts[0 if operation == "copy-start" else 1])
  written = _hbm(target)
  if operation in ("slice-start", "dynamic-slice-start") and _hbm(read):
    moved = sum(array.nbytes for array in target)
    return Move(name, operation, moved, written)
  return Move(name, operation, _hbm(read), written)


def _fetched(name, operation, result, read, waiting):
  """Counts a Pallas call: each array as often as its pipeline fetches it."""
  key = tuple(a.shape for a in read), tuple(a.shape for a in result)
  if not waiting[key]:
    raise ValueError(
      f"%{name}: a Pallas call on {key[0]} -> {key[1]} whose pipeline was not "
      f"given: pass those of the same function; given were {list(waiting)[:3]}"
    )
  pipeline = waiting[key].popleft()
  reads = zip(read, pipeline.reads, strict=True)
  writes = zip(result, pipeline.writes, strict=True)
  return Move(
    name,
    operation,
    round(sum(a.nbytes * times for a, times in reads if a.in_hbm)),
    round(sum(a.nbytes * times for a, times in writes if a.in_hbm)),
  )


def moves(text: str, pipelines: Sequence[Pipeline] = ()) -> list[Move]:
  """Counts the HBM bytes that every instruction of a schedule moves.

  An operand or a result counts when its layout names no memory space, with
  the padding of its tiles, once for each instruction; an asynchronous copy
  counts where it starts, a slice with the slice's bytes alone.

  Args:
    text: `compiled.as_text()` of a program for one TPU.
    pipelines: of the Pallas calls, by `pipelines_of`: how often each call
      fetches its operands. Calls are told apart by their shapes.

  Returns:
    One Move for each instruction that touches HBM, in scheduled order.

  Raises:
    ValueError: if the program is not scheduled, has a loop or a branch (whose
      count the text does not say), or a Pallas call without a pipeline.

  Approximation: XLA's own fusions count each operand once, even where their
  windows read it again; for them the sum is a lower bound.
  """
  if "is_scheduled=true" not in text:
    raise ValueError("the program is not scheduled: pass compiled.as_text()")
  waiting = collections.defaultdict(collections.deque)
  for pipeline in pipelines:
    waiting[pipeline.operands, pipeline.results].append(pipeline)
  types, found = {}, []
  for line in text[text.index("\nENTRY ") + 1 :].splitlines()[1:]:
    match = _LINE.match(line)
    if not match:
      continue
    name, result, operation, rest = match.groups()
    types[name] = result
    if operation in _LOOPS:
      raise ValueError(f"%{name} is a {operation}: it may run any times")
    free = any(f'custom_call_target="{call}"' in rest for call in _FREE_CALLS)
    if free or operation in _FREE or operation.endswith("-done"):
      continue
    read = [a for o in _operands(rest) for a in arrays(types.get(o, ""))]
    if 'custom_call_target="tpu_custom_call"' in rest:
      move = _fetched(name, operation, arrays(result), read, waiting)
    elif operation.endswith("-start"):
      move = _started(name, operation, result, read)
    else:
      move = Move(name, operation, _hbm(read), _hbm(arrays(result)))
    if move.read or move.written:
      found.append(move)
  return found


def hbm_bytes(text: str, pipelines: Sequence[Pipeline] = ()) -> int:
  """Counts the HBM bytes a scheduled program moves: the sum of `moves`."""
  return sum(m.read + m.written for m in moves(text, pipelines))
