# SPDX-License-Identifier: Apache-2.0
"""The name table read in both directions."""

import pytest

from jlora.models import names

PAIRS = [
  ("model.embed_tokens.weight", "embed/embedding", False),
  ("model.layers.11.self_attn.k_proj.weight", "layers/11/attn/k/kernel", True),
  ("model.layers.0.self_attn.v_proj.bias", "layers/0/attn/v/bias", False),
  ("model.layers.7.input_layernorm.weight", "layers/7/attn_norm/scale", False),
  ("lm_head.weight", "head/kernel", True),
  (
    "model.layers.4.block_sparse_moe.experts.12.w2.weight",
    "layers/4/moe/experts/12/down/kernel",
    True,
  ),
  ("transformer.h.3.mlp.c_fc.weight", "h/3/mlp/c_fc/kernel", False),
  ("transformer.h.3.ln_2.bias", "h/3/ln_2/bias", False),
]


@pytest.mark.parametrize(("name", "path", "transposed"), PAIRS)
def test_pairs(name, path, transposed):
  assert names.from_hf(name) == (path, transposed)
  assert names.to_hf(path) == (name, transposed)
  assert names.hf_name(path) == name


def test_every_row_goes_both_ways():
  for (name, path), transposed in names._rows():
    name, path = name.format(5, 3), path.format(5, 3)
    assert names.from_hf(name) == (path, transposed)
    assert names.to_hf(path) == (name, transposed)


@pytest.mark.parametrize(
  "name",
  ["model.layers.x.mlp.up_proj.weight", "xmodel.norm.weight", "norm/scale"],
)
def test_unknown_names_are_refused(name):
  with pytest.raises(ValueError, match="no parameter of these models"):
    names.from_hf(name)
