# SPDX-License-Identifier: Apache-2.0
"""What `jlora.formats.peft.families` says, against transformers and PEFT."""

import importlib.metadata
import io
import json
import re

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading

from experiments import collect_families
from jlora.extraction.run import extract_checkpoint
from jlora.formats.peft.families import family_of
from jlora.formats.peft.loading_rules import FILE
from jlora.views import EXPERTS_OUT_IN, KERNEL, LINEAR

# transformers and PEFT warn of their own code.
pytestmark = pytest.mark.filterwarnings("ignore")
LLAVA = {
  "model_type": "llava",
  "architectures": ["LlavaForConditionalGeneration"],
  "text_config": {"model_type": "granitemoe"},
  "vision_config": {"model_type": "clip_vision_model"},
}
SIZES = {
  "vocab_size": 64,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
IDS = torch.arange(1, 13)[None]


@pytest.mark.parametrize(
  ("config", "key", "name"),
  [
    (("gpt2", "GPT2LMHeadModel"), "h.0.ln_1.bias", "transformer.h.0.ln_1.bias"),
    (("gpt2", "GPT2LMHeadModel"), "lm_head.weight", "lm_head.weight"),
    (("gpt2", "GPT2Model"), "transformer.wte.weight", "wte.weight"),
    (("bert", "BertModel"), "bert.pooler.dense.bias", "pooler.dense.bias"),
    (
      ("vit", "ViTModel"),
      "encoder.layer.1.attention.attention.query.weight",
      "layers.1.attention.q_proj.weight",
    ),
    (
      ("llama", "LlamaForCausalLM"),
      "model.layers.0.mlp.up_proj.weight",
      "model.layers.0.mlp.up_proj.weight",
    ),
  ],
)
def test_keys_on_disk_become_names_in_the_model(config, key, name):
  family = family_of({"model_type": config[0], "architectures": [config[1]]})
  assert family.name_of(key) == name


ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
  ("config", "is_renamed"),
  [
    (transformers.ViTConfig(image_size=8, patch_size=4, **ENCODER), True),
    (transformers.BertConfig(vocab_size=9, **ENCODER), False),
  ],
  ids=["vit", "bert"],
)
def test_names_of_transformers_4_and_5_are_one_module(
  config, is_renamed, tmp_path
):
  """Files have those of 4, with and without prefix; modules those of 5."""
  model = transformers.AutoModel.from_config(config)
  model.save_pretrained(tmp_path)
  told = json.loads((tmp_path / "config.json").read_text())
  keys = [*load_file(tmp_path / "model.safetensors")]
  family, meta = family_of(told), model.state_dict()
  assert {family.name_of(key) for key in keys} == set(meta)
  assert (set(keys) != set(meta)) == is_renamed
  prefix = model.base_model_prefix
  mapping = conversion_mapping.get_model_conversion_mapping(model)
  for key in (*keys, *(f"{prefix}.{key}" for key in keys), *meta):
    theirs, _ = core_model_loading.rename_source_key(
      key, mapping, [], prefix, meta
    )
    assert family.name_of(key) == theirs, key


def test_parts_of_a_model_are_those_that_its_config_names():
  family = family_of(LLAVA)
  stored = "language_model.model.layers.3.block_sparse_moe.input_linear.weight"
  name = family.name_of(stored)
  inside = "model.language_model.layers.3.block_sparse_moe.experts.gate_up_proj"
  assert name == inside
  assert family.kind_of(name, 3).view == EXPERTS_OUT_IN
  assert family.name_of("language_model.lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize(
  ("name", "task"),
  [
    ("LlamaForCausalLM", "CAUSAL_LM"),
    ("LlamaModel", None),
    ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("BertForMaskedLM", None),
  ],
)
def test_only_language_models_have_a_task(name, task):
  model_type = {"L": "llama", "T": "t5", "B": "bert"}[name[0]]
  config = {"model_type": model_type, "architectures": [name]}
  assert family_of(config).task_type == task


def test_an_unknown_model_has_what_all_known_ones_agree_on():
  family = family_of({"model_type": "of_ours", "architectures": ["Ours"]})
  assert family.kind_of("a.q_proj.weight", 2).view == LINEAR
  assert family.kind_of("a.embed_tokens.weight", 2).view == KERNEL
  assert "not known" in family.kind_of("a.frobnicate.weight", 2).why


def test_every_reason_is_said():
  family = family_of({"model_type": "mamba", "architectures": None})
  assert (
    "refuses"
    in family.kind_of("backbone.layers.0.mixer.out_proj.weight", 2).why
  )
  assert family.kind_of("backbone.layers.0.mixer.nothing.weight", 2).why


def test_the_table_is_that_of_the_installed_releases():
  facts = json.loads(FILE.read_text())
  assert facts["versions"] == {
    name: importlib.metadata.version(name) for name in facts["versions"]
  }
  types = ["gpt2", "granitemoe", "lfm2", "t5", "gemma3", "llava", "mamba"]
  sample = json.loads(json.dumps(collect_families.collect(types)))
  for key in ("auto", "peft_experts", "peft_refuses"):
    assert sample[key] == facts[key]
  assert sample["conversions"].items() <= facts["conversions"].items()
  for name, row in sample["classes"].items():
    # a part that several models have may have been built in more variants
    assert row["type"] == facts["classes"][name]["type"]
    assert row.get("task") == facts["classes"][name].get("task")
    assert row.get("ties", {}) == facts["classes"][name].get("ties", {})
    assert set(_leaves(row)) <= set(_leaves(facts["classes"][name]))


def _leaves(row):
  stack = [("", row.get("modules", {}))]
  while stack:
    at, branch = stack.pop()
    for key, value in branch.items():
      if isinstance(value, dict):
        stack.append((f"{at}.{key}", value))
      else:
        yield f"{at}.{key}", value


def _gemma3():
  text = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
  vision = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
  }
  return transformers.Gemma3ForConditionalGeneration(
    transformers.Gemma3Config(
      text_config=text | {"intermediate_size": 48},
      vision_config=vision,
      mm_tokens_per_image=4,
      image_token_index=60,
      boi_token_index=61,
      eoi_token_index=62,
    )
  )


def _bert():
  sizes = SIZES | {"intermediate_size": 48, "max_position_embeddings": 32}
  return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def _t5():
  return transformers.T5ForConditionalGeneration(
    transformers.T5Config(
      vocab_size=64, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48
    )
  )


def _granite_moe():
  return transformers.GraniteMoeForCausalLM(
    transformers.GraniteMoeConfig(
      **SIZES,
      num_key_value_heads=2,
      intermediate_size=24,
      num_local_experts=4,
      num_experts_per_tok=2,
    )
  )


def _lfm2():
  return transformers.Lfm2ForCausalLM(
    transformers.Lfm2Config(
      **SIZES,
      num_key_value_heads=2,
      intermediate_size=48,
      layer_types=["conv", "full_attention"],
    )
  )


def _gpt2():
  return transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32
    )
  )


def _logits(model):
  takes_both = model.config.is_encoder_decoder
  more = {"decoder_input_ids": IDS} if takes_both else {}
  with torch.no_grad():
    return model.eval()(input_ids=IDS, **more).logits


@pytest.mark.parametrize(
  ("make", "skipped", "prefix"),
  [
    (_gemma3, "vision|multi_modal", ""),
    (_bert, "nothing", ""),
    (_t5, "nothing", ""),
    (_granite_moe, "nothing", ""),
    (_lfm2, "nothing", ""),
    (_gpt2, "nothing", "transformer."),
  ],
  ids=["gemma3", "bert", "t5", "granitemoe", "lfm2", "gpt2-bare"],
)
def test_peft_computes_the_finetune(make, skipped, prefix, tmp_path):
  torch.manual_seed(0)
  model = make()
  base, tuned, out = (str(tmp_path / n) for n in ("base", "tuned", "out"))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.dim() > 1:
        parameter.copy_(torch.randn_like(parameter) * 0.08)
  model.save_pretrained(base)
  before = _logits(model)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.dim() > 1 and not re.search(skipped, name):
        *batch, rows, columns = parameter.shape
        if name.endswith("conv.conv.weight"):
          change = torch.randn_like(parameter)
        else:
          change = torch.randn(*batch, rows, 2) @ torch.randn(
            *batch, 2, columns
          )
        parameter.add_(change * (0.5 * parameter.norm() / change.norm()))
  model.save_pretrained(tuned)
  after = _logits(model)
  for folder in (base, tuned):
    file = f"{folder}/model.safetensors"
    tensors = load_file(file)
    names = {key: key.removeprefix(prefix) for key in tensors}
    save_file({names[k]: v for k, v in tensors.items()}, file, {"format": "pt"})
  report = extract_checkpoint(base, tuned, out, rank=4, log=io.StringIO())
  assert not [r for r in report.ledger if r["status"] == "not representable"]
  loaded = PeftModel.from_pretrained(type(model).from_pretrained(base), out)
  distance = (_logits(loaded) - after).norm() / (before - after).norm()
  assert np.isfinite(distance)
  assert distance < 1e-5
