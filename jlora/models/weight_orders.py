# SPDX-License-Identifier: Apache-2.0
"""Translates symmetries of hidden units to Hugging Face names.

The tables of `jlora.alignment.symmetries` are for the Flax paths of these
models, with kernels (in, out). A checkpoint's table is the same one, translated
by `names`.
"""

import re

from jlora.alignment.symmetries import FIXED, Row, Symmetry
from jlora.messages import name_some
from jlora.models.names import CONSTANTS, LEAVES, MODULES, pattern_of
from jlora.views import GPT2_VIEWS


def hf_symmetry(symmetry: Symmetry) -> Symmetry:
  """Translates a symmetry to a checkpoint's Hugging Face names and axis order.

      w[out, in] of a torch Linear has the axes of w[in, out], exchanged

  Args:
    symmetry: for these models' paths: `decoder(heads, kv_heads)` for Llama,
      Mistral, Mixtral, Qwen2 and Qwen3, or `gpt2(heads)`.

  Returns:
    Symmetry with rows for the checkpoint's names, in any of their spellings. A
    Linear's weight is (out, in), that of GPT-2's Conv1D (in, out). Tensors that
    are not parameters, such as causal masks, are not permuted. For a Mixtral,
    each expert's weights are separate tensors, as in files.

  Raises:
    ValueError: the symmetry has rows for paths that these models lack.

  Example:
    >>> from jlora.alignment import decoder
    >>> found = hf_symmetry(decoder(heads=8, kv_heads=2))
    >>> [x for x in found.rows if "down" in x.pattern][0].axes
    'stream, unit.{0}'
  """
  found, used = [], set()
  for module, path, kind in MODULES:
    for theirs, ours, is_transposed in LEAVES[kind]:
      row = _first(symmetry, f"{path}/{ours}".format(0, 0))
      if row is not None:
        axes = row.axes.split(", ")
        text = ", ".join(reversed(axes)) if is_transposed else row.axes
        pattern = pattern_of(f"{module}.{theirs}")
        found.append(Row(pattern, text, row.stack))
        used.add(row)
  unknown = [row.pattern for row in symmetry.rows if row not in used]
  if unknown:
    raise ValueError(
      f"{len(unknown)} rows are of no path of these models: "
      f"{name_some(unknown)}. Write rows for the checkpoint's own names."
    )
  rows = (*found, *(Row(pattern, FIXED) for pattern in CONSTANTS))
  # GPT-2's rules are its own, followed by torch's, so they fit all models.
  return Symmetry(rows, symmetry.inside, symmetry.sizes, GPT2_VIEWS)


def _first(symmetry: Symmetry, path: str) -> Row | None:
  """Returns the first row that matches a path, or None."""
  matching = (x for x in symmetry.rows if re.fullmatch(x.pattern, path))
  return next(matching, None)
