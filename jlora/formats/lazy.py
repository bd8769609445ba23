# SPDX-License-Identifier: Apache-2.0
"""Mappings whose values are made when they are asked for, and not kept."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jlora.numerics.finite import is_finite, not_finite


class Lazy(Mapping[str, Any]):
  """A mapping whose values are made on each access, and not kept.

  Args:
    makers: key -> function without arguments.
  """

  def __init__(self, makers: Mapping[str, Callable[[], Any]]):
    self._makers = dict(makers)

  def __getitem__(self, path: str) -> Any:
    return self._makers[path]()

  def __iter__(self) -> Iterator[str]:
    return iter(self._makers)

  def __len__(self) -> int:
    return len(self._makers)


class Finite(Lazy):
  """A lazy mapping of arrays, which are refused if they are not finite."""

  def __getitem__(self, path: str) -> Any:
    found = super().__getitem__(path)
    if not is_finite(found):
      raise not_finite(path, found, found.dtype)
    return found
