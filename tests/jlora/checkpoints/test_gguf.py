# SPDX-License-Identifier: Apache-2.0
"""GGUF files as checkpoints: names, rows, values, and what is refused."""

import json
import sys
import warnings

import gguf
import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.checkpoints.gguf_names import KINDS
from jlora.extraction import extract_checkpoint
from jlora.formats import load_peft, open_adapter, save_gguf
from jlora.loras import Lora

V, D, F, HEADS, KEYS, LAYERS = 40, 64, 32, 4, 2, 2
KINDS_OF = gguf.GGMLQuantizationType
OTHERS = {
  "model.embed_tokens": "token_embd", "model.norm": "output_norm",
  "lm_head": "output", "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
HEADS_OF = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEYS}


def llama(seed=0, tied=False):
  rng = np.random.default_rng(seed)
  shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
  shapes |= {} if tied else {"lm_head": (V, D)}
  keys = D * KEYS // HEADS
  for i in range(LAYERS):
    inner = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (keys, D),
             "self_attn.v_proj": (keys, D), "self_attn.o_proj": (D, D),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
             "mlp.down_proj": (D, F), "input_layernorm": (D,),
             "post_attention_layernorm": (D,)}  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}": own for name, own in inner.items()}
  return {f"{name}.weight": rng.standard_normal(shape, np.float32)
          for name, shape in shapes.items()}  # fmt: skip


def place(name):
  """llama.cpp's name, and the module in its layer."""
  module = name.removesuffix(".weight")
  if module in OTHERS:
    return f"{OTHERS[module]}.weight", module
  _, _, layer, inner = module.split(".", 3)
  return f"blk.{layer}.{OTHERS[inner]}.weight", inner


def turned(x, heads):
  """Rows of halves of heads as llama.cpp has them: the halves in turn."""
  d = len(x) // heads
  return x[[h * d + half * d // 2 + i for h in range(heads)
            for i in range(d // 2) for half in range(2)]]  # fmt: skip


def write(path, tensors, kind=KINDS_OF.F32, arch="llama", more=(), extra=None):
  """A file as llama.cpp's converter makes it; norms stay float32."""
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(LAYERS)
  writer.add_embedding_length(D)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KEYS)
  writer.add_token_list([f"t{i}" for i in range(V)])
  for add, *values in more:
    getattr(writer, add)(*values)
  for name, x in tensors.items():
    target, inner = place(name)
    if inner in HEADS_OF and arch == "llama":
      x = turned(x, HEADS_OF[inner])
    if inner.endswith("norm"):
      writer.add_tensor(target, x + np.float32(arch == "gemma"))
    else:
      stored = gguf.quants.quantize(x, kind)
      writer.add_tensor(target, stored, raw_dtype=kind)
  for name, x in (extra or {}).items():
    writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def opened(path):
  with warnings.catch_warnings(action="ignore"):
    return open_checkpoint(path)


DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
          "Q8_0": np.float32, "Q4_0": np.float32}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_values_are_those_that_gguf_dequantises(name, tmp_path):
  kind, tensors = KINDS_OF[name], llama()
  path = write(tmp_path / "x.gguf", tensors, kind)
  found = opened(path)
  assert (found.format, found.model_type) == ("gguf", "llama")
  assert set(found) == set(tensors)
  for own, x in tensors.items():
    inner = place(own)[1]
    want = x
    if not inner.endswith("norm"):
      # Blocks lie along rows, so the order of rows changes no value.
      raw = gguf.quants.quantize(x, kind)
      want = gguf.quants.dequantize(raw, kind)
      assert found.spec[own].dtype == DTYPES[name]
    got = found[own]
    assert (got.dtype, got.shape) == (found.spec[own].dtype, x.shape)
    np.testing.assert_array_equal(got.astype(np.float32), want)
    if x.ndim > 1:
      part = (slice(3, 20, 5), slice(1, 7))
      np.testing.assert_array_equal(found.read(own, part), got[part])
      np.testing.assert_array_equal(found.read(own, 4), got[4])
      assert found.read(own, slice(2, 2)).shape == (0, x.shape[1])
  # What is not asked for is not read.
  before = found.bytes_read
  found.read("lm_head.weight", slice(0, 1))
  assert found.bytes_read - before <= 4 * D


def test_quantised_tensors_are_told(tmp_path):
  path = write(tmp_path / "x.gguf", llama(), KINDS_OF.Q8_0)
  with pytest.warns(UserWarning, match=r"16 of 21 tensors are quantised, Q8_0"):
    found = open_checkpoint(path)
  assert found.metadata["gguf.quantised"] == "Q8_0 (16): read as float32"


@pytest.mark.long
def test_transformers_reads_the_same_weights(tmp_path):
  """Its own reader of GGUF, in which rows are put right by other code."""
  transformers = pytest.importorskip("transformers")
  more = (("add_feed_forward_length", F), ("add_rope_freq_base", 1e4),
          ("add_context_length", 64), ("add_layer_norm_rms_eps", 1e-5),
          ("add_vocab_size", V))  # fmt: skip
  tensors = llama()
  write(tmp_path / "x.gguf", tensors, more=more)
  with warnings.catch_warnings(action="ignore"):
    model = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, gguf_file="x.gguf"
    )
  found = opened(tmp_path / "x.gguf")
  assert found.config["intermediate_size"] == F
  assert found.config["rope_theta"] == 1e4
  state = model.state_dict()
  assert set(state) == set(found)
  for name, x in state.items():
    np.testing.assert_array_equal(found[name], x.float().numpy())


@pytest.mark.parametrize("arch", ["qwen2", "gemma"])
def test_other_kinds_keep_their_rows_and_norms(arch, tmp_path):
  tensors = llama(tied=True)
  extra = {"blk.0.attn_q.bias": np.arange(D, dtype=np.float32)}
  path = write(tmp_path / "x.gguf", tensors, arch=arch,
               extra=extra if arch == "qwen2" else None)  # fmt: skip
  found = opened(path)
  assert found.config["tie_word_embeddings"] is True
  assert found.config["architectures"] == [KINDS[arch].name]
  for name, x in tensors.items():
    np.testing.assert_allclose(found[name], x, atol=1e-6)
  if arch == "qwen2":
    bias = found["model.layers.0.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(bias, extra["blk.0.attn_q.bias"])


def changed(tensors):
  rng = np.random.default_rng(5)
  return {
    name: x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32)
    if x.ndim > 1
    else x
    for name, x in tensors.items()
  }


def test_extraction_is_that_of_the_folders_they_were_made_from(tmp_path):
  base, tuned = llama(), changed(llama())
  config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": KEYS, "hidden_size": D,
            "tie_word_embeddings": False}  # fmt: skip
  for name, tensors in (("base", base), ("tuned", tuned)):
    (tmp_path / name).mkdir()
    write_safetensors(tmp_path / name / "model.safetensors", tensors)
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    write(tmp_path / f"{name}.gguf", tensors)
  found = {}
  for key, pair in {
    "folders": ("base", "tuned"),
    "files": ("base.gguf", "tuned.gguf"),
    "mixed": ("base", "tuned.gguf"),
  }.items():
    out = tmp_path / f"out-{key}"
    extract_checkpoint(*(tmp_path / one for one in pair), out, rank=2)
    found[key] = load_peft(out).loras
  for key in ("files", "mixed"):
    assert set(found[key]) == set(found["folders"])
    for name, lora in found["folders"].items():
      for side in ("a", "b"):
        np.testing.assert_array_equal(
          getattr(found[key][name], side), getattr(lora, side)
        )


def test_an_adapter_is_for_a_gguf_base(tmp_path):
  base = write(tmp_path / "base.gguf", llama())
  rng = np.random.default_rng(0)
  name = "model.layers.1.self_attn.q_proj"
  a, b = (rng.standard_normal((2, D), np.float32) for _ in range(2))
  lora = Lora(a, b, np.float32(1))
  save_gguf(tmp_path / "lora.gguf", {name: lora}, config=opened(base).config,
            dtype=np.float32)  # fmt: skip
  found = open_adapter(tmp_path / "lora.gguf", base)
  np.testing.assert_allclose(
    found[name].a.T @ found[name].b, a.T @ b, atol=1e-5
  )
  with pytest.raises(ValueError, match="general.type is 'adapter'"):
    open_checkpoint(tmp_path / "lora.gguf")


def test_refusals(tmp_path, monkeypatch):
  path, tensors = tmp_path / "x.gguf", llama()
  rope = {"rope_freqs.weight": np.ones(8, np.float32)}
  assert set(opened(write(path, tensors, extra=rope))) == set(tensors)
  odd = {"blk.0.ssm_a": np.ones(8, np.float32)}
  write(path, tensors, extra=odd)
  with pytest.raises(ValueError, match=r"1 tensors have no name in Llama"):
    open_checkpoint(path)
  write(path, tensors, more=[("add_uint16", "split.count", 3)])
  with pytest.raises(ValueError, match="one of 3 parts"):
    open_checkpoint(path)
  whole = write(path, tensors).read_bytes()
  path.write_bytes(whole.replace(b"llama", b"odd_1"))
  with pytest.raises(ValueError, match="'odd_1' is not in the table of names"):
    open_checkpoint(path)
  for data, said in (
    (whole[:-9], "ends before 1 of its tensors"),
    (whole[:200], "ends within its header"),
    (b"GGUF" + whole[4:5], "too short"),
    (b"XXXX" + whole[4:], "does not begin with GGUF"),
    (whole[:4] + b"\0\0\0\3" + whole[8:], "version"),
  ):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
      open_checkpoint(path)
  path.write_bytes(whole)
  found = open_checkpoint(path)
  path.write_bytes(whole + b"0")
  with pytest.raises(ValueError, match="changed since"):
    found["lm_head.weight"]
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ValueError, match="needs the package gguf"):
    open_checkpoint(path)
