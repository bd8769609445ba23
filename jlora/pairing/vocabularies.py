# SPDX-License-Identifier: Apache-2.0
"""Which token each row of an embedding stands for, by a folder's tokenizer.

Merging adds rows up by their number. That is right only where a number is the
same token in all models, which shapes cannot tell.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tokens = dict[int, str]


def read_tokens(path: str | os.PathLike) -> Tokens | None:
  """The token of each row: number -> string.

  Args:
    path: a checkpoint, its folder or a file in it.

  Returns:
    Of `tokenizer.json`, or else of `vocab.json` or `vocab.txt`, with the tokens
    that were added. None where there is none of these, or one of another form
    (a SentencePiece `tokenizer.model` alone cannot be read).

  Raises:
    ValueError: a file that is no JSON.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   text = '{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}'
    ...   _ = Path(folder, "tokenizer.json").write_text(text)
    ...   read_tokens(folder)
    {0: 'a', 1: 'b'}
  """
  folder = Path(path)
  folder = folder if folder.is_dir() else folder.parent
  for name, read in _READERS.items():
    if (folder / name).is_file():
      try:
        return read(folder / name)
      except json.JSONDecodeError as error:
        raise ValueError(f"{folder / name} is no JSON: {error}") from error
  return None


def _of_tokenizer(file: Path) -> Tokens | None:
  raw = json.loads(file.read_text("utf-8"))
  vocabulary = raw.get("model", {}).get("vocab")
  if isinstance(vocabulary, Mapping):
    found = {number: token for token, number in vocabulary.items()}
  elif isinstance(vocabulary, list):  # Unigram: (token, score) by number
    found = {number: pair[0] for number, pair in enumerate(vocabulary)}
  else:
    return None
  added = raw.get("added_tokens") or []
  return {**found, **{one["id"]: one["content"] for one in added}}


def _of_vocabulary(file: Path) -> Tokens:
  found = json.loads(file.read_text("utf-8"))
  more = file.with_name("added_tokens.json")
  if more.is_file():
    found = {**found, **json.loads(more.read_text("utf-8"))}
  return {number: token for token, number in found.items()}


def _of_lines(file: Path) -> Tokens:
  return dict(enumerate(file.read_text("utf-8").splitlines()))


_READERS: dict[str, Any] = {
  "tokenizer.json": _of_tokenizer,
  "vocab.json": _of_vocabulary,
  "vocab.txt": _of_lines,
}


def differing_rows(
  first: Mapping[int, str], second: Mapping[int, str], rows: int
) -> list[str]:
  """The rows that are one token in one model and another in the other.

  Args:
    first: number -> token.
    second: likewise.
    rows: how many both embeddings have; what is beyond does not count.

  Returns:
    "row 5 is 'b', not 'a'", with the second one's token first; in order. A
    row that only one of them names is none: the other keeps it for nothing.

  Example:
    >>> differing_rows({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "x"}, 3)
    ["row 1 is 'x', not 'b'"]
  """
  return [
    f"row {number} is {second[number]!r}, not {first[number]!r}"
    for number in sorted(first.keys() & second.keys())
    if number < rows and first[number] != second[number]
  ]
