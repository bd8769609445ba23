# SPDX-License-Identifier: Apache-2.0
"""Seeing through the names that wrappers put inside the names of tensors.

`torch.compile`, FSDP and activation checkpointing wrap modules and not only
models: `layers.0._orig_mod.mlp.up_proj.weight`. PEFT has its `base_layer`.
"""

from collections import Counter
from collections.abc import Callable, Iterable

# What only wrappers are called, wherever it stands.
_ALWAYS = frozenset(
  (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP of earlier versions
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning Fabric
  )
)
# What may be a module of the model's own: left out only where names then match.
_PERHAPS = frozenset(("module", "base_layer"))

Bare = Callable[[str], str]


def see_through(
  base: Iterable[str], finetuned: Iterable[str], bare: Bare
) -> tuple[dict[str, str], dict[str, str]]:
  """Takes wrappers out of the names of two checkpoints.

  Args:
    base: names of the base's tensors.
    finetuned: names of the finetune's.
    bare: takes prefixes off a name.

  Returns:
    For each side {name without wrappers: name}, in the same order. A name stays
    as it is where two would become one.

  Example:
    >>> see_through(["l.0.q"], ["l.0._orig_mod.q"], str)[1]
    {'l.0.q': 'l.0._orig_mod.q'}
  """
  one, two = _without(base, _ALWAYS), _without(finetuned, _ALWAYS)
  if not any(_has(name, _PERHAPS) for name in (*one, *two)):
    return one, two
  keys = [
    {name: bare(_cut(name, _PERHAPS)) for name in side} for side in (one, two)
  ]
  counts = [Counter(side.values()) for side in keys]

  def renamed(own, key, other):
    """Takes perhapses out of names whose partner is found without them."""
    return {
      _cut(name, _PERHAPS)
      if name not in other and counts[0][key[name]] == counts[1][key[name]] == 1
      else name: stored
      for name, stored in own.items()
    }

  return renamed(one, keys[0], two), renamed(two, keys[1], one)


def _has(name: str, parts: frozenset[str]) -> bool:
  """Returns whether a name has any of some parts between its dots."""
  return any(part in name for part in parts) and not parts.isdisjoint(
    name.split(".")
  )


def _cut(name: str, parts: frozenset[str]) -> str:
  """Takes some parts out of a name."""
  if not _has(name, parts):
    return name
  return ".".join(part for part in name.split(".") if part not in parts)


def _without(names: Iterable[str], parts: frozenset[str]) -> dict[str, str]:
  """Maps names without some parts to the names; clashing ones stay."""
  names = list(names)
  cut = {name: _cut(name, parts) for name in names}
  counts = Counter(cut.values())
  return {(cut[n] if counts[cut[n]] == 1 else n): n for n in names}
