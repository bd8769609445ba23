# SPDX-License-Identifier: Apache-2.0
"""Loads handwritten digits of 8 x 8, styles them, and trains judges of both."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.svm import SVC

PIXELS = 64
CLASSES = 10

Style = Callable[[np.ndarray], np.ndarray]


class Digits(NamedTuple):
  """Images and the digits that they show.

  Attributes:
    images: (n, 64) float32 in [-1, 1], ink is 1.
    labels: (n,) integers.
  """

  images: np.ndarray
  labels: np.ndarray


def split_digits(seed: int) -> tuple[Digits, Digits, Digits]:
  """Splits scikit-learn's 1797 digits in three parts that share no image.

  Args:
    seed: of the split.

  Returns:
    Two of 718 to train on and one of 361 held out.

  Example:
    >>> [len(part.labels) for part in split_digits(0)]
    [718, 718, 361]
  """
  found: Any = load_digits()
  images = (found["data"] / 8 - 1).astype(np.float32)
  order = np.random.default_rng(seed).permutation(len(images))
  one, two, held = (
    Digits(images[at], found["target"][at])
    for at in np.split(order, [718, 1436])
  )
  return one, two, held


def join(*parts: Digits) -> Digits:
  """Joins several sets of digits, in this order.

  Args:
    *parts: Digits.

  Returns:
    Digits.

  Example:
    >>> one = Digits(np.zeros((2, 64)), np.zeros(2))
    >>> join(one, one).images.shape
    (4, 64)
  """
  return Digits(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def thicken(images: np.ndarray) -> np.ndarray:
  """Thickens strokes by a pixel: takes the largest of 2 x 2 neighbours.

  Args:
    images: (n, 64).

  Returns:
    An array like images.

  Example:
    >>> dot = np.zeros((1, 64))
    >>> dot[0, 9] = 1
    >>> int(thicken(dot).sum())
    4
  """
  square = images.reshape(-1, 8, 8)
  return ndimage.grey_dilation(square, size=(1, 2, 2)).reshape(images.shape)


def rotate(images: np.ndarray) -> np.ndarray:
  """Turns the images a quarter to the left.

  Args:
    images: (n, 64).

  Returns:
    An array like images.

  Example:
    >>> dot = np.zeros((1, 64))
    >>> dot[0, 7] = 1  # the top right corner goes to the top left
    >>> int(rotate(dot).argmax())
    0
  """
  turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2))
  return np.ascontiguousarray(turned).reshape(images.shape)


class Judges(NamedTuple):
  """Two classifiers of images, and how often each is right.

  Attributes:
    style: images (n, 64) -> (n,) bool, whether in the style.
    digit: images (n, 64) -> (n,) integers.
    accuracy: name -> share, of held-out images plain and styled.
  """

  style: Callable[[np.ndarray], np.ndarray]
  digit: Callable[[np.ndarray], np.ndarray]
  accuracy: dict[str, float]


def train_judges(data: Digits, held: Digits, style: Style) -> Judges:
  """Trains support vector machines on plain and styled real images.

  Args:
    data: to learn from; every image is seen in both forms.
    held: to be tested on.
    style: images -> styled images.

  Returns:
    Judges.
  """
  both = np.concatenate([data.images, style(data.images)])
  is_styled = np.repeat([False, True], len(data.labels))
  kind: Any = {"C": 10, "gamma": 0.02}
  judge = SVC(**kind).fit(both, is_styled)
  reader = SVC(**kind).fit(both, np.tile(data.labels, 2))
  accuracy = {}
  for name, images, wanted in (
    ("plain", held.images, False),
    ("styled", style(held.images), True),
  ):
    right = np.mean(judge.predict(images) == wanted)
    accuracy[f"{name}, style"] = float(right)
    accuracy[f"{name}, digit"] = float(reader.score(images, held.labels))
  return Judges(judge.predict, reader.predict, accuracy)


class Cell(NamedTuple):
  """Samples of one set of bound programs, and the judges' verdicts.

  Attributes:
    images: (n, 64).
    styled: (n,) bool, whether the style's judge sees the style.
    asked: (n,) bool, whether the digit is the one asked for.
  """

  images: np.ndarray
  styled: np.ndarray
  asked: np.ndarray


def judge(
  images: Mapping[str, np.ndarray], judges: Judges, labels: np.ndarray
) -> dict[str, Cell]:
  """Lets the judges classify all images.

  Args:
    images: name -> (n, 64).
    judges: of the style.
    labels: (n,) asked for.

  Returns:
    name -> Cell.
  """
  return {
    name: Cell(x, judges.style(x), judges.digit(x) == labels)
    for name, x in images.items()
  }
