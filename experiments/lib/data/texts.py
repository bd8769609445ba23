# SPDX-License-Identifier: Apache-2.0
"""Provides texts as tokens, with disjoint training and held-out parts."""

import os
import pathlib
import platform
from collections.abc import Callable, Iterator
from pydoc_data import topics

import numpy as np

from experiments.lib.data import smollm2

Cache = str | os.PathLike[str] | None


def pydoc() -> str:
  """Returns Python's own help topics: technical English without a download.

  Another version of Python has other topics: figures hold for `pydoc_source()`.
  """
  return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def pydoc_source() -> str:
  """Names the Python version whose help `pydoc` returns, for tables."""
  return f"pydoc of Python {platform.python_version()}"


def library() -> str:
  """Returns the source of the modules that Python's own library begins with.

  Files of its folder in order of their names, without packages. Another version
  of Python has other ones.
  """
  folder = pathlib.Path(os.__file__).parent
  files = sorted(folder.glob("*.py"))
  return "".join(file.read_text("utf-8", "replace") for file in files)


#: name -> cache folder -> the whole text.
CORPORA: dict[str, Callable[[Cache], str]] = {
  "kjv": smollm2.kjv,
  "pydoc": lambda _: pydoc(),
}


def parts(name: str, cache: Cache = None) -> tuple[str, str]:
  """Returns the training and the held-out part of a text.

  Args:
    name: of `CORPORA`.
    cache: folder for downloads and models; None is ~/.cache/jlora.

  Returns:
    As `split`.

  Raises:
    ValueError: for another name.

  Example:
    >>> train, held = parts("pydoc")
    >>> 8 < len(train) / len(held) < 10
    True
  """
  if name not in CORPORA:
    raise ValueError(f"no text is called {name!r}: take {', '.join(CORPORA)}")
  return split(CORPORA[name](cache))


def label(name: str) -> str:
  """Returns a text's name in tables; pydoc's names the version of Python.

  Args:
    name: of `CORPORA`.

  Returns:
    The name.

  Example:
    >>> label("kjv"), label("pydoc")[:16]
    ('kjv', 'pydoc of Python ')
  """
  return pydoc_source() if name == "pydoc" else name


def split(text: str) -> tuple[str, str]:
  """Splits a text in nine tenths to train on and a held-out last tenth."""
  cut = len(text) * 9 // 10
  return text[:cut], text[cut:]


def encode_bytes(text: str) -> np.ndarray:
  """Returns a text's bytes, the tiny model's tokens: (bytes,) int32."""
  return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def excerpts(
  text: str,
  encode: Callable[[str], np.ndarray],
  *,
  rows: int,
  length: int,
  seed: int | None = None,
) -> np.ndarray:
  """Cuts a text into equal parts; returns a stretch of each as tokens.

  Only the stretches are tokenised, not the whole text.

  Args:
    text: any text, long enough.
    encode: string -> (tokens,) int.
    rows: how many stretches.
    length: tokens predicted in each.
    seed: of where in its part each begins; None takes the beginnings.

  Returns:
    (rows, length + 1) int32, no two rows overlapping.

  Raises:
    ValueError: if the text is too short for so many tokens.

  Example:
    >>> excerpts("abcdefgh", encode_bytes, rows=2, length=2)
    array([[ 97,  98,  99],
           [101, 102, 103]], dtype=int32)
  """
  stride = len(text) // rows
  limit = min(stride, 16 * (length + 1))
  starts = np.arange(rows) * stride
  if seed is not None:
    rng = np.random.default_rng(seed)
    # Long enough for the tokens in almost any text.
    starts += rng.integers(0, max(stride - limit, 0) + 1, rows)
  found = [
    encode(text[start : start + limit])[: length + 1] for start in starts
  ]
  if not found or min(map(len, found)) <= length:
    raise ValueError(
      f"{rows} stretches of {length + 1} tokens do not fit into "
      f"{len(text)} characters of this text; ask for fewer or shorter ones"
    )
  return np.stack(found).astype(np.int32)


def excerpts_apart(
  text: str, encode: Callable[[str], np.ndarray], *, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns two disjoint sets of stretches: to choose with, and to report.

  Args:
    text: any text, long enough.
    encode: string -> (tokens,) int.
    rows: how many stretches in each set.
    length: tokens predicted in each.

  Returns:
    (rows, length + 1) int32 twice: the beginnings of equal parts of the text,
    as `excerpts` without a seed takes them, and what begins half a part
    further. The sets do not overlap.

  Raises:
    ValueError: as `excerpts`.

  Example:
    >>> first, second = excerpts_apart("abcdefgh", encode_bytes, rows=2,
    ...                                length=1)
    >>> [bytes(row.tolist()) for row in (*first, *second)]
    [b'ab', b'ef', b'cd', b'gh']
  """
  stride = len(text) // rows
  parts = [text[at * stride : (at + 1) * stride] for at in range(rows)]
  first, second = (
    [excerpts(part, encode, rows=1, length=length) for part in halves]
    for halves in (
      [part[: stride // 2] for part in parts],
      [part[stride // 2 :] for part in parts],
    )
  )
  return np.concatenate(first), np.concatenate(second)


def batches(
  tokens: np.ndarray, batch: int, seed: int = 0
) -> Iterator[np.ndarray]:
  """Yields the rows in random order, `batch` at a time, each once.

  Args:
    tokens: (rows, time + 1) int32.
    batch: rows per batch; divides the number of rows.
    seed: of the order.

  Yields:
    (batch, time + 1) int32.
  """
  order = np.random.default_rng(seed).permutation(len(tokens))
  yield from tokens[order.reshape(-1, batch)]
