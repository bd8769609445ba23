# SPDX-License-Identifier: Apache-2.0
"""Tells where a fused projection is cut, from the tensors beside its parts.

transformers takes the heights of unequal parts from the model that it builds.
Here only a checkpoint is there: what reads a part's outputs has their number.
"""

from collections.abc import Sequence

from jlora.formats.peft.parts import Base, module_of

# Last name of a part -> the tensor beside the parts that tells its height, and
# by which axis. Parts that are not here share the rest.
_BESIDE: dict[str, tuple[str, int]] = {
  "q_proj": ("o_proj.weight", 1),
  "in_proj_z": ("out_proj.weight", 1),
  "in_proj_b": ("A_log", 0),
  "in_proj_a": ("A_log", 0),
}


def uneven_heights(
  height: int, parameters: Sequence[str], base: Base
) -> list[int]:
  """Returns how many rows each part of a fused projection has.

  Args:
    height: rows of the whole.
    parameters: names of the parts, in their order.
    base: the base model.

  Returns:
    Rows of each part; empty where the checkpoint does not tell.

  Example:
    >>> import numpy as np
    >>> from jlora.formats.peft.parts import describe_base
    >>> like = {"h.o_proj.weight": np.ones((6, 4))}
    >>> base = describe_base(like, None, None, None)
    >>> names = [f"h.{name}_proj.weight" for name in "qkv"]
    >>> uneven_heights(8, names, base), uneven_heights(9, names, base)
    ([4, 2, 2], [])
  """
  told = [_told(name, base) for name in parameters]
  shares = told.count(None)
  rest = height - sum(own for own in told if own)
  if 0 in told or not 0 < shares < len(told) or rest <= 0 or rest % shares:
    return []
  return [rest // shares if own is None else own for own in told]


def _told(name: str, base: Base) -> int | None:
  """Returns a part's rows; None if it has of the rest, 0 if nothing tells."""
  holder, _, last = module_of(name).rpartition(".")
  if last not in _BESIDE:
    return None
  beside, axis = _BESIDE[last]
  path = base.paths.get(f"{holder}.{beside}" if holder else beside)
  return base.shapes[path][axis] if path else 0
