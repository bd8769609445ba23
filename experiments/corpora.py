# SPDX-License-Identifier: Apache-2.0
"""The texts that models are finetuned on and measured with, by name."""

import os
from collections.abc import Callable

from experiments import smollm2, texts

Cache = str | os.PathLike[str] | None

#: name -> cache folder -> the whole text.
CORPORA: dict[str, Callable[[Cache], str]] = {
  "kjv": smollm2.kjv,
  "pydoc": lambda _: texts.pydoc(),
}


def parts(name: str, cache: Cache = None) -> tuple[str, str]:
  """What may be trained on of a text, and what is held out.

  Args:
    name: of `CORPORA`.
    cache: as `caches.cache_folder`.

  Returns:
    As `texts.split`.

  Raises:
    ValueError: for another name.

  Example:
    >>> train, held = parts("pydoc")
    >>> 8 < len(train) / len(held) < 10
    True
  """
  if name not in CORPORA:
    raise ValueError(f"no text is called {name!r}: take {', '.join(CORPORA)}")
  return texts.split(CORPORA[name](cache))


def label(name: str) -> str:
  """A text's name in tables; pydoc's says which Python it is of.

  Args:
    name: of `CORPORA`.

  Returns:
    The name.

  Example:
    >>> label("kjv"), label("pydoc")[:16]
    ('kjv', 'pydoc of Python ')
  """
  return texts.pydoc_source() if name == "pydoc" else name
