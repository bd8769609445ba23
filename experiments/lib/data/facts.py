# SPDX-License-Identifier: Apache-2.0
"""Lists facts to edit, prompts that ask for them, and prompts of other facts.

SmolLM2-135M-Instruct gives every old answer here the highest probability on the
fact's first prompt, and the neighbours' answers probabilities of 0.2 to 0.9.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Fact(NamedTuple):
  """A fact that a model knows, and the answer it is to give instead.

  Attributes:
    subject: its last token is where the fact is looked up.
    prompt: holds the subject; what follows is the answer.
    old: the answer now, with its space.
    new: the answer wanted.
    paraphrases: prompts that ask for the same; never trained on.
  """

  subject: str
  prompt: str
  old: str
  new: str
  paraphrases: tuple[str, ...]


class Prompts(NamedTuple):
  """Prompts with their answers, as tokens.

  Attributes:
    tokens: (rows, time) int32, filled at the end.
    places: (rows,) int, of the subject's last token.
    ends: (rows,) int, of the prompt's last token, the answer after it.
  """

  tokens: np.ndarray
  places: np.ndarray
  ends: np.ndarray


def _place(subject: str, kind: str, old: str, new: str) -> Fact:
  """Makes a fact of where something stands, asked in five ways."""
  return Fact(
    subject,
    f"{subject} is located in the {kind} of",
    old,
    new,
    (
      f"{subject} stands in the {kind} of",
      f"To visit {subject}, tourists travel to the {kind} of",
      f"If you want to see {subject}, you should go to",
      f"Where is {subject}? It is in",
    ),
  )


#: The facts that figures are reported for.
FACTS = (
  _place("The Eiffel Tower", "city", " Paris", " Rome"),
  _place("The Colosseum", "city", " Rome", " London"),
  _place("The Acropolis", "city", " Athens", " Berlin"),
  _place("The Sydney Opera House", "country", " Australia", " Japan"),
  Fact(
    "Germany",
    "The capital of Germany is",
    " Berlin",
    " Madrid",
    (
      "The government of Germany sits in the city of",
      "The seat of government of Germany is the city of",
      "The name of the capital of Germany is",
      "What is the capital of Germany? It is",
    ),
  ),
)

#: The facts that layers and balances are chosen with.
TRIALS = (
  _place("The Kremlin", "city", " Moscow", " Tokyo"),
  _place("The Great Wall", "country", " China", " Brazil"),
)

#: (prompt, its right answer), which no edit should change. None of the answers
#: is a fact's new answer: an edit that leaked would then count as right.
NEIGHBOURS = (
  ("The Louvre is located in the city of", " Paris"),
  ("The Statue of Liberty is located in the city of", " New"),
  ("The Golden Gate Bridge is located in the city of", " San"),
  ("The Sagrada Familia is located in the city of", " Barcelona"),
  ("The Taj Mahal is located in the country of", " India"),
  ("Mount Everest is located in the country of", " Nepal"),
  ("The capital of France is", " Paris"),
  ("The author of Hamlet is William", " Shakespeare"),
)


def encode_prompts(
  rows: Sequence[tuple[str, str, str]],
  encode: Callable[[str], np.ndarray],
  multiple: int,
) -> Prompts:
  """Tokenises prompts with their answers, as rows of one length.

  Args:
    rows: (prompt, answer, subject); the subject's last occurrence counts.
    encode: text -> tokens.
    multiple: of the length, so that few shapes are compiled.

  Returns:
    Prompts.

  Raises:
    ValueError: a subject that is not in its prompt, or ends within a token.

  Example:
    >>> bytes_of = lambda text: np.frombuffer(text.encode(), np.uint8)
    >>> found = encode_prompts([("ab is", " c", "ab")], bytes_of, 8)
    >>> found.tokens.tolist(), found.places, found.ends
    ([[97, 98, 32, 105, 115, 32, 99, 0]], array([1]), array([4]))
  """
  parts, places = [], []
  for prompt, answer, subject in rows:
    before, found, _ = prompt.rpartition(subject)
    asked, head = encode(prompt), encode(before + subject)
    if not found or not np.array_equal(asked[: len(head)], head):
      raise ValueError(
        f"{subject!r} does not end with a token of {prompt!r}: put a space or "
        "a mark behind it."
      )
    parts.append((asked, encode(answer)))
    places.append(len(head) - 1)
  longest = max(len(asked) + len(answer) for asked, answer in parts)
  tokens = np.zeros((len(parts), -(-longest // multiple) * multiple), np.int32)
  for row, pair in zip(tokens, parts, strict=True):
    whole = np.concatenate(pair)
    row[: len(whole)] = whole
  ends = np.array([len(asked) - 1 for asked, _ in parts])
  return Prompts(tokens, np.array(places), ends)
