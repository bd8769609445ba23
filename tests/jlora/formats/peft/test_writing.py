# SPDX-License-Identifier: Apache-2.0
"""Adapter folders against PEFT itself, and merged checkpoints."""

import copy
import json
import re
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.merged import save_merged
from jlora.checkpoints.safetensors import write_safetensors
from jlora.formats.peft.layouts import VLLM
from jlora.formats.peft.reading import load_peft
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora, dense, from_in_rank, to_in_rank
from jlora.tree_views import table_for
from jlora.views import as_parameter, view_of

pytestmark = [
  # transformers' own deprecations, met inside PEFT
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
  # a GPT-2 has Conv1D and Linear; PEFT switches for each and says so
  pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
  # Qwen2 has layers without a bias
  pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
  # PEFT looks for parameters' patterns among modules only
  pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not"),
]

SMALL = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
TOKENS = torch.arange(12)[None] * 7 % 96


def llama(tied=False):
  return transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)


def qwen2(tied=False):
  return transformers.Qwen2Config(**SMALL, tie_word_embeddings=tied)


def gpt2(tied=True):
  return transformers.GPT2Config(
    vocab_size=96,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=32,
    tie_word_embeddings=tied,
    bos_token_id=0,
    eos_token_id=0,
  )


def qwen2_moe():
  return transformers.Qwen2MoeConfig(
    **SMALL,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
    tie_word_embeddings=False,
  )


def build(config):
  torch.manual_seed(0)
  return transformers.AutoModelForCausalLM.from_config(config).eval()


def like_of(model):
  return dict(model.named_parameters())


def numpy_of(model):
  return {n: p.detach().numpy() for n, p in model.named_parameters()}


def random_loras(model, ranks=(3,), skip=(), dtype=np.float32):
  """A Lora for every matrix, its rank and values from its name."""
  shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
  table = table_for(shapes, model.config.model_type)
  loras = {}
  for name, shape in shapes.items():
    view = view_of(name, shape, table)
    if view is None or name in skip:
      continue
    seed = zlib.crc32(name.encode())
    rng = np.random.default_rng(seed)
    *lead, in_, out = view.shape(shape)
    rank = ranks[seed % len(ranks)]
    a = rng.normal(size=(*lead, rank, in_)).astype(dtype) / 4
    b = rng.normal(size=(*lead, rank, out)).astype(dtype) / 4
    scale = jnp.asarray(rng.uniform(0.5, 2, lead), jnp.float32)
    loras[name] = Lora(
      jnp.asarray(a.astype(dtype)), jnp.asarray(b.astype(dtype)), scale
    )
  return loras


def changed(model, loras, biases=(), full=()):
  """The logits of a copy of the model with the dense changes added."""
  model = copy.deepcopy(model)
  parameters = dict(model.named_parameters())
  table = table_for(parameters, model.config.model_type)
  with torch.no_grad():
    for name, value in dict(full).items():
      parameters[name].copy_(torch.tensor(np.asarray(value, np.float32)))
    for name, lora in loras.items():
      shape = tuple(parameters[name].shape)
      change = as_parameter(
        np.asarray(dense(lora)), view_of(name, shape, table), shape
      )
      parameters[name].add_(torch.tensor(change))
    for name, bias in dict(biases).items():
      parameters[name].add_(torch.tensor(np.asarray(bias, np.float32)))
    return model(TOKENS).logits


def loaded(model, folder):
  """PEFT's model of the folder, which must have each tensor's place."""
  wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
  result = wrapped.load_adapter(folder, "default")
  assert not result.missing_keys
  assert not result.unexpected_keys
  return wrapped


def logits_of(wrapped):
  with torch.no_grad():
    return wrapped(TOKENS).logits


def assert_close(got, expected, tolerance=1e-4):
  assert (got - expected).abs().max() < tolerance * expected.abs().max()


def config_of(folder):
  return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
  "config",
  [llama(), qwen2(), gpt2(tied=False), qwen2_moe()],
  ids=lambda config: config.model_type,
)
def test_peft_computes_what_the_dense_change_computes(config, tmp_path):
  model = build(config)
  loras = random_loras(model, ranks=(2, 3, 5))
  left = save_peft(
    tmp_path, loras, like=like_of(model), model_type=config.model_type
  )
  assert left == {}
  assert_close(logits_of(loaded(model, tmp_path)), changed(model, loras))


def test_split_experts_load_as_transformers_fuses_them(tmp_path):
  config = transformers.MixtralConfig(**SMALL, num_local_experts=3)
  model = build(config)
  model.save_pretrained(tmp_path / "base")
  base = open_checkpoint(tmp_path / "base")
  rng = np.random.default_rng(0)
  loras = {}
  for index, (name, spec) in enumerate(base.spec.items()):
    # one expert is left out, and ranks differ
    if re.search(r"experts\.[01]|gate|q_proj", name):
      a, b = (rng.normal(size=(1 + index % 3, n)) / 4 for n in spec.shape[::-1])
      loras[name] = from_in_rank(jnp.float32(a.T), jnp.float32(b))
  folder, merged = tmp_path / "adapter", tmp_path / "merged"
  assert save_peft(folder, loras, like=base, model_type="mixtral") == {}
  save_merged(merged, base, loras)
  reference = transformers.AutoModelForCausalLM.from_pretrained(merged)
  wrapped = peft.PeftModel.from_pretrained(model, folder)
  assert_close(logits_of(wrapped), logits_of(reference.eval()))


def test_separate_experts_that_peft_does_not_convert(tmp_path):
  model = build(qwen2_moe())
  model.save_pretrained(tmp_path / "base")
  base = open_checkpoint(tmp_path / "base")
  loras = random_loras(model, ranks=(2, 3))
  fused = {name for name in loras if ".experts." in name}
  loras = {name: lora for name, lora in loras.items() if name not in fused}
  split = "model.layers.0.mlp.experts.0.up_proj.weight"
  expert = {split: from_in_rank(jnp.ones((32, 2)), jnp.ones((2, 16)))}
  folder = tmp_path / "adapter"
  left = save_peft(folder, loras | expert, like=base, model_type="qwen2_moe")
  assert list(left) == [split]
  assert_close(logits_of(loaded(model, folder)), changed(model, loras))


def test_what_peft_takes_for_an_expert_is_named_as_a_parameter(tmp_path):
  names = ["mlp.experts.0.up_proj", "mlp.shared_experts.up_proj", "q_proj"]
  loras = {f"model.layers.0.{name}.weight": LORA for name in names}
  like = dict.fromkeys(loras, np.ones((5, 3)))
  left = save_peft(tmp_path, loras, like=like, model_type="deepseek_v3")
  assert left == {}
  assert config_of(tmp_path)["target_parameters"] == [
    "model.layers.0.mlp.shared_experts.up_proj.weight"
  ]
  assert load_peft(tmp_path, like=like).loras.keys() == loras.keys()


@pytest.mark.parametrize(
  "config", [llama(tied=True), gpt2()], ids=["llama", "gpt2"]
)
def test_a_tied_embedding_changes_at_both_ends(config, tmp_path):
  model = build(config)
  loras = random_loras(model, ranks=(2, 4))
  save_peft(tmp_path, loras, like=like_of(model), model_type=config.model_type)
  with warnings.catch_warnings():
    # GPT-2's table is not called embed_tokens, so PEFT ties nothing
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
    wrapped = loaded(model, tmp_path)
  assert_close(logits_of(wrapped), changed(model, loras))
  adapter = load_peft(
    tmp_path, like=like_of(model), model_type=config.model_type
  )
  assert adapter.loras.keys() == loras.keys()
  assert "lm_head.weight" in load_peft(tmp_path).loras


def test_biases_go_with_their_modules_or_on_a_zero_lora(tmp_path):
  model = build(qwen2())
  loras = random_loras(model, skip=["model.embed_tokens.weight"])
  alone = "model.layers.1.self_attn.k_proj"
  del loras[f"{alone}.weight"]
  biases = {
    name: np.full(p.shape, 0.3, np.float32)
    for name, p in model.named_parameters()
    if name.endswith("bias")
  }
  left = save_peft(tmp_path, loras, like=like_of(model), biases=biases)
  assert left == {}
  expected = changed(model, loras, biases)
  assert_close(logits_of(loaded(model, tmp_path)), expected)
  adapter = load_peft(tmp_path, like=like_of(model))
  assert adapter.biases.keys() == biases.keys()
  assert adapter.loras[f"{alone}.weight"].rank == 1


def test_biases_beside_an_embedding_are_reported(tmp_path):
  model = build(qwen2())
  bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}
  left = save_peft(
    tmp_path, random_loras(model), like=like_of(model), biases=bias
  )
  assert left.keys() == bias.keys()
  assert "embedding" in left.popitem()[1]


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_kept_whole(tied, tmp_path):
  model = build(llama(tied))
  kept = ("norm", "embed_tokens", "lm_head")
  full = {
    name: (array * 1.5 + 0.1).astype(np.float32)
    for name, array in numpy_of(model).items()
    if any(part in name for part in kept)
  }
  loras = random_loras(model, skip=full)
  left = save_peft(tmp_path, loras, like=like_of(model), full=full)
  assert left == {}
  assert config_of(tmp_path).get("ensure_weight_tying", False) == tied
  expected = changed(model, loras, full=full)
  assert_close(logits_of(loaded(model, tmp_path)), expected)
  adapter = load_peft(tmp_path, like=like_of(model))
  assert adapter.full.keys() == full.keys()
  for name, array in full.items():
    np.testing.assert_array_equal(adapter.full[name], array)


def test_full_of_half_a_module_is_reported(tmp_path):
  model = build(gpt2())
  name = "transformer.h.0.ln_1.weight"
  left = save_peft(
    tmp_path,
    random_loras(model, skip=["transformer.wte.weight"]),
    like=like_of(model),
    full={name: np.ones(32, np.float32)},
    model_type="gpt2",
  )
  assert left == {
    name: "PEFT replaces whole modules; give also transformer.h.0.ln_1.bias"
  }


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_what_is_saved_is_loaded(dtype, tmp_path):
  model = build(qwen2_moe())
  loras = random_loras(model, ranks=(1, 2, 4))
  save_peft(tmp_path, loras, like=like_of(model), dtype=dtype)
  again = load_peft(tmp_path, like=like_of(model)).loras
  assert again.keys() == loras.keys()
  for name, lora in loras.items():
    b = np.asarray(lora.b) * np.asarray(lora.scale)[..., None, None]
    kind = np.dtype(dtype or np.float32)
    np.testing.assert_array_equal(again[name].a, np.asarray(lora.a, kind))
    np.testing.assert_array_equal(again[name].b, b.astype(kind))
    assert (again[name].scale == 1).all()
    assert again[name].a.dtype == kind


def test_the_same_bytes_each_time_in_a_plain_configuration(tmp_path):
  model = build(llama())
  loras = random_loras(model, skip=["lm_head.weight"])
  for folder in ("one", "two"):
    save_peft(tmp_path / folder, loras, like=like_of(model), base_model="x/y")
  files = ["adapter_config.json", "adapter_model.safetensors"]
  assert sorted(file.name for file in (tmp_path / "one").iterdir()) == files
  for name in files:
    one, two = (tmp_path / folder / name for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
  assert config_of(tmp_path / "one") == {
    "base_model_name_or_path": "x/y",
    "lora_alpha": 3,
    "peft_type": "LORA",
    "r": 3,
    "target_modules": [
      "down_proj", "embed_tokens", "gate_proj", "k_proj", "o_proj", "q_proj",
      "up_proj", "v_proj",
    ],
    "task_type": "CAUSAL_LM",
  }  # fmt: skip


def test_only_the_given_modules_are_wrapped(tmp_path):
  model = build(llama())
  name = "model.layers.1.self_attn.q_proj.weight"
  loras = {name: random_loras(model)[name]}
  save_peft(tmp_path, loras, like=like_of(model))
  assert config_of(tmp_path)["target_modules"] == [name.removesuffix(".weight")]
  loaded(model, tmp_path)


def test_vllm_takes_neither_biases_nor_whole_tensors(tmp_path):
  model = build(qwen2())
  bias = "model.layers.0.self_attn.q_proj.bias"
  left = save_peft(
    tmp_path,
    random_loras(model),
    like=like_of(model),
    biases={bias: np.ones(32, np.float32)},
    full={"model.norm.weight": np.ones(32, np.float32)},
    profile=VLLM,
  )
  assert left.keys() == {bias, "model.norm.weight"}
  assert not config_of(tmp_path).keys() & {"lora_bias", "modules_to_save"}


def test_a_rank_over_512_is_refused_by_name(tmp_path):
  lora = Lora(jnp.ones((513, 600)), jnp.ones((513, 600)), jnp.float32(1))
  like = {"h.q.weight": np.ones((600, 600))}
  with pytest.raises(ValueError, match=r"over 512.*h\.q\.weight \(513\)"):
    save_peft(tmp_path, {"h.q.weight": lora}, like=like, profile=VLLM)
  assert list(tmp_path.iterdir()) == []


def test_rank_zero_is_left_out_and_reported(tmp_path):
  model = build(llama())
  loras = random_loras(model)
  name = "model.layers.0.mlp.up_proj.weight"
  loras[name] = Lora(jnp.ones((0, 32)), jnp.ones((0, 48)), jnp.float32(1))
  left = save_peft(tmp_path, loras, like=like_of(model))
  assert left == {name: "rank 0: nothing to write"}
  assert name not in load_peft(tmp_path, like=like_of(model)).loras


LORA = Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(1))
LIKE = {"h.q.weight": np.ones((5, 3)), "h.k.weight": np.ones((5, 3))}


@pytest.mark.parametrize(
  ("loras", "options", "message"),
  [
    ({"h.v.weight": LORA}, {}, r"does not have: h\.v\.weight"),
    ({"h.q.weight": from_in_rank(LORA.a.T, LORA.a)}, {}, "do not fit"),
    ({}, {}, "No module is left"),
    (
      {"h.q.weight": LORA, "h.k.weight": LORA},
      {"rename": lambda path: "h.q.weight"},
      "several Loras",
    ),
    (
      {"h.q.weight": LORA},
      {"full": {"h.q.weight": np.ones((5, 3))}},
      "a Lora and in full",
    ),
    (
      {"h.q.weight": LORA},
      {"biases": {"h.q.bias": np.ones(3)}},
      r"biases do not fit",
    ),
  ],
)
def test_what_cannot_be_meant_is_refused(loras, options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    save_peft(tmp_path, loras, like=LIKE, **options)
  assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_replaced_only_when_asked(tmp_path):
  save_peft(tmp_path, {"h.q.weight": LORA}, like=LIKE)
  with pytest.raises(ValueError, match="overwrite"):
    save_peft(tmp_path, {"h.k.weight": LORA}, like=LIKE)
  save_peft(tmp_path, {"h.k.weight": LORA}, like=LIKE, overwrite=True)
  assert list(load_peft(tmp_path, like=LIKE).loras) == ["h.k.weight"]


def test_an_adapter_stays_when_its_successor_fails(tmp_path):
  save_peft(tmp_path, {"h.q.weight": LORA}, like=LIKE)
  before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
  wrong = {"h.norm.weight": np.array(["not", "a", "number"])}
  like = LIKE | {"h.norm.weight": np.ones(3)}
  with pytest.raises(ValueError, match="which safetensors lacks"):
    save_peft(
      tmp_path, {"h.k.weight": LORA}, like=like, full=wrong, overwrite=True
    )
  after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
  assert after == before


def test_each_lora_of_a_lazy_mapping_is_read_twice_at_most(tmp_path):
  class Lazy(dict):
    reads = 0

    def __getitem__(self, key):
      self.reads += 1
      return super().__getitem__(key)

    def items(self):
      return ((key, self[key]) for key in self)

  loras = Lazy({"h.q.weight": LORA, "h.k.weight": LORA})
  save_peft(tmp_path, loras, like=LIKE)
  assert loras.reads == 4


def test_a_scanned_flax_tree_becomes_one_module_per_layer(tmp_path):
  model = build(llama())
  rng = np.random.default_rng(0)
  path = "layers/mlp/up/kernel"
  lora = Lora(
    jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float32) / 4,
    jnp.asarray(rng.normal(size=(2, 3, 48)), jnp.float32) / 4,
    jnp.asarray([1.0, 2.0]),
  )
  names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
  like = {path: jax.ShapeDtypeStruct((2, 32, 48), jnp.float32)}
  save_peft(tmp_path, {path: lora}, like=like, rename=lambda _: names)
  single = {
    name: Lora(lora.a[i], lora.b[i], lora.scale[i])
    for i, name in enumerate(names)
  }
  assert_close(logits_of(loaded(model, tmp_path)), changed(model, single))


class Convolutions(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.flat = torch.nn.Conv1d(4, 6, 3)
    self.square = torch.nn.Conv2d(1, 5, (3, 2))

  def forward(self, x):
    return self.square(self.flat(x)[:, None])


def test_convolutions(tmp_path):
  torch.manual_seed(0)
  model = Convolutions()
  like = like_of(model)
  rng = np.random.default_rng(0)
  loras, x = {}, torch.randn(2, 4, 9)
  expected = copy.deepcopy(model)
  for name in ("flat.weight", "square.weight"):
    shape = tuple(like[name].shape)
    view = view_of(name, shape, table_for(like))
    in_, out = view.shape(shape)
    loras[name] = Lora(
      jnp.asarray(rng.normal(size=(2, in_)), jnp.float32),
      jnp.asarray(rng.normal(size=(2, out)), jnp.float32),
      jnp.float32(0.5),
    )
    change = as_parameter(np.asarray(dense(loras[name])), view, shape)
    with torch.no_grad():
      dict(expected.named_parameters())[name].add_(torch.tensor(change))
  save_peft(tmp_path, loras, like=like, task_type=None)
  wrapped = peft.PeftModel.from_pretrained(model, tmp_path)
  assert_close(wrapped(x), expected(x))
  assert load_peft(tmp_path, like=like).loras.keys() == loras.keys()


def randomise(wrapped):
  """Random values for everything PEFT would train."""
  torch.manual_seed(1)
  with torch.no_grad():
    for parameter in wrapped.parameters():
      if parameter.requires_grad:
        parameter.normal_(std=0.2)
  return wrapped.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # of a bias' one axis
@pytest.mark.parametrize(
  "options",
  [
    {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    {
      "target_modules": r".*\.(q|v)_proj",
      "rank_pattern": {"v_proj": 2, r"^model\.layers\.0\..*q_proj": 7},
      "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
    {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    {
      "target_modules": "all-linear",
      "modules_to_save": ["norm", "embed_tokens"],
      "exclude_modules": ["o_proj"],
    },
  ],
  ids=["rslora", "patterns", "bias", "embeddings", "saved"],
)
def test_adapters_that_peft_wrote_mean_the_same(options, tmp_path):
  model = build(qwen2())
  config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
  wrapped = randomise(peft.get_peft_model(copy.deepcopy(model), config))
  wrapped.save_pretrained(tmp_path)
  adapter = load_peft(tmp_path, like=like_of(model))
  expected = logits_of(wrapped)
  biases = {k: v for k, v in adapter.biases.items() if k in like_of(model)}
  if options.get("lora_bias"):
    assert adapter.biases.keys() > biases.keys() > set()
    for module in wrapped.modules():  # those that the base has no place for
      if hasattr(module, "lora_B") and module.base_layer.bias is None:
        torch.nn.init.zeros_(module.lora_B["default"].bias)
    expected = logits_of(wrapped)
  assert_close(changed(model, adapter.loras, biases, adapter.full), expected)


@pytest.mark.parametrize("short", [False, True])
def test_expert_adapters_that_peft_wrote_mean_the_same(short, tmp_path):
  model = build(qwen2_moe())
  names = [
    name
    for name in like_of(model)
    if "experts." in name and "." in name and not name.endswith(".weight")
  ]
  targets = ["experts.gate_up_proj", "experts.down_proj"] if short else names
  config = peft.LoraConfig(
    r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets
  )
  wrapped = randomise(peft.get_peft_model(copy.deepcopy(model), config))
  wrapped.save_pretrained(tmp_path)
  adapter = load_peft(tmp_path, like=like_of(model))
  assert set(names) < adapter.loras.keys()
  assert_close(changed(model, adapter.loras), logits_of(wrapped))


def rewritten(folder, tensors=None, **config):
  """The adapter folder with tensors or entries exchanged."""
  stored = dict(open_checkpoint(folder / "adapter_model.safetensors"))
  stored = {
    k: v for k, v in (stored | (tensors or {})).items() if v is not None
  }
  write_safetensors(folder / "adapter_model.safetensors", stored)
  text = json.dumps(config_of(folder) | config)
  (folder / "adapter_config.json").write_text(text)
  return folder


A, B = (f"base_model.model.h.q.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tensors": {A.replace(".q.", ".o."): np.ones((2, 3), "f4")}}, "explain"),
    ({"tensors": {A.removeprefix("base_model."): np.ones((2, 3))}}, "explain"),
    ({"tensors": {"base_model.model.norm.weight": np.ones(3)}}, "explain"),
    ({"tensors": {A.replace("A.weight", "B.bias"): np.ones(5)}}, "explain"),
    ({"tensors": {B: None}}, "not whole"),
    ({"tensors": {B: np.ones((5, 4), "f4")}}, "not whole"),
    ({"r": 4}, "configured rank 4"),
    ({"tensors": {A: np.ones((2, 4), "f4")}}, "do not fit"),
    ({"target_modules": ["q", "k"]}, r"not in the file: h\.k\.weight"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "DoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
    ({"bias": "all"}, "bias"),
    ({"new_idea": {"x": 1}}, "unknown entries new_idea"),
    ({"r": 0}, "at least 1"),
    ({"tensors": {A: np.ones(2, "f4")}}, "not whole"),
    (
      {"target_modules": [], "target_parameters": ["q.up", "q.down"]},
      "known only for",
    ),
    (
      {
        "target_modules": [],
        "target_parameters": ["q.gate_up_proj", "q.down_proj"],
      },
      "1 LoRA layers, configured",
    ),
  ],
)
def test_what_does_not_fit_together_is_not_loaded(changes, message, tmp_path):
  save_peft(tmp_path, {"h.q.weight": LORA}, like=LIKE)
  load_peft(tmp_path, like=LIKE)
  folder = rewritten(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    load_peft(folder, like=LIKE)


@pytest.mark.parametrize(
  ("lora", "said"),
  [
    (Lora(np.ones((1, 4), "f4"), np.ones((1, 6), "f4"), np.float32(1e5)),
     "b, times its scale, of h.q.weight: 6 of 6 values, up to 1e\\+05"),
    (Lora(np.full((1, 4), 7e4, "f4"), np.ones((1, 6), "f4"), np.float32(1)),
     "a of h.q.weight: 4 of 4 values, up to 7e\\+04"),
    (Lora(np.ones((1, 4), "f2"), np.ones((1, 6), "f2"), np.float32("nan")),
     "b, times its scale, of h.q.weight: 6 of 6 values are NaN"),
  ],
)  # fmt: skip
def test_factors_that_are_not_finite_as_stored_are_not_written(
  lora, said, tmp_path
):
  like = {"h.q.weight": np.zeros((6, 4), "f4")}
  with pytest.raises(ValueError, match=said):
    save_peft(tmp_path / "x", {"h.q.weight": lora}, like=like, dtype="float16")
  assert not list((tmp_path / "x").glob("*"))


def test_a_head_that_left_its_embedding_does_not_fit_a_tied_base(tmp_path):
  model = build(llama(tied=True))
  save_peft(tmp_path, random_loras(model), like=like_of(model))
  key = "base_model.model.lm_head.lora_A.weight"
  rewritten(tmp_path, {key: np.ones((3, 32), np.float32)})
  key = "base_model.model.lm_head.lora_B.weight"
  rewritten(tmp_path, {key: np.ones((96, 3), np.float32)})
  with pytest.raises(ValueError, match="untie"):
    load_peft(tmp_path, like=like_of(model))


def test_bridges_keep_the_change():
  lora = Lora(LORA.a, LORA.b, jnp.float32(3))
  a, b = to_in_rank(lora)
  np.testing.assert_array_equal(a @ b, dense(lora))
  np.testing.assert_array_equal(dense(from_in_rank(a, b)), dense(lora))
