# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and, while they are said, tokens to text."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: The folder of a base has this file, if it has a tokenizer.
TOKENIZER = "tokenizer.json"
_UNFINISHED = "\ufffd"  # what stands for bytes of a letter that is not whole


def need(module: str) -> Any:
  """Imports a package of the extra `serve`.

  Raises:
    ValueError: it is not installed.

  Example:
    >>> need("nothing_of_that_name")
    Traceback (most recent call last):
    ...
    ValueError: `jlora serve` needs nothing_of_that_name: pip install
    'jlora[serve]'
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    name = module.partition(".")[0]
    raise ValueError(
      f"`jlora serve` needs {name}: pip install 'jlora[serve]'"
    ) from error


def open_tokenizer(folder: Path) -> Any:
  """Opens the tokenizer of a model's folder, None if it has none.

  Raises:
    ValueError: a damaged file, or the package is not installed.
  """
  file = folder / TOKENIZER
  if not file.exists():
    return None
  try:
    return need("tokenizers").Tokenizer.from_file(str(file))
  except ValueError:
    raise
  except Exception as error:  # tokenizers raises nothing more exact
    raise ValueError(f"{file} is no tokenizer: {error}") from error


class Transcript:
  """The text of tokens that come bit by bit, up to a word that stops it.

  Args:
    tokenizer: of the package tokenizers; None for no text.
    stops: texts at which it is over; they are not part of it.
  """

  def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
    self._tokenizer, self._stops = tokenizer, stops
    self._tokens: list[int] = []
    self._sent = 0
    self.is_stopped = False

  def add(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
    """Adds tokens; returns the text that is sure by now.

    Letters of which bytes are missing wait for them, and so does what may be
    the beginning of a stop.

    Args:
      tokens: further ones.
      is_last: nothing more will come, so that nothing waits.
    """
    self._tokens += tokens
    if self._tokenizer is None or self.is_stopped:
      return ""
    text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.is_stopped, end = True, min(found)
    elif is_last:
      end = len(text)
    else:
      end = len(text.rstrip(_UNFINISHED)) - self._begun(text)
    new = text[self._sent : max(end, self._sent)]
    self._sent += len(new)
    return new

  def _begun(self, text: str) -> int:
    """Counts letters at a text's end that begin a stop."""
    return max(
      (
        size
        for stop in self._stops
        for size in range(1, len(stop))
        if text.endswith(stop[:size])
      ),
      default=0,
    )
