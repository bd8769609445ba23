# SPDX-License-Identifier: Apache-2.0
"""Ranks and alphas in the metadata of diffusers' files."""

import math
import re
from collections.abc import Mapping
from typing import Any

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.documents import parse_json
from jlora.formats.bases import Split
from jlora.formats.peft.config import by_pattern
from jlora.messages import name_some

#: Key of the PEFT configuration in the metadata of diffusers' files.
ADAPTER_METADATA = "lora_adapter_metadata"


class Configuration:
  """What the metadata of a file of diffusers says of ranks and alphas.

  It is PEFT's configuration of each component, the component's name in front of
  each key. Patterns are mostly whole names, which are looked up at once.
  """

  def __init__(self, entries: Mapping[str, Any], place: str):
    self.own: dict[str, dict[str, Any]] = {}
    self.exact: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
      component, _, name = key.rpartition(".")
      own = self.own.setdefault(component, {})
      exact = self.exact.setdefault(component, {})
      if name in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
        literal = {p: _literal(p) for p in value}
        own[name] = {p: value[p] for p, one in literal.items() if not one}
        exact[name] = {one: value[p] for p, one in literal.items() if one}
      else:
        own[name] = value
    self.place = place
    _check_numbers(entries, place)
    if wrong := [name for name, own in self.own.items() if "r" not in own]:
      raise ValueError(f"{place}: {name_some(wrong)} has no rank r.")

  def scale(self, at: Split, stored: int | None) -> float | None:
    """Returns alpha / rank of a module, None of another component.

    Args:
      at: component and module.
      stored: the rank of its tensors, None if it has none.

    Raises:
      ValueError: the rank is another than that of the tensors.
    """
    component, module = at
    own = self.own.get(component)
    if own is None:
      return None
    told = []
    for name, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
      value = self.exact[component].get(name, {}).get(module)
      if value is None:
        value = by_pattern(own.get(name), module, own.get(key, 8))
      told.append(value)
    rank, alpha = told
    if stored and rank != stored:
      raise ValueError(
        f"{self.place}: the rank of {'.'.join(filter(None, at))} is {rank}, "
        f"its tensors have {stored}; the file is damaged."
      )
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _check_numbers(entries: Mapping[str, Any], place: str) -> None:
  """Raises unless ranks and alphas are numbers that a scale is made of."""
  wrong = []
  for key, value in entries.items():
    name = key.rpartition(".")[2]
    told = {key: value}
    if name in ("rank_pattern", "alpha_pattern"):
      told = value or {}
      if not isinstance(told, dict):
        wrong.append(f"{key}: {value!r}")
        continue
    is_rank = name in ("r", "rank_pattern")
    kinds = int if is_rank else int | float
    if is_rank or name in ("lora_alpha", "alpha_pattern"):
      wrong += [
        f"{one}: {x!r}"
        for one, x in told.items()
        if not isinstance(x, kinds)
        or not math.isfinite(x)
        or (is_rank and x < 1)
      ]
  if wrong:
    raise ValueError(
      f"{place}: {len(wrong)} entries are no rank of 1 or more, or no finite "
      f"alpha: {name_some(wrong)}; the file is damaged."
    )


def _literal(pattern: str) -> str:
  """Returns the name that a pattern stands for alone, "" if there are more."""
  plain = re.fullmatch(r"\^?((?:[\w-]|\\?\.|\\-)+)", pattern)
  whole = pattern.startswith("^") and plain
  return plain[1].replace("\\", "") if plain and whole else ""


def configuration_of(file: Checkpoint) -> Configuration | None:
  """Reads the PEFT configuration in the metadata of a file of diffusers."""
  text = file.metadata.get(ADAPTER_METADATA)
  if text is None:
    return None
  place = f"{file.path}: {ADAPTER_METADATA}"
  found = parse_json(text, place)
  if not isinstance(found, dict):
    raise ValueError(f"{place} is no object.")
  return Configuration(found, place)
