# SPDX-License-Identifier: Apache-2.0
"""Reading YAML that somebody else wrote, in bounded time and memory."""

import os
from collections import Counter
from typing import Any

import yaml

from jlora.checkpoints.documents import DEEPEST, read_text, shortened
from jlora.messages import name_some

_LARGEST = 2**18  # bytes: a parser in Python reads them in about a second
_MOST_NODES = 20_000  # what aliases stand for counted each time
_LONG = 64  # letters of a string that count as a value
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: str | os.PathLike) -> list[Any]:
  r"""Reads the documents of a YAML file; plain values alone.

  Args:
    path: the file.

  Returns:
    A list, empty for an empty file.

  Raises:
    ValueError: as `read_text`, no YAML, a key twice in one mapping (of which
      parsers take the last), over 256 KiB, more than 64 levels deep,
      or of more than 20,000 values, what an alias stands for counted each time.

  Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, "x.yml")
    ...   _ = file.write_text("a: &one [1, 2]\nb: *one")
    ...   read_yaml(file)
    [{'a': [1, 2], 'b': [1, 2]}]
  """
  text = read_text(path, _LARGEST)
  try:
    return list(yaml.load_all(text, _Plain))
  except Exception as error:  # odd scalars fail in many ways, as `!!int ''`
    raise ValueError(f"{path} cannot be read: {error}") from error


class _Plain(yaml.SafeLoader):
  """YAML's safe loader, with a limit on what aliases stand for."""

  def __init__(self, stream: str):
    super().__init__(stream)
    self._level = self._nodes = 0
    # id of a finished node -> how many values it holds, and its depth.
    self._known: dict[int, tuple[int, int]] = {}

  def compose_document(self) -> Any:
    """Composes a document; the last one's nodes may be gone."""
    self._known = {}
    return super().compose_document()

  def compose_node(self, parent: Any, index: Any) -> Any:
    """Composes a node and counts what it holds."""
    is_alias = self.check_event(yaml.AliasEvent)
    self._level += 1
    self._nodes += 1
    if self._level > DEEPEST or self._nodes > _MOST_NODES:
      raise self._too_large()
    node: Any = super().compose_node(parent, index)
    self._level -= 1
    if is_alias and id(node) not in self._known:
      raise yaml.YAMLError("an alias stands inside what it stands for")
    if not is_alias:
      _check_keys(node)
      self._known[id(node)] = self._count(node)
    size, depth = self._known[id(node)]
    if size > _MOST_NODES or depth + self._level > DEEPEST:
      raise self._too_large()
    return node

  def _count(self, node: Any) -> tuple[int, int]:
    """Returns how many values a node holds, and its depth."""
    if isinstance(node, yaml.ScalarNode):
      return 1 + len(node.value) // _LONG, 1
    inner = node.value
    if isinstance(node, yaml.MappingNode):
      inner = [one for pair in inner for one in pair]
    sizes = [self._known[id(one)] for one in inner]
    return (
      1 + sum(size for size, _ in sizes),
      1 + max((depth for _, depth in sizes), default=0),
    )

  def _too_large(self) -> yaml.YAMLError:
    """Returns the error for a file that holds more than any recipe."""
    return yaml.YAMLError(
      f"it has more than {_MOST_NODES:,} values or {DEEPEST} levels, what"
      " aliases stand for included"
    )


def _check_keys(node: Any) -> None:
  """Raises if a mapping has a key twice, but for `<<`."""
  if not isinstance(node, yaml.MappingNode):
    return
  keys = Counter(
    (key.tag, key.value)
    for key, _ in node.value
    if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE
  )
  if twice := [value for (_, value), count in keys.items() if count > 1]:
    line = node.start_mark.line + 1
    raise yaml.YAMLError(
      f"{name_some(map(shortened, twice))} is given twice in the mapping that "
      f"begins at line {line}; leave one"
    )
