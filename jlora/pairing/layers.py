# SPDX-License-Identifier: Apache-2.0
"""Finding and counting the layers in the names of tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jlora.messages import name_some

_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|blocks|block|layer)\.)(\d+)\.(.+)")


class LayerNames(NamedTuple):
  """The naming of a model's layers, and how many there are.

  Attributes:
    prefix: what the names of their tensors begin with, up to the number.
    count: how many layers there are.
  """

  prefix: str
  count: int

  def place_of(self, name: str) -> tuple[int, str] | None:
    """Returns the layer of a tensor and the rest of its name, None outside."""
    found = _LAYER.fullmatch(name)
    if found is None or found[1] != self.prefix:
      return None
    return int(found[2]), found[3]

  def name_at(self, index: int, rest: str) -> str:
    """Returns the name of a tensor in a layer."""
    return f"{self.prefix}{index}.{rest}"


def count_stacks(names: Iterable[str]) -> dict[str, int]:
  """Counts the layers of every stack of layers.

  Args:
    names: of all tensors.

  Returns:
    What names in a stack begin with, up to the number -> how many layers.

  Example:
    >>> count_stacks(["encoder.block.1.q", "decoder.block.0.q", "shared"])
    {'encoder.block.': 2, 'decoder.block.': 1}
  """
  found: dict[str, set[int]] = {}
  for name in names:
    if match := _LAYER.fullmatch(name):
      found.setdefault(match[1], set()).add(int(match[2]))
  return {prefix: max(indices) + 1 for prefix, indices in found.items()}


def place_in_stack(name: str, stacks: Mapping[str, int]) -> float:
  """Returns where in its stack a tensor lies, 0 at the first and 1 at the last.

  Args:
    name: of the tensor.
    stacks: from `count_stacks`.

  Returns:
    1 in a stack of a single layer; 0 outside of all stacks.

  Example:
    >>> place_in_stack("encoder.block.1.q", {"encoder.block.": 3})
    0.5
  """
  match = _LAYER.fullmatch(name)
  if match is None or match[1] not in stacks:
    return 0.0
  last = stacks[match[1]] - 1
  return int(match[2]) / last if last else 1.0


def find_layers(names: Iterable[str], wanted: int | None = None) -> LayerNames:
  """Finds the layers that a model's tensors lie in.

  Args:
    names: of all tensors.
    wanted: how many layers the configuration has, to tell them from those of a
      vision tower; None if it does not say.

  Returns:
    LayerNames, of count 0 where no name has a layer's number.

  Raises:
    ValueError: there are several kinds of layers, and not exactly one of them
      has the wanted count.

  Example:
    >>> find_layers(["model.layers.0.q", "model.layers.1.q", "norm"])
    LayerNames(prefix='model.layers.', count=2)
  """
  counts = count_stacks(names)
  if len(counts) > 1:
    counts = {k: n for k, n in counts.items() if n == wanted} or counts
  if len(counts) > 1:
    raise ValueError(
      f"Layers of several kinds, {name_some(counts)}: config.json's "
      f"num_hidden_layers, {wanted}, does not tell which are meant."
    )
  return LayerNames(*next(iter(counts.items()), ("", 0)))
