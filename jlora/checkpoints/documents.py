# SPDX-License-Identifier: Apache-2.0
"""Reading documents that somebody else wrote, in bounded time and memory.

    file ─► read_text ─► parse_json (or read_yaml) ─► check_fields ─► a value

Only regular files are opened, so a pipe or a device is not waited for. Whatever
is wrong is a `ValueError` with the file's name. `Kind`s say what may stand in a
field; the files that read a document have the tables of its fields.
"""

import collections
import json
import numbers
import os
import reprlib
import stat
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jlora.messages import name_some

# The largest tokenizers have 60 MB, the largest indices 50.
LARGEST = 2**27
DEEPEST = 64  # levels; what people write has ten
_MOST_LISTS = 2**21  # a large tokenizer has 600,000 merges
_LARGEST_REAL = 1e100  # float64 holds its square


def read_text(path: str | os.PathLike, largest: int = LARGEST) -> str:
  """Reads a text file that somebody else wrote.

  Args:
    path: a regular file, or a symbolic link to one.
    largest: the most bytes.

  Returns:
    Its contents, decoded from UTF-8.

  Raises:
    ValueError: no such file, a folder, a pipe or a device, one that may not be
      read, too large, or not UTF-8.

  Example:
    >>> read_text("/dev/zero")
    Traceback (most recent call last):
    ...
    ValueError: /dev/zero is no regular file; give one
  """
  try:
    # Without waiting: a pipe would be opened once somebody writes to it.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
  except (OSError, ValueError) as error:
    why = getattr(error, "strerror", None) or error
    raise ValueError(f"{path} cannot be read: {why}") from error
  try:
    if not stat.S_ISREG(os.fstat(file).st_mode):
      raise ValueError(f"{path} is no regular file; give one")
    with open(file, "rb", closefd=False) as stream:
      raw = stream.read(largest + 1)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  finally:
    os.close(file)
  if len(raw) > largest:
    raise ValueError(
      f"{path} has more than {largest:,} bytes, far more than such a file"
      " needs; is it another one?"
    )
  try:
    return raw.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8: {error}; save it again") from error


def parse_json(text: str, place: str, *, is_unique: bool = False) -> Any:
  """Parses JSON that somebody else wrote.

  Args:
    text: of the document.
    place: where it is from, for errors.
    is_unique: whether a name that an object has twice is an error.

  Returns:
    The value.

  Raises:
    ValueError: no JSON, more than 64 levels deep, or of more than two million
      lists and objects.

  Example:
    >>> parse_json("{", "config.json")
    Traceback (most recent call last):
    ...
    ValueError: config.json is no JSON: Expecting property name enclosed in
    double quotes: line 1 column 2 (char 1); mend it
  """
  holders = text.count("[") + text.count("{")
  if holders > _MOST_LISTS:
    raise ValueError(f"{place} has {holders:,} brackets; is it another file?")
  hook = _unique if is_unique else None
  try:
    found = json.loads(text, object_pairs_hook=hook)
  except RecursionError as error:
    raise _too_deep(place) from error
  except ValueError as error:
    raise ValueError(f"{place} is no JSON: {error}; mend it") from error
  if holders > DEEPEST:
    _check_depth(found, place)
  return found


def read_json(
  path: str | os.PathLike, *, is_unique: bool = False, largest: int = LARGEST
) -> Any:
  """Reads a JSON file: `read_text`, then `parse_json`.

  Args:
    path: the file.
    is_unique: as for `parse_json`.
    largest: as for `read_text`.

  Returns:
    The value.

  Raises:
    ValueError: as both.

  Example:
    >>> read_json("/nowhere.json")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere.json cannot be read: No such file or directory
  """
  text = read_text(path, largest)
  return parse_json(text, str(path), is_unique=is_unique)


class Kind(NamedTuple):
  """What a field of a document may hold.

  Attributes:
    words: what it is called in errors.
    fits: whether a value is of this kind.
  """

  words: str
  fits: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
  """Returns whether a value is an integer that 64 bits hold; flags are none."""
  is_whole = type(value) is int or (
    isinstance(value, numbers.Integral) and not isinstance(value, bool)
  )
  number: Any = value
  return is_whole and bool(-(2**63) <= number < 2**63)


def _is_number(value: Any, most: float = 3.4e38) -> bool:
  """Returns whether a value is a number that float32 holds; flags are none."""
  is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  number: Any = value
  return is_real and bool(-most <= number <= most)


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("a string", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("an integer", _is_integer)
SIZE = Kind("an integer, at least 0", lambda x: _is_integer(x) and x >= 0)
COUNT = Kind("an integer, at least 1", lambda x: _is_integer(x) and x >= 1)
NUMBER = Kind("a finite number of float32", _is_number)
REAL = Kind("a finite number", lambda value: _is_number(value, _LARGEST_REAL))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
NULL = Kind("null", lambda value: value is None)


def count_to(most: int) -> Kind:
  """Returns the kind of integers from 1 to a bound.

  Example:
    >>> count_to(9).fits(10)
    False
  """
  return Kind(
    f"an integer, 1 to {most}", lambda x: _is_integer(x) and 1 <= x <= most
  )


def list_of(kind: Kind) -> Kind:
  """Returns the kind of lists whose entries are all of one kind.

  Example:
    >>> list_of(TEXT).fits(["a"]), list_of(TEXT).fits("a")
    (True, False)
  """
  return Kind(
    f"a list, each entry {kind.words}",
    lambda value: isinstance(value, list) and all(map(kind.fits, value)),
  )


def table_of(kind: Kind) -> Kind:
  """Returns the kind of objects whose values are all of one kind.

  Example:
    >>> table_of(COUNT).fits({"q": 2}), table_of(COUNT).fits({"q": 0})
    (True, False)
  """
  return Kind(
    f"an object, each value {kind.words}",
    lambda value: (
      isinstance(value, dict) and all(map(kind.fits, value.values()))
    ),
  )


def either(*kinds: Kind) -> Kind:
  """Returns the kind of what is of any of some kinds.

  Example:
    >>> either(TEXT, NULL).words
    'a string or null'
  """
  return Kind(
    " or ".join(kind.words for kind in kinds),
    lambda value: any(kind.fits(value) for kind in kinds),
  )


def record_of(required: Mapping[str, Kind]) -> Kind:
  """Returns the kind of objects that have some fields, and maybe others.

  Example:
    >>> record_of({"id": SIZE}).fits({"id": 3, "special": True})
    True
  """
  words = ", ".join(f"{name} {kind.words}" for name, kind in required.items())
  return Kind(
    f"an object with {words}",
    lambda value: (
      isinstance(value, dict)
      and all(
        name in value and kind.fits(value[name])
        for name, kind in required.items()
      )
    ),
  )


def check_fields(
  found: Any,
  fields: Mapping[str, Kind],
  place: str,
  *,
  required: Collection[str] = (),
) -> dict[str, Any]:
  """Raises unless a document is an object whose fields are of their kinds.

  Args:
    found: the parsed document.
    fields: name -> Kind, of those that are looked at; others may hold anything.
    place: the file, for errors.
    required: names that must be there.

  Returns:
    `found`.

  Raises:
    ValueError: names up to three fields, with what they hold and what they
      should.

  Example:
    >>> check_fields({"r": "8"}, {"r": COUNT}, "adapter_config.json")
    Traceback (most recent call last):
    ...
    ValueError: adapter_config.json: r is '8', needed is an integer, at least 1;
    mend it
  """
  if not isinstance(found, dict):
    raise ValueError(f"{place} holds no object but {shortened(found)}; mend it")
  wrong = [
    f"{name} is {shortened(found[name])}, needed is {kind.words}"
    for name, kind in fields.items()
    if name in found and not kind.fits(found[name])
  ]
  wrong += [f"{name} is missing" for name in sorted({*required} - found.keys())]
  if wrong:
    raise ValueError(f"{place}: {name_some(wrong)}; mend it")
  return found


def read_object(
  path: str | os.PathLike,
  fields: Mapping[str, Kind] | None = None,
  *,
  required: Collection[str] = (),
  largest: int = LARGEST,
) -> dict[str, Any]:
  """Reads a JSON file that holds an object: `read_json`, then `check_fields`.

  Args:
    path: the file.
    fields: as for `check_fields`.
    required: as for `check_fields`.
    largest: as for `read_text`.

  Returns:
    The object.

  Raises:
    ValueError: as both.

  Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, "x.json")
    ...   _ = file.write_text('{"r": 4}')
    ...   read_object(file, {"r": COUNT})
    {'r': 4}
  """
  found = read_json(path, largest=largest)
  return check_fields(found, fields or {}, str(path), required=required)


def shortened(value: Any) -> str:
  """Returns what a value looks like, in one short line.

  Example:
    >>> shortened({"a": list(range(100))})
    "{'a': [0, 1, 2, ...]}"
  """
  return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict = 3, 3, 3
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60


# What else a config.json holds is looked at by those who need it, as numbers.
_CONFIG = {
  "_name_or_path": either(TEXT, NULL),
  "architectures": either(list_of(TEXT), NULL),
  "dtype": either(TEXT, OBJECT, NULL),
  "model_type": either(TEXT, NULL),
  "text_config": either(OBJECT, NULL),
  "torch_dtype": either(TEXT, OBJECT, NULL),
}


def read_config(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the config.json of a model.

  Args:
    path: the file.

  Returns:
    Its contents. What the library reads in any config.json is of its kind, in
    the configurations of a model's parts too.

  Raises:
    ValueError: as `read_object`.

  Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, "config.json")
    ...   _ = file.write_text('{"model_type": "llama"}')
    ...   read_config(file)["model_type"]
    'llama'
  """
  found = read_object(path)
  level = [("", found)]
  while level:
    for inside, one in level:
      check_fields(one, _CONFIG, f"{path}{inside}")
    level = [
      (f"{inside}: {name}", inner)
      for inside, one in level
      for name, inner in one.items()
      if isinstance(inner, dict)
    ]
  return found


def _too_deep(place: str) -> ValueError:
  """Returns the error for a document of too many levels."""
  return ValueError(
    f"{place} is more than {DEEPEST} levels deep; is it another file?"
  )


def _check_depth(found: Any, place: str) -> None:
  """Raises if a parsed document has too many levels; looks level by level."""
  level = [found]
  for _ in range(DEEPEST + 1):
    level = [
      inner
      for one in level
      if isinstance(one, dict | list)
      for inner in (one.values() if isinstance(one, dict) else one)
      if isinstance(inner, dict | list)
    ]
    if not level:
      return
  raise _too_deep(place)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Makes a dict of a JSON object's pairs; raises if a name occurs twice."""
  found = dict(pairs)
  if len(found) != len(pairs):
    names = collections.Counter(name for name, _ in pairs)
    raise ValueError(f"{names.most_common(1)[0][0]!r} is given twice")
  return found
