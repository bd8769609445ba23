# SPDX-License-Identifier: Apache-2.0
"""Matches names against regexes from other people's files, in bounded time.

Python's `re` tries one way after the other, and `(.+)+#` has 2^n of them. Here
the positions that a part of a pattern can reach in a name are the bits of one
integer, and a part maps bits to bits:

    letter   the bits where the name has it, moved by one
    x y      y of what x gives                x | y   both together
    x*       x again until nothing is new     (?=x)   those where x can begin

That tells whether a pattern matches, not where its groups lie, for which nobody
asks. What is no such map (a group that is repeated by number) is an error.
"""

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

_MOST_STEPS = 2**13  # of one match; the longest patterns in use take 2^9
_LONGEST = 2**16  # letters of a pattern
_LONGEST_NAME = 2**12
_DEEPEST = 50  # groups in groups
_LITERAL = re.compile(r"(?:\\[.\-_/]|[\w\-/])*")
_REPEAT = re.compile(r"[*+?]|\{(?=[\d,])(\d*)(,?)(\d*)\}")
_ESCAPE = re.compile(
  r"\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|.)", re.DOTALL
)
_REFUSED = "it depends on what a group took, or has flags"


class _Name:
  """A name to match, and how many steps are left for it."""

  def __init__(self, text: str):
    self.size, self.all = len(text), (1 << (len(text) + 1)) - 1
    self.text, self.steps = text, _MOST_STEPS
    self.letters: dict[str, int] = {}
    self.sets: dict[re.Pattern, int] = {}
    for at, letter in enumerate(text):
      self.letters[letter] = self.letters.get(letter, 0) | 1 << at

  def count(self) -> None:
    """Counts a step; raises if there were too many."""
    self.steps -= 1
    if self.steps < 0:
      raise ValueError("to match it takes too long")


# (name, bits, whether backwards) -> bits. Forwards the positions where a part
# can end that begins at one of the bits, backwards where it can begin to end
# there.
_Part = Callable[[_Name, int, bool], int]


class Pattern(NamedTuple):
  """A regex that was read.

  Attributes:
    text: as it was written.
    literal: the only name that it matches, where it is a name with its dots
      escaped; else None.
    part: which positions of a name it leads to.
  """

  text: str
  literal: str | None
  part: _Part


@functools.lru_cache(2**16)
def read_pattern(text: str) -> Pattern:
  r"""Reads a regex.

  Args:
    text: as for `re`.

  Returns:
    Pattern.

  Raises:
    ValueError: no regex, over 65,536 letters, groups in groups 50 deep, or one
      whose matches depend on what a group took, as `\1`, `(?(1)...)`, `(?>...)`
      and `a*+` do, or with flags.

  Example:
    >>> read_pattern(r"h\.0\.q").literal
    'h.0.q'
  """
  try:
    if len(text) > _LONGEST:
      raise ValueError(f"it has over {_LONGEST} letters")
    if _LITERAL.fullmatch(text):
      plain = re.sub(r"\\(.)", r"\1", text)
      return Pattern(text, plain, _in_turn([_letter(one) for one in plain]))
    with warnings.catch_warnings(action="ignore"):  # of sets in sets
      re.compile(text)
      return Pattern(text, None, _Reader(text).read_all())
  except (re.error, OverflowError, RecursionError, ValueError) as error:
    short = text if len(text) < 80 else f"{text[:77]}..."
    raise ValueError(f"{short!r} is no regex that is read: {error}") from error


def is_whole(patterns: str, name: str) -> bool:
  r"""Returns whether a regex matches a whole name, as `re.fullmatch` does.

  Args:
    patterns: a regex; of names with escaped dots with "|" between them, it
      takes no more than to look for the name.
    name: any.

  Returns:
    bool.

  Raises:
    ValueError: as `read_pattern`, or a match takes too many steps.

  Example:
    >>> is_whole(r"h\.\d+\.(q|k)", "h.11.q"), is_whole("(.+)+#", "q")
    (True, False)
  """
  known = _names_in(patterns)
  if known is not None:
    return name in known
  pattern = read_pattern(patterns)
  return _matches(pattern, name, [pattern.part, _very_end])


def is_end(text: str, name: str) -> bool:
  r"""Returns whether a regex matches a name's end, from a dot or its start.

  Args:
    text: a regex P; asked for is `(.*\.)?(P)$`, as PEFT does for ranks.
    name: any.

  Returns:
    bool.

  Raises:
    ValueError: as `is_whole`.

  Example:
    >>> is_end("q_proj", "h.0.q_proj"), is_end("q", "h.0.qq")
    (True, False)
  """
  pattern = read_pattern(text)
  if pattern.literal is not None:
    return f".{name}".endswith(f".{pattern.literal}")
  return _matches(pattern, name, [_BEFORE, pattern.part, _end])


def is_inside(text: str, name: str) -> bool:
  r"""Returns whether a regex matches parts of a name, from dot to dot.

  Args:
    text: a regex P; asked for is `(^|.*\.)P($|\..*)`, as PEFT does for modules
      that are saved whole.
    name: any.

  Returns:
    bool.

  Raises:
    ValueError: as `is_whole`.

  Example:
    >>> is_inside("head", "model.head.dense"), is_inside("head", "lm_head")
    (True, False)
  """
  pattern = read_pattern(text)
  if pattern.literal is not None:
    return f".{pattern.literal}." in f".{name}."
  return _matches(pattern, name, [_BEFORE, pattern.part, _AFTER])


def _matches(pattern: Pattern, name: str, parts: Sequence[_Part]) -> bool:
  """Returns whether parts lead anywhere from a name's begin."""
  if len(name) > _LONGEST_NAME:
    raise ValueError(f"{name[:60]!r}... is too long for a module's name")
  own = _Name(name)
  try:
    return bool(_in_turn(parts)(own, 1, False))
  except ValueError as error:
    raise ValueError(f"{pattern.text[:80]!r}: {error}") from error


@functools.lru_cache(64)
def _names_in(patterns: str) -> frozenset[str] | None:
  """Returns the names of a regex that is a list of names; else None."""
  each = patterns.split("|")
  if not all(map(_LITERAL.fullmatch, each)):
    return None
  return frozenset(re.sub(r"\\(.)", r"\1", one) for one in each)


class _Reader:
  """Reads a pattern that `re` takes, left to right."""

  def __init__(self, text: str):
    self._text, self._at, self._depth = text, 0, 0

  def read_all(self) -> _Part:
    """Reads the whole pattern."""
    part = self._either()
    if self._at < len(self._text):
      raise ValueError("a bracket is not matched")
    return part

  def _either(self) -> _Part:
    """Reads what stands between brackets: sequences with | between them."""
    self._depth += 1
    if self._depth > _DEEPEST:
      raise ValueError(f"groups are more than {_DEEPEST} deep")
    ways = [self._sequence()]
    while self._took("|"):
      ways.append(self._sequence())
    self._depth -= 1
    return ways[0] if len(ways) == 1 else _any_of(ways)

  def _sequence(self) -> _Part:
    """Reads parts one after the other."""
    parts = []
    while self._at < len(self._text) and self._text[self._at] not in "|)":
      atom, letters = self._atom()
      parts.append(self._repeated(atom, letters))
    return _in_turn(parts)

  def _repeated(self, part: _Part, letters: "_Letters | None") -> _Part:
    """Reads how often a part is repeated, and returns it so."""
    found = _REPEAT.match(self._text, self._at)
    if found is None:
      return part
    self._at = found.end()
    if self._took("+"):
      raise ValueError(_REFUSED)
    self._took("?")  # as few as possible: the same names match
    low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(
      found[0], (int(found[1] or 0), int(found[3]) if found[3] else None)
    )
    if found[1] and not found[2]:
      high = low
    if letters is not None and low < 2 and high is None:
      return _run_of(letters, part, low)
    return _repeat(part, low, high)

  def _atom(self) -> "tuple[_Part, _Letters | None]":
    """Reads a letter, a set of letters, a group or a place."""
    text, start = self._text, self._at
    if text[start] == "(":
      return self._group(), None
    if place := _PLACES.get(text[start : start + 2], _PLACES.get(text[start])):
      self._at += 1 if text[start] in "^$" else 2
      return place, None
    if text[start] == "[":
      end = start + (3 if text[start + 1] == "^" else 2)
      while text[end] != "]":
        end += 2 if text[end] == "\\" else 1
      end += 1
    elif text[start] == "\\":
      end = _ESCAPE.match(text, start).end()  # type: ignore[union-attr]
      if text[start + 1] in "123456789":
        raise ValueError(_REFUSED)
    else:
      end = start + 1
    self._at = end
    sign = text[start:end]
    if len(sign) == 1 and sign != ".":
      letters = functools.partial(_bits_of_letter, sign)
    else:
      letters = functools.partial(_bits_of_set, re.compile(sign))
    return _one_of(letters), letters

  def _group(self) -> _Part:
    """Reads a group, from its bracket to its bracket."""
    wrap = None
    self._at += 1
    if self._took("?"):
      named = re.compile(r"P<\w+>").match(self._text, self._at)
      known = [begin for begin in _GROUPS if self._took(begin)]
      if named:
        self._at = named.end()
      elif not known:
        raise ValueError(_REFUSED)
      else:
        wrap = _GROUPS[known[0]]
    part = self._either()
    self._took(")")
    return wrap(part) if wrap else part

  def _took(self, sign: str) -> bool:
    """Returns whether a sign comes next; if so it is read."""
    is_next = self._text.startswith(sign, self._at)
    self._at += len(sign) * is_next
    return is_next


_Letters = Callable[[_Name], int]


def _bits_of_letter(letter: str, name: _Name) -> int:
  """Returns the positions of a letter."""
  return name.letters.get(letter, 0)


def _bits_of_set(letters: re.Pattern, name: _Name) -> int:
  """Returns the positions of letters that are in a set."""
  if letters not in name.sets:
    each = name.letters.items()
    name.sets[letters] = sum(bits for x, bits in each if letters.fullmatch(x))
  return name.sets[letters]


def _letter(letter: str) -> _Part:
  """Returns the part for one letter."""
  return _one_of(functools.partial(_bits_of_letter, letter))


def _one_of(letters: _Letters) -> _Part:
  """Returns the part for one letter of a set."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    name.count()
    here = letters(name)
    return (bits >> 1) & here if backwards else (bits & here) << 1

  return part


def _run_of(letters: _Letters, one: _Part, low: int) -> _Part:
  """Returns the part for as many letters of a set as one likes."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    name.count()
    bits = one(name, bits, backwards) if low else bits
    here = letters(name)
    if not backwards:  # a sum carries a bit to the end of its run of letters
      return bits | (((bits & here) + here) ^ here)
    shift = 1
    while shift <= name.size:
      bits |= here & (bits >> shift)
      here &= here >> shift
      shift *= 2
    return bits

  return part


def _in_turn(parts: Sequence[_Part]) -> _Part:
  """Returns the part for parts one after the other."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    for one in reversed(parts) if backwards else parts:
      if not bits:
        return 0
      bits = one(name, bits, backwards)
    return bits

  return part


def _any_of(ways: Sequence[_Part]) -> _Part:
  """Returns the part for any of several parts."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    found = 0
    for one in ways:
      found |= one(name, bits, backwards)
    return found

  return part


def _repeat(one: _Part, low: int, high: int | None) -> _Part:
  """Returns the part for `low` to `high` times another."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    for _ in range(low):
      name.count()
      bits = one(name, bits, backwards)
    found, new = bits, bits
    more = itertools.count() if high is None else range(high - low)
    for _ in more:
      name.count()
      new = one(name, new, backwards)
      if not new & ~found and high is None:
        break
      found |= new
      if not new:
        break
    return found

  return part


def _look(is_ahead: bool, is_wanted: bool, inner: _Part) -> _Part:
  """Returns the part for a look ahead or behind, which moves nothing."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    del backwards
    there = inner(name, name.all, is_ahead)
    return bits & (there if is_wanted else ~there)

  return part


def _begin(name: _Name, bits: int, backwards: bool) -> int:
  """Stands for the beginning of a name."""
  return bits & 1


def _end(name: _Name, bits: int, backwards: bool) -> int:
  """Stands for the end of a name, or the line's end before it."""
  is_line = name.text.endswith("\n")
  return bits & (1 << name.size | (1 << name.size) >> is_line)


def _very_end(name: _Name, bits: int, backwards: bool) -> int:
  """Stands for the end of a name."""
  return bits & 1 << name.size


def _at_word(is_wanted: bool) -> _Part:
  """Returns the part for a place where a word begins or ends, or for others."""

  def part(name: _Name, bits: int, backwards: bool) -> int:
    """Maps positions to positions."""
    word = _bits_of_set(_WORD, name)
    edge = word ^ word << 1
    return bits & (edge if is_wanted else ~edge)

  return part


_WORD = re.compile(r"\w")
_PLACES: dict[str, _Part] = {
  "^": _begin,
  "$": _end,
  r"\A": _begin,
  r"\Z": _very_end,
  r"\b": _at_word(True),
  r"\B": _at_word(False),
}
_GROUPS: dict[str, Callable[[_Part], _Part]] = {
  ":": lambda part: part,
  "=": functools.partial(_look, True, True),
  "!": functools.partial(_look, True, False),
  "<=": functools.partial(_look, False, True),
  "<!": functools.partial(_look, False, False),
}
_ANY = functools.partial(_bits_of_set, re.compile("."))
_ALL = _run_of(_ANY, _one_of(_ANY), 0)
_DOT = _letter(".")
_BEFORE = _repeat(_in_turn([_ALL, _DOT]), 0, 1)  # (.*\.)?
_AFTER = _any_of([_end, _in_turn([_DOT, _ALL])])
