# SPDX-License-Identifier: Apache-2.0
"""Writes adapters as MaxText's own loader of LoRAs restores them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epy

from jlora.formats.bases import shape_of
from jlora.formats.jax_layouts import Form, kept_form, plain_name
from jlora.formats.jax_states import (
  NO_WHOLE,
  Part,
  check_output,
  check_some,
  make_pair,
  parts_of,
  write_folder,
)
from jlora.formats.peft.layouts import CONFIG
from jlora.formats.storing import Select, everything
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.tree_views import table_for
from jlora.views import MatrixView, views_of

with epy.lazy_imports():  # they take a third of a second: only if needed
  import orbax.checkpoint as ocp

#: Where the state lies in a folder, and under which keys.
ITEMS, ROOT = "0/items", ("params", "params")
SIDES = ("lora_a.kernel", "lora_b.kernel")
_KERNELS = r"(.*/)?self_attention/(query|key|value|out)/kernel"
_TARGETS = {
  "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj",
}  # fmt: skip
_OTHER = (
  "MaxText's loader has LoRAs for query, key, value and out of self_attention"
)


def save_maxtext(
  folder: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Mapping[str, Any],
  views: Any = None,
  shifts: Mapping[str, Any] | None = None,
  dtype: Any = np.float32,
  select: Select = everything,
) -> dict[str, str]:
  """Writes a LoRA for MaxText's `lora_input_adapters_path`.

      W' - W = lora_a.kernel lora_b.kernel     (lora_alpha = r, scale in b)

  Args:
    folder: a new one: `adapter_config.json`, and `0/items`, an orbax checkpoint
      of `params/params/decoder/...`.
    loras: parameter -> Lora, by MaxText's paths; may be lazy.
    like: parameter -> anything with `.shape`, every parameter of the base; the
      norms of scanned layers tell their axis.
    views: how parameters are read as matrices, as for `jlora.extract`.
    shifts: parameter -> change, of what is no Lora; it is not carried.
    dtype: storage dtype.
    select: which parameters, by name and shape.

  Returns:
    {name: why it is not in the folder}. All have the largest rank, by zeros,
    and kernels of the same kind without a Lora are zeros, since MaxText asks
    for all of a kind.

  Raises:
    ValueError: the folder exists, no Lora is left, layers that are stacked
      along another axis than the second, names that `like` lacks, shapes that
      differ, or entries that the dtype cannot hold.

  Example:
    >>> import tempfile
    >>> from jlora.formats import open_adapter
    >>> path = "params/decoder/layers_0/self_attention/query/kernel"
    >>> ones: Any = np.ones
    >>> lora = Lora(ones((1, 8)), ones((1, 8)), np.float32(2))
    >>> with tempfile.TemporaryDirectory() as place:
    ...   left = save_maxtext(
    ...     f"{place}/x", {path: lora}, like={path: (8, 2, 4)})
    ...   adapter = open_adapter(f"{place}/x")
    ...   left, adapter.format, list(adapter)
    ({}, 'maxtext', ['decoder/layers_0/self_attention/query/kernel'])

  References:
    AI-Hypercomputer/maxtext, `src/maxtext/utils/lora_utils.py`.

  Approximation:
    MaxText restores `out` and scanned layers, but its function that adds a LoRA
    to the base takes query, key and value of single layers alone. MaxText
    itself was not run; its trainer with qwix restores what `save_tunix` writes.
  """
  check_output(folder, loras, like, dtype)
  left = dict.fromkeys(shifts or {}, NO_WHOLE)
  given = {}
  for name in loras:
    if re.fullmatch(_KERNELS, plain_name(name)):
      given[name] = loras[name]
    else:
      left[name] = _OTHER
  check_some(given, left)

  def make_form(path: str, view: MatrixView) -> Form:
    del path
    return kept_form(view)

  parts = parts_of(given, like, make_form, views, select, left)
  check_some(parts, left)
  _check_stacks(parts)
  kinds = {re.fullmatch(_KERNELS, path)[2] for path in parts}  # type: ignore[index]
  parts |= _missing(parts, kinds, like, views)
  rank = max(part.rank for part in parts.values())
  tree: dict[str, Any] = {}
  for path, part in parts.items():
    node = tree
    for name in (*ROOT, *path.split("/")[:-1]):
      node = node.setdefault(name, {})
    node |= zip(SIDES, make_pair(part, given, rank, dtype), strict=True)
  told = {
    "r": rank,
    "lora_alpha": float(rank),
    "target_modules": [_TARGETS[kind] for kind in _TARGETS if kind in kinds],
  }

  def fill(place: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(place.absolute() / ITEMS, tree)
    # The loader looks for it; some versions of orbax leave it in buckets alone.
    (place / ITEMS / "commit_success.txt").touch()

  write_folder(folder, fill, {CONFIG: told})
  return left


def _check_stacks(parts: Mapping[str, Part]) -> None:
  """Raises if layers are stacked along another axis than MaxText's."""
  wrong = [
    f"{path} {part.weight} along {part.view.batch}"
    for path, part in parts.items()
    if part.view.batch not in ((), (1,))
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} kernels are stacks of layers along another axis than the "
      f"second, MaxText's: {name_some(wrong)}. Give the whole base as `like`, "
      "whose norms tell the axis, or `views`."
    )


def _missing(
  parts: Mapping[str, Part],
  kinds: set[str],
  like: Mapping[str, Any],
  views: Any,
) -> dict[str, Part]:
  """Returns the kernels of these kinds that no Lora changes."""
  shapes = {plain_name(name): shape_of(x) for name, x in
            getattr(like, "spec", like).items()}  # fmt: skip
  rest = {
    path: shape
    for path, shape in shapes.items()
    if (found := re.fullmatch(_KERNELS, path))
    if found[2] in kinds and path not in parts
  }
  own = views_of(rest, views or table_for(shapes))
  return {
    path: Part(None, shape, own[path], kept_form(own[path]), 0)
    for path, shape in rest.items()
    if path in own
  }
