# SPDX-License-Identifier: Apache-2.0
"""What models compute anew is in no pair, and what they learn is."""

import re

import numpy as np
import pytest

from jlora.pairing.buffers import BUFFERS, why_no_parameter
from jlora.pairing.match import pair_up

# As stored by GPT-2, GPT-NeoX, Llama, Swin, BERT, ResNet, Gemma 3, Stable
# Diffusion and others.
NO_PARAMETERS = {
  "h.0.attn.bias": (1, 1, 8, 8),
  "transformer.h.3.attn.masked_bias": (),
  "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
  "gpt_neox.layers.0.attention.masked_bias": (),
  "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,),
  "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
  "model.layers.0.self_attn.rotary_emb.cos_cached": (1, 1, 8, 4),
  "model.rotary_emb_local.inv_freq": (4,),
  "model.rotary_emb.original_inv_freq": (4,),
  "transformer.rotary_pos_emb.inv_freq": (4,),
  "model.rotary_emb.long_scale": (),
  "encoder.pos_emb.inv_freq": (4,),
  "model.layers.0.self_attn.sin_cached": (1, 1, 8, 4),
  "visual.rotary_pos_emb.inv_freq": (4,),
  "rope.freqs": (4,),
  "layers.0.attention.inner_attention.rope.freqs": (4,),
  "embeddings.position_ids": (1, 8),
  "bert.embeddings.token_type_ids": (1, 8),
  "layer1.0.bn1.num_batches_tracked": (),
  "encoder.layers.0.blocks.1.attn_mask": (4, 8, 8),
  "encoder.layer.0.attention.self.relative_position_index": (8, 8),
  "alphas_cumprod": (10,),
  "sqrt_one_minus_alphas_cumprod": (10,),
  "params/rotary_emb/inv_freq": (4,),
}
PARAMETERS = {
  "h.0.attn.c_attn.bias": (8,),
  "attn.bias": (8,),
  "model.embed_positions.weight": (8, 4),
  "mask_token": (1, 1, 8),
  "attn.relative_position_bias_table": (9, 2),
  "layer1.0.bn1.running_mean": (8,),
  "model.layers.0.betas": (8,),
  "token_type_embeddings.weight": (2, 4),
  "rotary_embedding_proj.weight": (4, 4),
}


@pytest.mark.parametrize("name", NO_PARAMETERS)
def test_no_parameter(name):
  assert why_no_parameter(name, NO_PARAMETERS[name]).startswith("no parameter")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter(name):
  assert why_no_parameter(name, PARAMETERS[name]) is None


def test_every_rule_is_tried():
  for place, (rule, *_) in enumerate(BUFFERS):
    rest = (*BUFFERS[:place], *BUFFERS[place + 1 :])
    lost = [
      name
      for name, shape in NO_PARAMETERS.items()
      if not _matches(rest, name, shape)
    ]
    assert lost, f"nothing needs {rule}"


def _matches(rules, name, shape):
  return any(
    axes in (None, len(shape)) and re.fullmatch(rule, name)
    for rule, axes, _ in rules
  )


def test_they_are_in_no_pair_on_either_side():
  model = {"h.0.attn.c_attn.weight": np.ones((4, 4))}
  more = {name: np.zeros(shape) for name, shape in NO_PARAMETERS.items()}
  both = pair_up(model | more, model | more)
  assert [pair.path for pair in both.pairs] == list(model)
  assert both.only_base == both.only_finetuned == []
  assert [side for side, *_ in both.buffers].count("base") == len(more)
  one = pair_up(model | more, model)
  assert {(side, name) for side, name, _ in one.buffers} == {
    ("base", name) for name in more
  }
  assert one.only_base == []
