# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of tunix's language models, for those of transformers.

References:
  google/tunix 0.1.7, `params.py` and `model.py` of each model.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jlora.loras import Lora
from jlora.views import MatrixView, ViewRule

_LAYER = r"model\.layers\.(\d+)\."
#: What config.json calls the numbers of heads of queries, and of keys.
_QUERIES, _KEYS = "num_attention_heads", "num_key_value_heads"


class Row(NamedTuple):
  """A parameter of a layer.

  Attributes:
    pattern: its name in transformers.
    path: its name in tunix.
    read: the heads that it sums over, each of several numbers; None: one axis.
    written: the heads that it writes; None: one axis.
  """

  pattern: str
  path: str
  read: str | None = None
  written: str | None = None


_ROWS = (
  Row(_LAYER + r"self_attn\.q_proj", r"layers/\1/attn/q_proj/w",
      written=_QUERIES),
  Row(_LAYER + r"self_attn\.(k|v)_proj", r"layers/\1/attn/\2_proj/w",
      written=_KEYS),
  Row(_LAYER + r"self_attn\.o_proj", r"layers/\1/attn/o_proj/w",
      read=_QUERIES),
  Row(_LAYER + r"mlp\.(gate|up|down)_proj", r"layers/\1/mlp/\2_proj/kernel"),
  Row(r"lm_head", "lm_head/w"),
)  # fmt: skip

#: `model_type` -> rows. tunix's Llama 3, Qwen 2 and Qwen 3 have equal names.
KINDS: dict[str, tuple[Row, ...]] = {
  kind: _ROWS for kind in ("llama", "qwen2", "qwen3")
}


class Renamed(Mapping[str, Lora]):
  """Loras by tunix's names, read on demand.

  Attributes:
    loras: by transformers' names.
    names: tunix's name -> transformers'.
    like: tunix's name -> shape.
    views: how each is read.
  """

  def __init__(
    self,
    loras: Mapping[str, Lora],
    names: Mapping[str, str],
    like: Mapping[str, tuple[int, ...]],
    views: tuple[ViewRule, ...],
  ):
    self.loras, self.names = loras, dict(names)
    self.like, self.views = dict(like), views

  def __getitem__(self, path: str) -> Lora:
    return self.loras[self.names[path]]

  def __iter__(self) -> Iterator[str]:
    return iter(self.names)

  def __len__(self) -> int:
    return len(self.names)


def is_known(config: Mapping[str, Any]) -> bool:
  """Returns whether tunix's names of a model are in the table.

  Args:
    config: the contents of its config.json.
  """
  return str(config.get("model_type")) in KINDS


def place_of(
  name: str, matrix: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[str, tuple[int, ...], MatrixView] | None:
  """Returns a parameter's name, shape and view in tunix; None if it has none.

  Args:
    name: in transformers, of a module or its weight.
    matrix: (in, out) of the weight.
    config: the contents of the model's config.json.

  Raises:
    ValueError: config.json lacks the heads, or they do not fit.

  Example:
    >>> config = {"model_type": "llama", "num_attention_heads": 2,
    ...           "num_key_value_heads": 1}
    >>> name = "model.layers.3.self_attn.k_proj.weight"
    >>> place_of(name, (8, 4), config)[:2]
    ('layers/3/attn/k_proj/w', (8, 1, 4))
  """
  module = name.removesuffix(".weight")
  for row in KINDS[str(config.get("model_type"))]:
    if match := re.fullmatch(row.pattern, module):
      sides = [
        _axes(module, n, heads, config)
        for n, heads in zip(matrix, (row.read, row.written), strict=True)
      ]
      shape, count = (*sides[0], *sides[1]), len(sides[0])
      view = MatrixView(
        (), tuple(range(count)), tuple(range(count, len(shape)))
      )
      return match.expand(row.path), shape, view
  return None


def _axes(
  module: str, n: int, name: str | None, config: Mapping[str, Any]
) -> tuple[int, ...]:
  """Returns the axes of a side: heads and their size, or one."""
  if name is None:
    return (n,)
  heads = config.get(name) or config.get(_QUERIES)
  if not isinstance(heads, int) or heads < 1 or n % heads:
    raise ValueError(
      f"{module} has {n} numbers for the heads, and the model's config.json "
      f"tells {heads!r} as {name}; give that of the language model itself."
    )
  return heads, n // heads


def renamed(
  loras: Mapping[str, Lora], config: Mapping[str, Any], left: dict[str, str]
) -> Renamed:
  """Returns Loras by tunix's names.

  Args:
    loras: module or parameter of transformers -> Lora; may be lazy. A stack
      has none.
    config: the contents of the model's config.json.
    left: gets those that tunix's model has no parameter for.

  Raises:
    ValueError: a `model_type` that is not in the table.

  Example:
    >>> import numpy as np
    >>> lora = Lora(np.ones((1, 4)), np.ones((1, 9)), np.float32(1))
    >>> left = {}
    >>> loras = {"lm_head": lora, "odd": lora}
    >>> [*renamed(loras, {"model_type": "qwen3"}, left)], left
    (['lm_head/w'], {'odd': 'tunix has no parameter for it'})
  """
  if not is_known(config):
    raise ValueError(
      f"the model_type {config.get('model_type')!r} has no row in the table of "
      f"tunix's names; known are {', '.join(KINDS)}. Of other models give "
      "Loras by tunix's own names."
    )
  names: dict[str, str] = {}
  like: dict[str, tuple[int, ...]] = {}
  views: list[ViewRule] = []
  for name in loras:
    lora = loras[name]
    matrix = lora.a.shape[-1], lora.b.shape[-1]
    place = place_of(name, matrix, config) if lora.a.ndim == 2 else None
    if place is None:
      left[name] = "tunix has no parameter for it"
      continue
    path, shape, view = place
    if path in names:
      raise ValueError(f"{names[path]} and {name} are one module; give one.")
    names[path], like[path] = name, shape
    views.append((re.escape(path), len(shape), view))
  return Renamed(loras, names, like, tuple(views))
