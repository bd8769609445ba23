# SPDX-License-Identifier: Apache-2.0
"""Reading which token each row of an embedding stands for.

Merging adds rows by their number. That is right only where a number means the
same token in all models, which shapes cannot tell, but tokenizers can.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    ValueError: a file that is not JSON.

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
  """Reads a tokenizer.json; None if its vocabulary has another form."""
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
  """Reads a vocab.json, and the added_tokens.json beside it."""
  found = json.loads(file.read_text("utf-8"))
  more = file.with_name("added_tokens.json")
  if more.is_file():
    found = {**found, **json.loads(more.read_text("utf-8"))}
  return {number: token for token, number in found.items()}


def _of_lines(file: Path) -> Tokens:
  """Reads a vocab.txt, a token on each line."""
  return dict(enumerate(file.read_text("utf-8").splitlines()))


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
