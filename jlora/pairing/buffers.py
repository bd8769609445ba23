# SPDX-License-Identifier: Apache-2.0
"""Tensors of checkpoints that are no parameters: models compute them anew.

Old checkpoints have them, new ones of the same model often do not. They are
neither learnt nor loaded, so they belong to no comparison and no merge.
"""

import re
from collections.abc import Sequence

_ROTARY = "frequencies of rotary positions"
_MASK = "a mask"
_COUNT = "numbers that a layer counts by"
_SCHEDULE = "the noise schedule"

# Whole name, number of axes (None: any), what it is. The first match counts.
BUFFERS: tuple[tuple[str, int | None, str], ...] = (
  (r"(.*[./])?(\w+_)?inv_freq", None, _ROTARY),
  (r"(.*[./])?rotary_(pos_)?emb(_\w+)?[./].*", None, _ROTARY),
  (r"(.*[./])?(cos|sin)_cached", None, _ROTARY),
  (r"(.*[./])?(freqs_cis|freqs_cos|freqs_sin|rope\.freqs)", None, _ROTARY),
  (r"(.*\.)?(attn|attention|self_attn)\.bias", 4, _MASK),
  (r"(.*\.)?(masked_bias|(causal|attn|attention|bias)_mask|tril)", None, _MASK),
  (r"(.*\.)?(position_ids|(buffered_)?token_type_ids)", None, _COUNT),
  (r"(.*\.)?relative_(position_index|coords_table)", None, _COUNT),
  (r"(.*\.)?(num_batches_tracked|_float_tensor)", None, _COUNT),
  (r"(alphas_\w+|betas|posterior_\w+|\w*alphas_cumprod\w*)", 1, _SCHEDULE),
)


def why_no_parameter(name: str, shape: Sequence[int]) -> str | None:
  """Tells why a tensor is no parameter, by its name.

  Args:
    name: in a checkpoint.
    shape: of the tensor: a mask that is called `bias` has four axes.

  Returns:
    A phrase for a report; None of parameters.

  Example:
    >>> why_no_parameter("model.layers.0.self_attn.rotary_emb.inv_freq", (32,))
    'no parameter: frequencies of rotary positions'
    >>> why_no_parameter("h.0.attn.bias", (1, 1, 8, 8))
    'no parameter: a mask'
    >>> why_no_parameter("h.0.attn.bias", (8,)) is None
    True
  """
  for rule, axes, what in BUFFERS:
    if axes in (None, len(shape)) and re.fullmatch(rule, name):
      return f"no parameter: {what}"
  return None
