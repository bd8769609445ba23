# SPDX-License-Identifier: Apache-2.0
"""Adapters for vLLM against what its source says of names; vLLM is not run."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import collect_vllm
from jlora.formats.peft.layouts import VLLM
from jlora.formats.peft.loading_rules import FILE as FAMILIES
from jlora.formats.peft.reading import load_peft
from jlora.formats.peft.vllm_names import FILE, class_refusal, refusal_of
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora, dense

TABLE = json.loads(FILE.read_text())
CLASSES = json.loads(FAMILIES.read_text())["classes"]
BOTH = sorted(set(TABLE["classes"]) & set(CLASSES))
PROJECTIONS = ("q_proj", "gate_proj", "query", "qkv_proj", "fc1", "down_proj")
LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
MLP = f"{LAYER}.mlp"
INNER = "model.language_model.layers.3"

# Read by a person in vllm 0.33.0's files, with the class: (module, kind, what
# the reason says, or None where vLLM takes it).
READ = [
  # llama.py
  ("LlamaForCausalLM", f"{ATTENTION}.q_proj", "linear", None),
  ("LlamaForCausalLM", f"{MLP}.up_proj", "linear", None),
  ("LlamaForCausalLM", f"{MLP}.gate_up_proj", "linear", "puts no LoRA on"),
  ("LlamaForCausalLM", "model.embed_tokens", "embedding", None),
  ("LlamaForCausalLM", "lm_head", "linear", None),
  ("LlamaForCausalLM", "layers.0.self_attn.q_proj", "linear", "ignores it"),
  # qwen2.py: no embedding_modules
  ("Qwen2ForCausalLM", f"{ATTENTION}.v_proj", "linear", None),
  ("Qwen2ForCausalLM", f"{MLP}.down_proj", "linear", None),
  ("Qwen2ForCausalLM", "model.embed_tokens", "embedding", "on embed_tokens"),
  ("Qwen2ForCausalLM", "lm_head", "linear", "puts no LoRA on lm_head"),
  # qwen3_moe.py: experts of gate_proj, down_proj and up_proj, one by one
  ("Qwen3MoeForCausalLM", f"{MLP}.experts.7.up_proj", "linear", None),
  ("Qwen3MoeForCausalLM", f"{MLP}.experts.7.w1", "linear", "of experts only"),
  ("Qwen3MoeForCausalLM", f"{MLP}.experts", "experts", "no stacked experts"),
  ("Qwen3MoeForCausalLM", f"{MLP}.gate", "router", None),
  ("Qwen3MoeForCausalLM", "model.embed_tokens", "embedding", None),
  # gemma3_mm.py: the mapper's prefixes; text names without the outer model
  ("Gemma3ForConditionalGeneration", f"{INNER}.self_attn.q_proj", "linear",
   None),
  ("Gemma3ForConditionalGeneration", "language_model." + MLP + ".down_proj",
   "linear", None),
  ("Gemma3ForConditionalGeneration", f"{MLP}.down_proj", "linear", None),
  ("Gemma3ForConditionalGeneration", "vision_tower.vision_model.encoder"
   ".layers.0.mlp.fc2", "linear", None),
  ("Gemma3ForConditionalGeneration", f"thinker.{INNER}.self_attn.q_proj",
   "linear", "ignores it"),
  ("Gemma3ForConditionalGeneration", "lm_head", "linear", "puts no LoRA on"),
  # mixtral.py: block_sparse_moe, experts of w1, w2 and w3; gate_proj is w1
  ("MixtralForCausalLM", f"{LAYER}.block_sparse_moe.experts.0.w2", "linear",
   None),
  ("MixtralForCausalLM", f"{LAYER}.block_sparse_moe.experts.0.up_proj",
   "linear", None),
  ("MixtralForCausalLM", f"{MLP}.experts.0.w2", "linear", "ignores it"),
  ("MixtralForCausalLM", f"{LAYER}.block_sparse_moe.gate", "linear", None),
  ("MixtralForCausalLM", "lm_head", "linear", None),
  # gpt_oss.py: self_attn is attn, embed_tokens is embedding, experts stacked
  ("GptOssForCausalLM", f"{ATTENTION}.o_proj", "linear", None),
  ("GptOssForCausalLM", f"{MLP}.experts", "experts", None),
  ("GptOssForCausalLM", f"{MLP}.experts.0.gate_proj", "linear", "only stacked"),
  ("GptOssForCausalLM", f"{MLP}.router", "router", None),
  ("GptOssForCausalLM", "model.embed_tokens", "embedding", "on embed_tokens"),
  ("GptOssForCausalLM", "lm_head", "linear", "puts no LoRA on lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "name", "kind", "reason"), READ)
def test_a_person_read_the_same_in_the_source(cls, name, kind, reason):
  found = refusal_of(name, kind, [cls])
  assert (not found) if reason is None else (reason in found), found
  if reason:
    assert found.startswith(f"vLLM {TABLE['version']} ")
    assert cls in found


def random_lora(seed, *shape, rank=2):
  *batch, in_, out = shape
  rng = np.random.default_rng(seed)
  a = rng.standard_normal((*batch, rank, in_), np.float32)
  b = rng.standard_normal((*batch, rank, out), np.float32)
  return Lora(*map(jnp.asarray, (a, b, np.ones(batch, np.float32))))


def config_for(cls):
  return {"model_type": CLASSES[cls]["type"], "architectures": [cls]}


def write(folder, cls, shapes, loras, **options):
  """Saves for vLLM; returns what is left and the file's tensors."""
  like = {
    key: jax.ShapeDtypeStruct(shape, np.float32)
    for key, shape in shapes.items()
  }
  options = {"config": config_for(cls), "profile": VLLM} | options
  left = save_peft(folder, loras, like=like, **options)
  return left, load_file(folder / "adapter_model.safetensors"), like


def linear_layers(cls, place="", depth=0):
  """Yields the names of a class's linear layers, as transformers has them."""
  row = CLASSES[cls]
  waiting = [(place, row.get("modules", {}))]
  while waiting:
    at, branch = waiting.pop()
    for key, value in branch.items():
      name = f"{at}.{key.replace('N', '0') if key == 'N' else key}".strip(".")
      if isinstance(value, dict):
        waiting.append((name, value))
      elif value == "l":
        yield name
  for path, (part, _) in row.get("parts", {}).items():
    if part in CLASSES and depth < 3:
      inner = ".".join("0" if p == "N" else p for p in path.split("."))
      yield from linear_layers(part, f"{place}.{inner}".strip("."), depth + 1)


def vllm_raises(key, row):
  """Returns whether vLLM's check of a file's keys would stop at one."""
  name = key.removeprefix("base_model.model.")
  for old, new in row["renames"].get("substr", ()):
    name = name.replace(old, new, 1)
  for old, new in row["renames"].get("prefix", ()):
    if name.startswith(old):
      name = new + name[len(old) :]
  module = name.split(".lora_")[0]
  expected = {*row["expected"], *row.get("embeddings", ())}
  if ".experts" in module:
    rest = module[module.find(".experts") + 1 :].split(".")
    names = [] if row["experts"] == "stacked" else row["experts"]
    return rest[0] != "experts" or rest[-1] not in [*names, "experts"]
  return module.split(".")[-1] not in expected


def test_what_is_written_for_a_class_is_what_vllm_expects(tmp_path):
  written = dict.fromkeys(BOTH, 0)
  for cls in BOTH:
    row = TABLE["classes"][cls]
    names = [n for n in linear_layers(cls) if n.split(".")[-1] in PROJECTIONS]
    if not row["lora"] or not names:
      continue
    shapes = {f"{name}.weight": (3, 4) for name in names}
    loras = {key: random_lora(0, 4, 3) for key in shapes}
    with contextlib.suppress(ValueError):  # no module is left to write
      left, tensors, _ = write(tmp_path / cls, cls, shapes, loras)
      written[cls] = len(tensors)
      assert len(tensors) == 2 * (len(shapes) - len(left)), cls
      is_known = row["expected"] and row["renames"] is not None
      if is_known and "regex" not in row["renames"]:
        assert not [key for key in tensors if vllm_raises(key, row)], cls
  assert sum(count > 0 for count in written.values()) > 100
  assert all(written[cls] for cls in ("LlamaForCausalLM", "GemmaForCausalLM"))


@pytest.mark.parametrize(
  "cls", [c for c in BOTH if not TABLE["classes"][c]["lora"]]
)
def test_a_class_without_lora_is_refused_at_the_door(cls, tmp_path):
  with pytest.raises(ValueError, match=f"takes no LoRA for a {cls}"):
    write(tmp_path / "x", cls, {"q.weight": (3, 4)}, {})
  assert not (tmp_path / "x").exists()


def test_a_class_that_nobody_has_is_refused_unless_it_brings_its_code(tmp_path):
  shapes, loras = (
    {"q_proj.weight": (3, 4)},
    {"q_proj.weight": random_lora(0, 4, 3)},
  )
  config = {"model_type": "of_ours", "architectures": ["OursForCausalLM"]}
  with pytest.raises(ValueError, match="has no class OursForCausalLM"):
    write(tmp_path, "LlamaModel", shapes, loras, config=config)
  config["auto_map"] = {"AutoModel": "ours.Ours"}
  left, tensors, _ = write(tmp_path, "LlamaModel", shapes, loras, config=config)
  assert (left, len(tensors)) == ({}, 2)


def test_pooling_classes_are_made_of_generating_ones():
  for name in ("layers.0.self_attn.q_proj", f"{ATTENTION}.q_proj", "score"):
    assert not refusal_of(name, "linear", ["Qwen3ForSequenceClassification"])
  assert "GPT2" in class_refusal(["GPT2ForTokenClassification"])
  # transformers has it, and vLLM runs what transformers has
  assert not class_refusal(["BambaForCausalLM"])


def test_faults_go_to_the_ledger_and_the_rest_to_the_file(tmp_path):
  cls, good = "Qwen2ForCausalLM", f"{ATTENTION}.q_proj.weight"
  table, head = "model.embed_tokens.weight", "lm_head.weight"
  shapes = {good: (3, 4), table: (9, 4), head: (9, 4)}
  loras = {
    good: random_lora(0, 4, 3),
    table: random_lora(1, 9, 4),
    head: random_lora(2, 4, 9),
  }
  left, tensors, _ = write(tmp_path, cls, shapes, loras)
  assert left.keys() == {table, head}
  assert all("puts no LoRA on" in reason for reason in left.values())
  assert {key.split(".lora_")[0] for key in tensors} == {
    "base_model.model." + good.removesuffix(".weight")
  }


def test_half_of_a_tied_table_is_not_written(tmp_path):
  good, table = f"{ATTENTION}.q_proj.weight", "model.embed_tokens.weight"
  loras = {good: random_lora(0, 4, 3), table: random_lora(1, 9, 4)}
  # commandr.py takes embed_tokens, but not the lm_head that is tied to it
  cls = "CohereForCausalLM"
  left, tensors, _ = write(tmp_path, cls, {good: (3, 4), table: (9, 4)}, loras)
  assert "lm_head" in left[table]
  assert len(tensors) == 2


def test_without_a_config_nothing_is_looked_up(tmp_path):
  shapes = {"any.thing.weight": (3, 4)}
  loras = {"any.thing.weight": random_lora(0, 4, 3)}
  left, tensors, _ = write(
    tmp_path, "LlamaModel", shapes, loras, config=None, model_type="llama"
  )
  assert (left, len(tensors)) == ({}, 2)


SEPARATE = [
  ("MixtralForCausalLM", f"{LAYER}.block_sparse_moe.experts", "w1 w2 w3"),
  ("Qwen3MoeForCausalLM", f"{MLP}.experts", "gate_proj down_proj up_proj"),
  # transformers makes other parameters of these, and PEFT not their Loras
  ("Qwen2MoeForCausalLM", f"{MLP}.experts", "gate_proj down_proj up_proj"),
]


@pytest.mark.parametrize(("cls", "place", "names"), SEPARATE)
def test_separate_experts_keep_their_names_on_disk(cls, place, names, tmp_path):
  shapes = {
    f"{place}.{expert}.{name}.weight": (6, 4) if at != 1 else (4, 6)
    for expert in range(3)
    for at, name in enumerate(names.split())
  }
  given = f"{place}.1.{names.split()[0]}.weight"
  loras = {given: random_lora(0, 4, 6)}
  left, tensors, like = write(tmp_path, cls, shapes, loras)
  assert left == {}
  # vLLM packs them only if all are there, and of one rank
  assert {key.split(".lora_")[0] for key in tensors} == {
    "base_model.model." + path.removesuffix(".weight") for path in shapes
  }
  assert {min(value.shape) for value in tensors.values()} == {2}
  back = load_peft(tmp_path, like=like, config=config_for(cls)).loras
  np.testing.assert_allclose(dense(back[given]), dense(loras[given]), rtol=1e-6)
  others = [lora for path, lora in back.items() if path != given]
  assert not any(np.any(dense(lora)) for lora in others)


def test_of_stacked_experts_both_matrices_are_written(tmp_path):
  up, down = (f"{MLP}.experts.{name}" for name in ("gate_up_proj", "down_proj"))
  shapes = {up: (2, 4, 12), down: (2, 6, 4)}  # (experts, in, out)
  loras = {down: random_lora(0, 2, 6, 4)}
  left, tensors, like = write(tmp_path, "GptOssForCausalLM", shapes, loras)
  start = f"base_model.model.{MLP}.experts"
  assert left == {}
  assert tensors.keys() == {
    f"{start}{nest}.lora_{side}.weight"
    for nest in ("", ".base_layer")
    for side in "AB"
  }
  assert tensors[f"{start}.base_layer.lora_A.weight"].shape == (4, 4)
  assert not tensors[f"{start}.base_layer.lora_B.weight"].any()
  config = config_for("GptOssForCausalLM")
  back = load_peft(tmp_path, like=like, config=config).loras[down]
  np.testing.assert_allclose(dense(back), dense(loras[down]), rtol=1e-6)


def test_stacked_experts_stay_where_vllm_takes_them_one_by_one(tmp_path):
  up, good = f"{MLP}.experts.gate_up_proj", f"{ATTENTION}.q_proj.weight"
  shapes = {up: (2, 12, 4), f"{MLP}.experts.down_proj": (2, 4, 6), good: (3, 4)}
  loras = {up: random_lora(0, 2, 4, 12), good: random_lora(1, 4, 3)}
  left, tensors, _ = write(tmp_path, "Qwen3MoeForCausalLM", shapes, loras)
  assert left.keys() == {up}
  assert "takes no stacked experts" in left[up]
  assert len(tensors) == 2


REGISTRY = """
_TEXT_GENERATION_MODELS = {
  "AForCausalLM": ("a", "AForCausalLM"),
  "BForCausalLM": ("b", "BForCausalLM"),
  "PlainForCausalLM": ("b", "PlainForCausalLM"),
}
_EMBEDDING_MODELS = {"AModel": ("a", "AForCausalLM")}
_VLLM_MODELS = {**_TEXT_GENERATION_MODELS, **_EMBEDDING_MODELS}
"""
LAYERS = """
class LinearBase: ...
class RowLinear(LinearBase): ...
class QKVLinear(RowLinear): ...
"""
A = """
from torch import nn
from vllm.model_executor.layers.linear import QKVLinear, RowLinear
from .interfaces import SupportsLoRA
from .utils import WeightsMapper, make_layers

class AttentionOfA(nn.Module):
  def __init__(self):
    self.qkv_proj = QKVLinear()
    self.plain = nn.Linear(2, 2)
    self.mix = nn.Sequential(RowLinear(), nn.GELU())

class AModel(nn.Module):
  hf_to_vllm_mapper = WeightsMapper(
    orig_to_new_stacked={".q_proj": (".qkv_proj", 0)},
    orig_to_new_prefix={"old.": "model.", "gone.": None},
  )
  def __init__(self):
    self.layers = make_layers(2, lambda prefix: AttentionOfA())

class AForCausalLM(nn.Module, SupportsLoRA):
  hf_to_vllm_mapper = AModel.hf_to_vllm_mapper
  packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
  embedding_modules = {"embed_tokens": "input_embeddings"}
  def __init__(self):
    self.model = AModel()
"""
B = """
from torch import nn
import re
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from .a import AForCausalLM
from .utils import WeightsMapper

class Experts(nn.Module):
  def __init__(self):
    self.experts = FusedMoEFactory(ckpt_names=("w1", "w2", None))

class BForCausalLM(AForCausalLM):
  hf_to_vllm_mapper = AForCausalLM.hf_to_vllm_mapper | WeightsMapper(
    orig_to_new_regex={re.compile("^x"): "y"})
  embedding_modules = {}
  def __init__(self):
    super().__init__()
    self.mlp = Experts()
    self.other = init_vllm_registered_model(hf_config=config.text_config)

class PlainForCausalLM(nn.Module): ...
"""


def test_the_collector_reads_classes_without_running_them(tmp_path):
  models = tmp_path / "vllm" / "model_executor" / "models"
  files = {
    tmp_path / "PKG-INFO": "Metadata-Version: 2.4\nName: vllm\nVersion: 9.9\n",
    tmp_path / "vllm/config/model.py": (
      '_SUFFIX_TO_DEFAULTS = [("Model", ("pooling", "embed"))]\n'
    ),
    models.parent / "layers" / "linear.py": LAYERS,
    models / "registry.py": REGISTRY,
    models / "interfaces.py": "class SupportsLoRA: ...\n",
    models / "a.py": A,
    models / "b.py": B,
  }
  for file, text in files.items():
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
  facts = collect_vllm.collect(tmp_path)
  collect_vllm.write(facts, tmp_path / "vllm.json")
  assert json.loads((tmp_path / "vllm.json").read_text()) == facts
  assert (facts["version"], facts["suffixes"]) == ("9.9", {"Model": "embed"})
  a, b = facts["classes"]["AForCausalLM"], facts["classes"]["BForCausalLM"]
  assert a == {
    "lora": True,
    "embeddings": ["embed_tokens"],
    "expected": ["N", "k_proj", "mix", "q_proj", "v_proj"],
    "parts": ["N", "layers", "mix", "model", "plain", "qkv_proj"],
    "top": ["model"],
    "renames": {"prefix": [["old.", "model."]]},
  }
  assert facts["classes"]["AModel"] == a | {"pools": True}
  assert facts["classes"]["PlainForCausalLM"] == {"lora": False}
  assert b["renames"] == {"regex": [["^x", "y"]]} | a["renames"]
  assert b["experts"] == ["w1", "w2"]
  assert (b["expected"], "embeddings" in b) == (None, False)
  assert {"model", "mlp", "other"} <= {*b["top"]}
