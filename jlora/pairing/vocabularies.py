# SPDX-License-Identifier: Apache-2.0
"""Reading which token each row of an embedding stands for.

Rows are compared and added by their number. That is right only where a number
means the same token in all models: shapes cannot tell, but tokenizers can.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.checkpoints.documents import (
  LARGEST,
  NULL,
  OBJECT,
  SIZE,
  TEXT,
  Kind,
  check_fields,
  either,
  list_of,
  read_object,
  read_text,
  record_of,
  table_of,
)

Tokens = dict[int, str]


def read_tokens(path: str | os.PathLike) -> Tokens | None:
  """Reads the token of each row, number -> string, from a folder's tokenizer.

  Args:
    path: a checkpoint, its folder or a file in it.

  Returns:
    The tokens of `tokenizer.json`, or else of `vocab.json` or `vocab.txt`, with
    the tokens that were added. None if there is none of these files, or if it
    has another form (a SentencePiece `tokenizer.model` alone cannot be read).

  Raises:
    ValueError: a file that is no JSON, or whose tokens are not numbered as
      those of tokenizers are.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   text = '{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}'
    ...   _ = Path(folder, "tokenizer.json").write_text(text)
    ...   read_tokens(folder)
    {0: 'a', 1: 'b'}
  """
  file = _find(path)
  return None if file is None else _READERS[file.name](file)


def read_both_tokens(
  first: str | os.PathLike, second: str | os.PathLike
) -> tuple[Tokens, Tokens] | None:
  """Reads the tokens of two checkpoints where their tokenizers differ.

  Args:
    first: a checkpoint, its folder or a file in it.
    second: another.

  Returns:
    The tokens of both; None if their `tokenizer.json` is the same file or holds
    the same bytes, or if either has no tokens that can be read.

  Raises:
    ValueError: as `read_tokens`.

  Example:
    >>> read_both_tokens("/nowhere", "/nowhere") is None
    True
  """
  own, other = _find(first), _find(second)
  if own is None or other is None or _are_same(own, other):
    return None
  one, two = read_tokens(first), read_tokens(second)
  return None if one is None or two is None or one == two else (one, two)


def _find(path: str | os.PathLike) -> Path | None:
  """Finds the file that has a checkpoint's tokens; None if there is none."""
  folder = Path(path)
  folder = folder if folder.is_dir() else folder.parent
  files = (folder / name for name in _READERS)
  return next((file for file in files if file.exists()), None)


def _are_same(first: Path, second: Path) -> bool:
  """Returns whether two files that stand alone hold the same bytes."""
  if first.name != "tokenizer.json" or second.name != first.name:
    return False
  if not (first.is_file() and second.is_file()):  # who reads them tells
    return False
  size = first.stat().st_size
  if size != second.stat().st_size or size > LARGEST:
    return False
  return first.samefile(second) or first.read_bytes() == second.read_bytes()


# Of BPE and the like token -> number; of Unigram [token, score] by number.
_NUMBERED = table_of(SIZE)
_SCORED = Kind(
  "a list, each entry [token, score]",
  lambda value: (
    isinstance(value, list)
    and all(
      isinstance(one, list) and one and TEXT.fits(one[0]) for one in value
    )
  ),
)
_TOKENIZER = {
  "model": either(OBJECT, NULL),
  "added_tokens": either(
    list_of(record_of({"id": SIZE, "content": TEXT})), NULL
  ),
}


def _of_tokenizer(file: Path) -> Tokens | None:
  """Reads a tokenizer.json; None if its vocabulary has another form."""
  raw = read_object(file, _TOKENIZER)
  model = raw.get("model") or {}
  vocabulary = model.get("vocab")
  if not isinstance(vocabulary, dict | list):
    return None
  kind = _NUMBERED if isinstance(vocabulary, dict) else _SCORED
  check_fields(model, {"vocab": kind}, f"{file}: model")
  if isinstance(vocabulary, dict):
    found = {number: token for token, number in vocabulary.items()}
  else:
    found = {number: pair[0] for number, pair in enumerate(vocabulary)}
  added = raw.get("added_tokens") or []
  return {**found, **{one["id"]: one["content"] for one in added}}


def _of_vocabulary(file: Path) -> Tokens:
  """Reads a vocab.json, and the added_tokens.json beside it."""
  more = file.with_name("added_tokens.json")
  files = [file, *([more] if more.exists() else [])]
  found: dict[str, int] = {}
  for one in files:
    own = read_object(one)
    found |= check_fields(own, dict.fromkeys(own, SIZE), str(one))
  return {number: token for token, number in found.items()}


def _of_lines(file: Path) -> Tokens:
  """Reads a vocab.txt, a token on each line."""
  return dict(enumerate(read_text(file).splitlines()))


_READERS: dict[str, Any] = {
  "tokenizer.json": _of_tokenizer,
  "vocab.json": _of_vocabulary,
  "vocab.txt": _of_lines,
}


def differing_rows(
  first: Mapping[int, str], second: Mapping[int, str], rows: int
) -> list[str]:
  """Lists the rows that are one token in one model and another in the other.

  Args:
    first: number -> token.
    second: number -> token.
    rows: how many both embeddings have; rows beyond do not count.

  Returns:
    Texts such as "row 5 is 'b', not 'a'", the second model's token first, in
    order. A row that only one model names is not listed: the other leaves it
    unused.

  Example:
    >>> differing_rows({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "x"}, 3)
    ["row 1 is 'x', not 'b'"]
  """
  return [
    f"row {number} is {second[number]!r}, not {first[number]!r}"
    for number in sorted(first.keys() & second.keys())
    if number < rows and first[number] != second[number]
  ]


def rows_by_token(
  first: Mapping[int, str],
  second: Mapping[int, str],
  rows: tuple[int, int],
) -> tuple[int, ...] | None:
  """Finds for each row of one table the row of the same token in another.

  A row whose token the other model does not know, or that has none, is paired
  by number if that number is no token of the first there either: a reserved
  token that was renamed, or padding.

  Args:
    first: number -> token.
    second: number -> token.
    rows: how many each table has.

  Returns:
    For each row of the first its row in the second, -1 where there is none.
    None if these are the same numbers throughout.

  Example:
    >>> rows_by_token({0: "a", 1: "b"}, {0: "x", 1: "a", 2: "b"}, (2, 3))
    (1, 2)
    >>> rows_by_token({0: "a", 1: "b"}, {0: "a", 1: "c", 2: "d"}, (2, 3))
  """
  count, there = rows
  number_of = {second[n]: n for n in sorted(second, reverse=True) if n < there}
  known = set(first.values())

  def row_of(number: int) -> int:
    token, other = first.get(number), second.get(number)
    is_there = number < there
    if is_there and token is not None and token == other:
      return number
    if token is not None and token in number_of:
      return number_of[token]
    return number if is_there and other not in known else -1

  found = tuple(row_of(number) for number in range(count))
  plain = (number if number < there else -1 for number in range(count))
  return None if found == tuple(plain) else found
