# SPDX-License-Identifier: Apache-2.0
"""Reads from a compiled program's text what it sends between devices.

`jax.jit(f).lower(...).compile().as_text()` is the program of one device. It
names each exchange with other devices and the shape of its result, for CPUs and
GPUs as for TPUs, which need not be there to compile for them.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

OPERATIONS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
#: Operations that gather an array from other devices' parts of it.
GATHERING = tuple(x for x in OPERATIONS if "reduce" not in x)

_NAME = r"%?([\w.\-]+)"
_HEADER = re.compile(rf"(ENTRY\s+)?{_NAME}\s+\(.*\)\s*->.*{{\s*$")
_CALL = re.compile(rf"^\s*(?:ROOT\s+)?{_NAME} = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLEE = re.compile(rf"\b(?:calls|to_apply|body|condition)={_NAME}")
_TWO_BRANCHES = re.compile(rf"\b(?:true|false)_computation={_NAME}")
_BRANCHES = re.compile(r"\bbranch_computations={([^}]*)}")
_TRIPS = re.compile(r'"known_trip_count":\s*{\s*"n":\s*"?(\d+)')
_CONDITION = re.compile(rf"\bcondition={_NAME}")
_CONSTANT = re.compile(rf"{_NAME} = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(rf"ROOT .* compare\(.*, {_NAME}\), direction=LT")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")
# A TPU's compiler splits an exchange into a chain of pieces between other work,
# each of which names the whole.
_CHAIN = re.compile(r"channel_id=(\d+).*\bchain_id=")


class Collective(NamedTuple):
  """An exchange between devices, as the program describes it.

  Attributes:
    op: one of `OPERATIONS`, without `-start`.
    entries: number of entries of the largest result on a device.
    bytes: of all arrays that come out on a device; of a `reduce-scatter` what
      goes in, so that it counts as an `all-reduce` would.
    computation: name of the computation it is in, such as a loop's body.
  """

  op: str
  entries: int
  bytes: int
  computation: str


class _Computation:
  """A computation of a program, as one of its functions.

  Attributes:
    own: the exchanges in the computation itself.
    calls: (how often, computations of which one is called); for a loop without
      a known trip count, the name of its condition in place of the number.
    constants: its integers, by name.
    turns: trip count, if it is the condition of a loop that counts from 0.
  """

  def __init__(self):
    """Starts empty."""
    self.own: list[Collective] = []
    self.calls: list[tuple[int | str, list[str]]] = []
    self.constants: dict[str, int] = {}
    self.turns: int | None = None


def find_collectives(text: str) -> list[Collective]:
  """Lists every exchange between devices in a compiled program, once each.

  Args:
    text: of a compiled program.

  Returns:
    Collectives in the order of the text, those in loops and branches too; only
    the first of a pair `-start` and `-done`, and of a chain of pieces.

  Example:
    >>> find_collectives("  %g = f32[8,4]{1,0} all-gather(%x), dimensions={0}")
    [Collective(op='all-gather', entries=32, bytes=128, computation='')]
  """
  return [found for x in _computations(text)[1].values() for found in x.own]


def largest_gathered(text: str) -> int:
  """Counts the entries of the largest array gathered from other devices.

  Args:
    text: of a compiled program.

  Returns:
    The entries of the largest result of an operation in `GATHERING`, 0 where
    there is none. Sums (`all-reduce`, `reduce-scatter`) are of parts of their
    own size and are not counted.

  Example:
    >>> largest_gathered("  %g = f32[8,4] all-gather-done(%s)")
    0
  """
  found = find_collectives(text)
  return max((x.entries for x in found if x.op in GATHERING), default=0)


def collective_bytes(text: str, trips: int = 1) -> dict[str, int]:
  """Counts the bytes that one run of a program exchanges, by operation.

  Args:
    text: of a compiled program.
    trips: how often a loop without a known trip count runs.

  Returns:
    {operation: bytes}, as `Collective.bytes` counts them on one device, times
    the turns of the loops they stand in; of branches those of the one that
    exchanges most. What a network carries depends on its algorithm: a ring
    sends about twice the bytes of an `all-reduce`, of the others about once.

  Example:
    >>> collective_bytes("  %s = f32[4] all-reduce(%x), to_apply=%add")
    {'all-reduce': 16}
  """
  entry, computations = _computations(text)
  known: dict[str, dict[str, int]] = {}

  def times(turns: int | str) -> int:
    """Returns how often a loop runs."""
    if isinstance(turns, int):
      return turns
    counted = computations.get(turns, _Computation()).turns
    return trips if counted is None else counted

  def total(name: str) -> dict[str, int]:
    """Sums up the bytes of a computation and of all that it calls."""
    if name in known:
      return known[name]
    sums: dict[str, int] = {}
    computation = computations.get(name, _Computation())
    for found in computation.own:
      sums[found.op] = sums.get(found.op, 0) + found.bytes
    for turns, names in computation.calls:
      each = [total(called) for called in names]
      most = max(each, key=lambda x: sum(x.values()), default={})
      for op, amount in most.items():
        sums[op] = sums.get(op, 0) + times(turns) * amount
    known[name] = sums
    return sums

  return dict(sorted(total(entry).items()))


def _computations(text: str) -> tuple[str, dict[str, _Computation]]:
  """Parses a program; returns its entry's name and all its computations."""
  name, entry, chains = "", "", set()
  found = {name: _Computation()}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name = header[2]
      entry = name if header[1] else entry
      found[name] = _Computation()
    elif call := _CALL.match(line):
      _, result, op, rest = call.groups()
      found[name].calls.extend(_calls(op, rest))
      chain = _CHAIN.search(rest)
      if not chain or chain[1] not in chains:
        found[name].own.extend(_collective(name, result, op, rest))
      if chain:
        chains.add(chain[1])
      _count(line, found[name])
  return entry, found


def _count(line: str, computation: _Computation) -> None:
  """Records a loop's trip count if its condition is `counter < constant`."""
  if constant := _CONSTANT.search(line):
    computation.constants[constant[1]] = int(constant[2])
  if below := _BELOW.search(line):
    computation.turns = computation.constants.get(below[1])


def _collective(name, result, op, rest) -> Iterator[Collective]:
  """Yields the exchange that an instruction is, if it is one."""
  kind = op.removesuffix("-start")
  if kind not in OPERATIONS:
    return
  # A `-start` operation lists its operands before its results.
  if op != kind and kind != "all-reduce" and result.startswith("("):
    result = _elements(result)[1]
  arrays = [_size(*array) for array in _ARRAY.findall(result)]
  group = _group_size(rest) if kind == "reduce-scatter" else 1
  yield Collective(
    kind,
    max((entries for entries, _ in arrays), default=0),
    group * sum(size for _, size in arrays),
    name,
  )


def _calls(op: str, rest: str) -> Iterator[tuple[int | str, list[str]]]:
  """Yields (trip count or condition, computations of which one runs)."""
  turns: int | str = 1
  if op == "while":
    trips, condition = _TRIPS.search(rest), _CONDITION.search(rest)
    turns = int(trips[1]) if trips else condition[1] if condition else ""
  for called in _CALLEE.findall(rest):
    yield turns, [called]
  branches = _TWO_BRANCHES.findall(rest)
  for group in _BRANCHES.findall(rest):
    branches += [name.strip().lstrip("%") for name in group.split(",")]
  if branches:
    yield 1, branches


def _elements(result: str) -> list[str]:
  """Splits a tuple's type, `(f32[2]{0}, (s32[], s32[]))`, into elements."""
  parts, depth = [""], 0
  for letter in result[1:-1]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def _size(dtype: str, dims: str) -> tuple[int, int]:
  """Returns the (entries, bytes) of an array's type."""
  entries = math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n)
  bits = _BITS.match(dtype)
  return entries, math.ceil(entries * (int(bits[1]) if bits else 8) / 8)


def _group_size(rest: str) -> int:
  """Counts the devices that exchange among themselves."""
  if listed := re.search(r"replica_groups={{([\d,]*)}", rest):
    return len(listed[1].split(","))
  if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return int(shaped[1])
  if named := re.search(r"replica_groups=mesh\[(.*?)\]\s*{(.*?)}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[x]) for x in re.findall(r"'(\w+)'", named[2]))
  return 1
