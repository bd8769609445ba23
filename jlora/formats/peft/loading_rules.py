# SPDX-License-Identifier: Apache-2.0
"""Reads how transformers names the tensors of a checkpoint when it loads one.

`families.json` has transformers' rows for each model type and class. Which of
them hold depends on the models inside a model, as its config.json says.

References:
  huggingface/transformers 5, `conversion_mapping.py`, `core_model_loading.py`.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("families.json")

# Rules for names alone, and those that change values too.
RENAMINGS = ("WeightRenaming", "PrefixChange")
CONVERTER = "WeightConverter"


class Rule(NamedTuple):
  """A row of transformers' conversion mapping, for a part of a model.

  Attributes:
    kind: transformers' class of it.
    pattern: which names it is for, a group for each source.
    targets: what the match is replaced by.
    operations: (name, axes ...) of what is done to the values.
    scopes: beginnings of names; the first that fits counts.
  """

  kind: str
  pattern: re.Pattern[str]
  targets: list[str]
  operations: tuple[tuple[Any, ...], ...]
  scopes: tuple[str, ...]

  def match(self, name: str) -> tuple[str, re.Match[str]] | None:
    """Returns the beginning that was taken off and the match in the rest."""
    for scope in self.scopes:
      if name.startswith(scope):
        found = self.pattern.search(name[len(scope) :])
        return (scope, found) if found else None
    return None

  def apply(self, name: str) -> str:
    """Returns the new name; the same if the row does not apply."""
    return next(iter(self.apply_all(name)), name)

  def apply_all(self, name: str) -> list[str]:
    """Returns the names of all that a tensor becomes; empty if not matched."""
    matched = self.match(name)
    if matched is None:
      return []
    scope, found = matched
    names = []
    for new in self.targets:
      if r"\1" in new:
        group = next(key for key, value in found.groupdict().items() if value)
        new = new.replace(r"\1", found[self.pattern.groupindex[group] + 1])
      rest = name[len(scope) :].replace(found[0], new, 1)
      names.append(scope + rest)
    return names

  def place_of(self, name: str) -> int:
    """Returns which of the sources a name that matches is."""
    matched = self.match(name)
    groups = matched[1].groupdict() if matched else {}
    return int(next(key for key, value in groups.items() if value)[1:])


class Part(NamedTuple):
  """A model inside a model.

  Attributes:
    place: the beginning of its modules' names.
    name: its class.
    model_type: its type.
  """

  place: str
  name: str
  model_type: str


@functools.cache
def read_families() -> dict[str, Any]:
  """Reads families.json, once.

  Example:
    >>> read_families()["auto"]["causal"]["bert"]
    'BertLMHeadModel'
  """
  return json.loads(FILE.read_text())


def parts_of(
  name: str, config: Mapping[str, Any], place: str = "", depth: int = 0
) -> Iterator[Part]:
  """Yields a model and the models inside it, in the order of its modules.

  Args:
    name: the class.
    config: the contents of its config.json.
    place: where it lies in the model asked for.
    depth: in how many others it lies.

  Example:
    >>> [part.name for part in parts_of("GPT2LMHeadModel", {})]
    ['GPT2LMHeadModel', 'GPT2Model']
  """
  classes, auto = read_families()["classes"], read_families()["auto"]
  row = classes[name]
  yield Part(place, name, config.get("model_type") or row["type"])
  for path, (part, keys) in row.get("parts", {}).items():
    inner: Any = config
    for key in keys or ():
      inner = inner.get(key) if isinstance(inner, Mapping) else None
    inner = inner if isinstance(inner, Mapping) else {}
    usual = classes.get(part, {}).get("type")
    given = inner.get("model_type", usual) if keys else usual
    first = part
    if given != usual:
      kinds = [kind for kind in auto if auto[kind].get(usual) == part]
      part = auto[kinds[0] if kinds else "base"].get(given, part)
      inner = inner if part != first else {}
    if part in classes and depth < 5:
      below = f"{place}.{path}" if place else path
      inner = (
        {**inner, "model_type": classes[part]["type"]} if not keys else inner
      )
      yield from parts_of(part, inner, below, depth + 1)


def rules_of(parts: Sequence[Part], base_prefix: str) -> Iterator[Rule]:
  """Yields the rows of transformers' mapping that hold for a model.

  Args:
    parts: from `parts_of`.
    base_prefix: the beginning that transformers' base classes add to names.

  Example:
    >>> parts = [*parts_of("PhimoeForCausalLM", {})]
    >>> {rule.kind for rule in rules_of(parts, "model")} <= {*RENAMINGS,
    ...                                                      CONVERTER}
    True

  This is `get_model_conversion_mapping` of transformers 5: a class's own rows
  go before its model type's, and what a model has claimed, its parts do not
  apply again.
  """
  mapping = read_families()["conversions"]
  seen: dict[str, list[str]] = {}

  def is_claimed(key: str, place: str) -> bool:
    return any(
      not other or place.startswith(f"{other}.") for other in seen.get(key, ())
    )

  for place, name, model_type in parts:
    if is_claimed(name, place):
      continue
    by_class = name in mapping
    if not by_class and is_claimed(model_type, place):
      continue
    rows = mapping.get(name, mapping.get(model_type))
    if rows is None:
      continue
    scopes = [""]
    if place:
      scope = place.removeprefix(base_prefix).removeprefix(".")
      scope = f"{scope}." if scope else ""
      scopes = [f"{base_prefix}." + scope if base_prefix else scope, scope]
    yield from (_compiled(row, scopes) for row in rows)
    seen.setdefault(name, []).append(place)
    if not by_class:
      seen.setdefault(model_type, []).append(place)
  yield from (_compiled(row, [""]) for row in mapping.get("legacy", ()))


def _compiled(row: Sequence[Any], scopes: Sequence[str]) -> Rule:
  """Compiles a row; of several patterns the longest is tried first."""
  kind, sources, targets, operations = row
  order = sorted(enumerate(sources), key=lambda each: -len(each[1]))
  pattern = "|".join(f"(?P<g{at}>{source})" for at, source in order)
  return Rule(
    kind, re.compile(pattern), targets, tuple(map(tuple, operations)),
    tuple(scopes),
  )  # fmt: skip
