# SPDX-License-Identifier: Apache-2.0
"""Finding, counting and renumbering the layers in the names of tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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
  found: dict[str, set[int]] = {}
  for name in names:
    if match := _LAYER.fullmatch(name):
      found.setdefault(match[1], set()).add(int(match[2]))
  counts = {prefix: max(indices) + 1 for prefix, indices in found.items()}
  if len(counts) > 1:
    counts = {k: n for k, n in counts.items() if n == wanted} or counts
  if len(counts) > 1:
    raise ValueError(
      f"Layers of several kinds, {name_some(counts)}: config.json's "
      f"num_hidden_layers, {wanted}, does not tell which are meant."
    )
  return LayerNames(*next(iter(counts.items()), ("", 0)))


def configure_layers(
  config: Mapping[str, Any], taken: list[int]
) -> dict[str, Any]:
  """Makes the config.json of a model put together from a reference's layers.

  Args:
    config: of the reference.
    taken: for each new layer the number of the reference's layer it is like.

  Returns:
    A new configuration: `num_hidden_layers` (or `n_layer`, `num_layers`) is the
    number of new layers, and lists with an entry for each layer follow them.

  Example:
    >>> config = {"num_hidden_layers": 2, "layer_types": ["full", "window"]}
    >>> configure_layers(config, [0, 1, 1])["layer_types"]
    ['full', 'window', 'window']
  """
  config = dict(config)
  for key in ("num_hidden_layers", "n_layer", "num_layers"):
    count = config.get(key)
    if not isinstance(count, int):
      continue
    config[key] = len(taken)
    for name, value in config.items():
      if isinstance(value, list) and len(value) == count:
        config[name] = [value[i] for i in taken if i < count]
  if isinstance(config.get("text_config"), dict):
    config["text_config"] = configure_layers(config["text_config"], taken)
  return config
