# SPDX-License-Identifier: Apache-2.0
"""Writes the same paragraphs in several forms, as a small model's tokens.

Words come from `texts`, forms are functions of a paragraph: words of one text
can be written in the form of another.
"""

import functools
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.lib.data import texts

#: Paragraph -> lines of it, with what ends them.
Form = Callable[[str], str]
# Of the whole text, so that its paragraphs are of one kind.
_LONGEST = 700_000
_SHORTEST = 60


def paragraphs(name: str, cache: texts.Cache = None) -> list[str]:
  """Returns a text's paragraphs, each a line with single spaces.

  Args:
    name: of `texts.CORPORA`.
    cache: folder for downloads; None is ~/.cache/jlora.

  Returns:
    Those of 60 characters or more; pydoc's without the marks of its lists.
  """
  text = texts.CORPORA[name](cache)[:_LONGEST]
  # The Bible has a paragraph a line, pydoc blank lines between them.
  found = text.split("\n\n" if "\n\n" in text else "\n")
  found = [" ".join(x.split()).removeprefix("* ") for x in found]
  return [x for x in found if len(x) >= _SHORTEST]


def split(found: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
  """Deals paragraphs to training, to validation and to tests.

  Args:
    found: paragraphs.

  Returns:
    Eight in ten, one in ten, one in ten.

  Example:
    >>> [len(x) for x in split([str(i) for i in range(20)])]
    [16, 2, 2]
  """
  held = [list(found[at::10]) for at in (4, 9)]
  train = [x for at, x in enumerate(found) if at % 10 not in (4, 9)]
  return train, held[0], held[1]


def plain(paragraph: str) -> str:
  r"""Writes a paragraph as a line.

  Example:
    >>> plain("In the beginning")
    'In the beginning\n'
  """
  return paragraph + "\n"


def item(paragraph: str) -> str:
  r"""Writes a paragraph as pydoc writes items: short lines, indented.

  Two spaces are between sentences, and a blank line after the item.

  Example:
    >>> item("And it was so. " + 3 * "And God said ")
    '* And it was so.  And God said And God\n  said And God said\n\n'
  """
  lines = textwrap.fill(
    paragraph,
    40,
    initial_indent="* ",
    subsequent_indent="  ",
    fix_sentence_endings=True,
    break_long_words=False,
    break_on_hyphens=False,
  )
  return lines + "\n\n"


def quoted(paragraph: str) -> str:
  r"""Writes a paragraph as mail quotes it.

  Example:
    >>> quoted("And it was so.")
    '> And it was so.\n>\n'
  """
  lines = textwrap.wrap(
    paragraph, 58, break_long_words=False, break_on_hyphens=False
  )
  return "".join(f"> {line}\n" for line in lines) + ">\n"


def loud(paragraph: str) -> str:
  r"""Writes a paragraph in capitals.

  Example:
    >>> loud("And it was so.")
    'AND IT WAS SO.\n'
  """
  return paragraph.upper() + "\n"


def joined(paragraph: str) -> str:
  r"""Writes underscores for spaces.

  Example:
    >>> joined("And it was so.")
    'And_it_was_so.\n'
  """
  return paragraph.replace(" ", "_") + "\n"


def titled(paragraph: str) -> str:
  r"""Begins every word with a capital.

  Example:
    >>> titled("And it was so.")
    'And It Was So.\n'
  """
  return " ".join(x[:1].upper() + x[1:] for x in paragraph.split(" ")) + "\n"


@functools.cache
def tokenizer(text: str, size: int) -> Callable[[str], np.ndarray]:
  """Learns tokens of frequent bytes from a text.

  Args:
    text: any text.
    size: of the vocabulary, at least 256.

  Returns:
    A function of a string; its value is (tokens,) int32.

  Example:
    >>> len(tokenizer("ab ab ab", 258)("ab ab"))
    2
  """
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator(text.splitlines(keepends=True), trainer)
  return lambda text: np.asarray(model.encode(text).ids, np.int32)


def windows(
  rng: np.random.Generator, stream: np.ndarray, count: int, length: int
) -> np.ndarray:
  """Draws stretches of a text evenly.

  Args:
    rng: generator.
    stream: (tokens,).
    count: how many.
    length: tokens of each.

  Returns:
    (count, length), like stream; they may overlap.

  Raises:
    ValueError: a text shorter than a stretch.

  Example:
    >>> windows(np.random.default_rng(0), np.arange(3), 1, 3)
    array([[0, 1, 2]])
  """
  if len(stream) < length:
    raise ValueError(
      f"a text of {len(stream)} tokens has no stretch of {length}; take "
      "shorter ones"
    )
  starts = rng.integers(0, len(stream) - length + 1, count)
  return stream[starts[:, None] + np.arange(length)]
