# SPDX-License-Identifier: Apache-2.0
"""Which orders of hidden units a Hugging Face checkpoint may have.

The tables of `jlora.alignment.symmetries` name the paths of these models,
kernels (in, out). A checkpoint's own table is the same one, read through
`names`.
"""

import re

from jlora.alignment.symmetries import FIXED, Row, Symmetry
from jlora.messages import name_some
from jlora.models.names import CONSTANTS, LEAVES, MODULES, pattern_of
from jlora.views import GPT2_VIEWS


def hf_symmetry(symmetry: Symmetry) -> Symmetry:
  """The symmetry of a checkpoint with Hugging Face's names and orientations.

      w[out, in] of a torch Linear has the axes of w[in, out], exchanged

  Args:
    symmetry: of these models' paths: `decoder(heads, kv_heads)` for Llama,
      Mistral, Mixtral, Qwen2 and Qwen3, `gpt2(heads)`.

  Returns:
    Symmetry with rows of the checkpoint's names, in any of their spellings; a
    Linear's weight (out, in), a Conv1D's of GPT-2 (in, out). What is no
    parameter, causal masks say, stays. Of a Mixtral with each expert's weights
    apart, as files have them.

  Raises:
    ValueError: rows for paths that these models do not have.

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
  # GPT-2's rules are torch's, and its own before them.
  return Symmetry(rows, symmetry.inside, symmetry.sizes, GPT2_VIEWS)


def _first(symmetry: Symmetry, path: str) -> Row | None:
  matching = (x for x in symmetry.rows if re.fullmatch(x.pattern, path))
  return next(matching, None)
