# SPDX-License-Identifier: Apache-2.0
"""GGUF adapters by the package gguf and the rules of llama.cpp's loader."""

import importlib
import json

import gguf
import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.checkpoints.gguf_names import permuted, unpermuted
from jlora.formats import LLAMACPP, open_adapter, save_gguf, save_peft
from jlora.loras import Lora
from tests.helpers.image_adapters import product

V, D, F, HEADS, KEYS = 20, 16, 24, 4, 2
CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "num_hidden_layers": 2,
  "num_attention_heads": HEADS,
  "num_key_value_heads": KEYS,
  "tie_word_embeddings": False,
}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def shapes():
  found = {TABLE: (V, D), HEAD: (V, D)}
  for i in range(2):
    layer = f"model.layers.{i}"
    sides = {"q": D, "k": D * KEYS // HEADS, "v": D * KEYS // HEADS, "o": D}
    for name, n in sides.items():
      found[f"{layer}.self_attn.{name}_proj.weight"] = (n, D)
    found[f"{layer}.mlp.up_proj.weight"] = (F, D)
    found[f"{layer}.mlp.down_proj.weight"] = (D, F)
  return found


def draw(ranks=(2, 3, 5)):
  """Loras of a small Llama; the table's reads tokens, as PEFT's."""
  rng, found = np.random.default_rng(0), {}
  for at, (name, (n_out, n_in)) in enumerate(shapes().items()):
    sides = (n_out, n_in) if name == TABLE else (n_in, n_out)
    a, b = (rng.standard_normal((ranks[at % len(ranks)], n), np.float32)
            for n in sides)  # fmt: skip
    found[name] = Lora(a, b, np.float32(0.7))
  return found


@pytest.fixture
def base(tmp_path):
  folder = tmp_path / "base"
  folder.mkdir()
  rng = np.random.default_rng(1)
  tensors = {n: rng.standard_normal(s, np.float32) for n, s in shapes().items()}
  write_safetensors(folder / "model.safetensors", tensors)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  return folder


def rotary_order(rows, heads):
  """llama.cpp's converter on rows: the two halves of a head interleaved."""
  halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
  return halves.transpose(0, 2, 1, 3).reshape(rows.shape)


def loaded(path):
  """{tensor: change} as llama.cpp applies it, its checks made on the way."""
  reader = gguf.GGUFReader(path)
  value = {key: field.contents() for key, field in reader.fields.items()}
  assert value["general.type"] == "adapter"
  assert value["adapter.type"] == "lora"
  assert value["general.architecture"] == "llama"
  assert value["general.quantization_version"] == 2
  alpha = value["adapter.lora.alpha"]
  arrays = {}
  for tensor in reader.tensors:
    shape = tuple(int(n) for n in tensor.shape[::-1])
    data = tensor.data
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
      data = data.reshape(-1).view(ml_dtypes.bfloat16)
    arrays[tensor.name] = np.asarray(data, np.float32).reshape(shape)
  found = {}
  for name in {key.rpartition(".lora_")[0] for key in arrays}:
    a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
    rank = b.shape[1]
    scale = alpha / rank if alpha else 1.0
    if name == "token_embd.weight":
      assert (a.shape, b.shape) == ((V, rank), (D, rank))
      found[name] = scale * (a @ b.T)
    else:
      assert a.shape[0] == b.shape[1]
      found[name] = scale * (b @ a)
  return found


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_llama_cpp_adds_the_permuted_change(pad, dtype, tmp_path):
  loras, path = draw(), tmp_path / "x.gguf"
  left = save_gguf(path, loras, config=CONFIG, dtype=dtype, pad=pad)
  assert left == {}
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
  found = loaded(path)
  assert len(found) == len(loras)
  tolerance = {2: 2e-2, 4: 1e-6}[np.dtype(dtype).itemsize]
  for name, lora in loras.items():
    want = product(lora)
    if name == TABLE:
      want = want.T
    for letter, heads in (("q", HEADS), ("k", KEYS)):
      if f"{letter}_proj" in name:
        want = rotary_order(want, heads)
    change = found[names.get_name(name, try_suffixes=(".weight",))]
    assert np.linalg.norm(change - want) < tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_written_is_read_with_the_base(dtype, base, tmp_path):
  loras, path = draw(), tmp_path / "x.gguf"
  save_gguf(path, loras, config=CONFIG, dtype=dtype)
  adapter = open_adapter(path, base)
  assert {f"{module}.weight" for module in adapter} == set(loras)
  for module, lora in adapter.items():
    want = product(loras[f"{module}.weight"])
    error = np.linalg.norm(product(lora) - want) / np.linalg.norm(want)
    assert error < (1e-6 if dtype is np.float32 else 2e-2)
  bare = open_adapter(path)
  assert "blk.0.attn_q" in bare
  assert bare.notes == [
    "without a base: llama.cpp's names, and its order of rows"]  # fmt: skip


def test_rows_are_permuted_for_llamas_kin_alone(tmp_path):
  loras = {n: x for n, x in draw().items() if "q_proj" in n}
  stored = {}
  for name in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
    path = tmp_path / f"{name}.gguf"
    save_gguf(path, loras, config=CONFIG | {"architectures": [name]},
              dtype=np.float32)  # fmt: skip
    reader = gguf.GGUFReader(path)
    stored[name] = {t.name: np.array(t.data) for t in reader.tensors}
  llama, qwen = stored.values()
  for key, rows in qwen.items():
    want = rotary_order(rows, HEADS) if key.endswith("lora_b") else rows
    np.testing.assert_array_equal(llama[key], want)


def test_orders_are_inverse():
  rows = np.random.default_rng(0).standard_normal((24, 3))
  np.testing.assert_array_equal(unpermuted(permuted(rows, 2), 2), rows)
  np.testing.assert_array_equal(permuted(rows, 3), rotary_order(rows, 3))
  with pytest.raises(ValueError, match="24 rows are not 5 heads"):
    permuted(rows, 5)


def test_what_llama_cpp_lacks_is_in_the_ledger(tmp_path):
  loras = {n: x for n, x in draw().items() if n in (TABLE, HEAD)}
  loras["vision.patch.weight"] = loras[HEAD]
  loras["model.layers.0.mlp.up_proj.weight"] = Lora(
    np.ones((0, 2)), np.ones((0, 2)), np.float32(1)
  )
  stack = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
  loras["model.layers.0.mlp.down_proj.weight"] = stack
  shifts = {"model.norm.weight": np.ones(D), "model.q.bias": np.ones(D)}
  config = CONFIG | {"tie_word_embeddings": True}
  left = save_gguf(tmp_path / "x.gguf", loras, config=config, shifts=shifts)
  assert left == {
    HEAD: "the head is the table of tokens (tied): the embedding's change "
          "serves both",
    "vision.patch.weight": "llama.cpp has no tensor of that name",
    "model.layers.0.mlp.up_proj.weight": "rank 0: no change",
    "model.layers.0.mlp.down_proj.weight":
      "a stack of experts, which is not written to GGUF",
    "model.norm.weight":
      "llama.cpp reads whole tensors and does not apply them",
    "model.q.bias":
      "llama.cpp adds no biases; merge the change into a checkpoint",
  }  # fmt: skip


def test_mistakes_are_told_and_leave_no_file(tmp_path, monkeypatch):
  path = tmp_path / "x.gguf"
  odd = CONFIG | {"architectures": ["OddModel"]}
  with pytest.raises(ValueError, match="class OddModel has no row .* Llama"):
    save_gguf(path, draw(), config=odd)
  with pytest.raises(ValueError, match="dtype must be one of float32"):
    save_gguf(path, draw(), config=CONFIG, dtype=np.float64)
  big = {HEAD: Lora(np.full((1, D), 1e6, "f4"), np.full((1, V), 1e6, "f4"),
                    np.float32(1))}  # fmt: skip
  with pytest.raises(ValueError, match="more than float16 holds"):
    save_gguf(path, big, config=CONFIG)
  with pytest.raises(ValueError, match="No module is left to write"):
    save_gguf(path, {"x.weight": big[HEAD]}, config=CONFIG)
  assert list(tmp_path.iterdir()) == []

  def absent(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(importlib, "import_module", absent)
  with pytest.raises(ValueError, match=r"pip install 'jlora\[gguf\]'"):
    save_gguf(path, draw(), config=CONFIG)


def test_damaged_files_and_models_are_refused(base, tmp_path):
  path = tmp_path / "x.gguf"
  path.write_bytes(b"GGUF" + bytes(20))
  with pytest.raises(ValueError, match="no whole GGUF file"):
    open_adapter(path)
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_type("adapter")
  writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, D), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match="attn_q.weight lacks lora_b"):
    open_adapter(path)
  save_gguf(path, draw(), config=CONFIG)
  with pytest.raises(ValueError, match="the base has no config.json"):
    open_adapter(path, shapes())


def test_folders_for_its_converter_have_one_rank_and_no_patterns(tmp_path):
  loras = draw()
  like = {name: np.empty(shape) for name, shape in shapes().items()}
  save_peft(tmp_path, loras, like=like, profile=LLAMACPP)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert "rank_pattern" not in config
  assert "alpha_pattern" not in config
  assert config["r"] == config["lora_alpha"] == 5
  found = open_adapter(tmp_path)
  for name, lora in loras.items():
    change = product(found[name.removesuffix(".weight")])
    np.testing.assert_allclose(change, product(lora), rtol=1e-4, atol=1e-5)
