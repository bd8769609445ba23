# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints: one rounding, the rest unchanged, whole or not there."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.merged import save_merged
from jlora.checkpoints.safetensors import write_safetensors
from jlora.loras import Lora, dense

BF16 = ml_dtypes.bfloat16


@pytest.fixture
def base(tmp_path):
  """A folder in bfloat16 with a companion file and an index's worth of rest."""
  rng = np.random.default_rng(0)
  folder = tmp_path / "base"
  folder.mkdir()
  tensors = {
    "model.embed_tokens.weight": rng.normal(size=(7, 4)).astype(BF16),
    "model.layers.0.q_proj.weight": rng.normal(size=(6, 4)).astype(BF16),
    "model.layers.0.q_proj.bias": rng.normal(size=6).astype(BF16),
    "model.norm.weight": np.ones(4, BF16),
    "counter": np.arange(3),
  }
  write_safetensors(folder / "model.safetensors", tensors)
  config = {"model_type": "llama", "vocab_size": 7, "torch_dtype": "bfloat16"}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "tokenizer.json").write_text("{}")
  (folder / "optimizer.pt").write_bytes(b"")
  return open_checkpoint(folder / "model.safetensors"), folder


def lora_of(in_, out, rank=2):
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=(rank, in_)), rng.normal(size=(rank, out))
  return Lora(jnp.float32(a), jnp.float32(b), jnp.float32(0.5))


def test_changes_are_added_in_float32_and_rounded_once(base, tmp_path):
  base, folder = open_checkpoint(base[1]), tmp_path / "merged"
  name = "model.layers.0.q_proj.weight"
  table = "model.embed_tokens.weight"
  loras = {name: lora_of(4, 6), table: lora_of(7, 4)}
  bias = {"model.layers.0.q_proj.bias": np.full(6, 0.1, np.float32)}
  norm = {"model.norm.weight": np.full(4, 3, BF16)}
  save_merged(folder, base, loras, biases=bias, full=norm, max_shard_bytes=80)
  merged = open_checkpoint(folder)
  assert list(folder.glob("model-*.safetensors"))
  changes = {
    name: np.asarray(dense(loras[name])).T,
    table: np.asarray(dense(loras[table])),
    **bias,
    "model.norm.weight": np.full(4, 2, np.float32),
    "counter": 0,
  }
  assert merged.keys() == base.keys()
  for path, change in changes.items():
    expected = (base[path].astype(np.float32) + change).astype(base[path].dtype)
    np.testing.assert_array_equal(merged[path], expected)
    assert merged[path].dtype == base[path].dtype


def test_companions_come_along_and_pickles_do_not(base, tmp_path):
  save_merged(tmp_path / "merged", open_checkpoint(base[1]), {})
  names = {file.name for file in (tmp_path / "merged").iterdir()}
  assert {"config.json", "tokenizer.json"} < names
  assert "optimizer.pt" not in names
  assert not list(tmp_path.glob(".*"))


def test_another_dtype_and_a_longer_vocabulary_reach_the_config(base, tmp_path):
  table = {"model.embed_tokens.weight": np.ones((9, 4), np.float32)}
  save_merged(
    tmp_path / "merged",
    open_checkpoint(base[1]),
    {},
    full=table,
    dtype=np.float32,
  )
  config = json.loads((tmp_path / "merged" / "config.json").read_text())
  assert config["vocab_size"] == 9
  assert config["torch_dtype"] == "float32"
  merged = open_checkpoint(tmp_path / "merged")
  assert merged["model.embed_tokens.weight"].shape == (9, 4)
  assert merged["counter"].dtype == np.int64


def test_float8_weights_become_bfloat16(tmp_path):
  codes = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
  scale = np.full((1, 1), 0.5, np.float32)
  (tmp_path / "base").mkdir()
  write_safetensors(
    tmp_path / "base" / "model.safetensors",
    {"h.q.weight": codes, "h.q.weight_scale_inv": scale},
  )
  config = {"quantization_config": {"quant_method": "fp8"}}
  (tmp_path / "base" / "config.json").write_text(json.dumps(config))
  base = open_checkpoint(tmp_path / "base")
  lora = lora_of(4, 4)
  save_merged(tmp_path / "merged", base, {"h.q.weight": lora})
  merged = open_checkpoint(tmp_path / "merged")
  expected = (0.5 + np.asarray(dense(lora)).T).astype(BF16)
  np.testing.assert_array_equal(merged["h.q.weight"], expected)
  assert list(merged) == ["h.q.weight"]
  assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"loras": {"nowhere.weight": lora_of(4, 6)}}, "does not have: nowhere"),
    ({"loras": {"model.layers.0.q_proj.weight": lora_of(6, 4)}}, "do not fit"),
    ({"biases": {"model.layers.0.q_proj.bias": np.ones(5)}}, "do not fit"),
    ({"full": {"nowhere": np.ones(5)}}, "does not have: nowhere"),
    ({"full": {"model.layers.0.q_proj.bias": [1.0] * 4}}, "no arrays: model"),
    ({"biases": {"model.layers.0.q_proj.bias": [1.0] * 4}}, "no arrays: model"),
  ],
)
def test_what_does_not_fit_is_refused_before_writing(
  changes, message, base, tmp_path
):
  changes = {"loras": {}} | changes
  with pytest.raises(ValueError, match=message):
    save_merged(tmp_path / "merged", open_checkpoint(base[1]), **changes)
  assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_nothing_is_left_of_a_merge_that_failed(base, tmp_path):
  class Breaks(dict):
    reads = 0

    def __getitem__(self, key):
      self.reads += 1
      if self.reads > 1:
        raise OSError("gone")
      return super().__getitem__(key)

    def items(self):
      return ((key, self[key]) for key in self)

  loras = Breaks({"model.layers.0.q_proj.weight": lora_of(4, 6)})
  with pytest.raises(OSError, match="gone"):
    save_merged(tmp_path / "merged", open_checkpoint(base[1]), loras)
  assert [file.name for file in tmp_path.iterdir()] == ["base"]
  with pytest.raises(ValueError, match="exists"):
    save_merged(base[1], open_checkpoint(base[1]), {})


K = "h.q.weight"
ONE = Lora(jnp.ones((1, 4)), jnp.ones((1, 4)), jnp.float32(1))


def scaled(scale):
  return Lora(ONE.a, ONE.b, jnp.float32(scale))


@pytest.mark.parametrize(
  ("base", "change", "options", "said"),
  [
    (
      np.full((4, 4), 6e4, "f2"),
      scaled(1e4),
      {},
      "16 of 16 values, up to 7e+04",
    ),
    (np.ones((4, 4), "f4"), scaled(np.nan), {}, "16 of 16 values are NaN"),
    (
      np.ones((4, 4), "f4"),
      scaled(1e5),
      {"dtype": "float16"},
      "more than float16",
    ),
    (np.full((4, 4), 3e38, BF16), scaled(3e38), {}, "are NaN or infinite"),
    (np.full((4, 4), np.nan, "f4"), ONE, {}, "16 of 16 values are NaN"),
    (np.full((4, 4), 100, "i1"), scaled(100), {}, f"{K}: int8"),
    (np.ones((4, 4), "u1"), scaled(0.5), {}, f"{K}: uint8"),
    (np.ones((4, 4), "?"), ONE, {}, f"{K}: bool"),
  ],
)
def test_nothing_is_written_that_is_not_finite_or_wraps_around(
  base, change, options, said, tmp_path
):
  write_safetensors(tmp_path / "b.safetensors", {K: base})
  opened = open_checkpoint(tmp_path / "b.safetensors")
  with pytest.raises(ValueError, match=re.escape(said)) as told:
    save_merged(tmp_path / "m", opened, {K: change}, **options)
  assert K in str(told.value)
  assert [file.name for file in tmp_path.iterdir()] == ["b.safetensors"]


def test_other_values_of_integers_are_refused_and_integers_taken(tmp_path):
  write_safetensors(
    tmp_path / "b.safetensors", {"n": np.arange(3), K: np.eye(4)}
  )
  base = open_checkpoint(tmp_path / "b.safetensors")
  with pytest.raises(ValueError, match="n: int64"):
    save_merged(tmp_path / "m", base, {}, full={"n": np.ones(3)})
  with pytest.raises(ValueError, match="n: int64"):
    save_merged(tmp_path / "m", base, {}, biases={"n": np.ones(3)})
  save_merged(tmp_path / "m", base, {}, full={"n": np.arange(3) + 4})
  assert open_checkpoint(tmp_path / "m")["n"].tolist() == [4, 5, 6]


def test_infinities_of_the_base_stay_and_none_are_added(tmp_path):
  mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
  tensors = {"h.mask": mask, K: np.eye(4, dtype="f4")}
  write_safetensors(tmp_path / "b.safetensors", tensors)
  base = open_checkpoint(tmp_path / "b.safetensors")
  save_merged(tmp_path / "m", base, {K: ONE}, dtype="float16")
  merged = open_checkpoint(tmp_path / "m")["h.mask"]
  np.testing.assert_array_equal(merged, mask.astype("f2"))
  write_safetensors(
    tmp_path / "b.safetensors", {**tensors, "w": mask[:1, :1] + 1e5}
  )
  base = open_checkpoint(tmp_path / "b.safetensors")
  with pytest.raises(ValueError, match="w: 1 of 1 values, up to 1e\\+05"):
    save_merged(tmp_path / "n", base, {K: ONE}, dtype="float16")


def test_a_sum_of_float64_is_float64(tmp_path):
  w = np.full((4, 4), 1 + 1e-12)
  write_safetensors(tmp_path / "b.safetensors", {K: w, "b": w[0]})
  base = open_checkpoint(tmp_path / "b.safetensors")
  bias = {"b": np.full(4, 2**-60)}
  save_merged(tmp_path / "m", base, {K: scaled(2**-40)}, biases=bias)
  merged = open_checkpoint(tmp_path / "m")
  np.testing.assert_array_equal(merged[K], w + 2**-40)
  np.testing.assert_array_equal(merged["b"], w[0] + 2**-60)


def test_integers_take_no_changes_and_floats_no_integers(tmp_path):
  """A change of a new value too; and what bfloat16 would round in silence."""
  write_safetensors(
    tmp_path / "b.safetensors", {"n": np.arange(4), K: np.eye(4, dtype=BF16)}
  )
  base = open_checkpoint(tmp_path / "b.safetensors")
  new, half = {"n": np.arange(4) + 4}, {"n": np.full(4, 0.5, np.float32)}
  with pytest.raises(ValueError, match="n: int64"):
    save_merged(tmp_path / "m", base, {}, full=new, biases=half)
  large = {K: np.full((4, 4), 2**24 + 1, np.int32)}
  with pytest.raises(ValueError, match=f"{K}: bfloat16, the new value int32"):
    save_merged(tmp_path / "m", base, {}, full=large)
  assert [file.name for file in tmp_path.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("shape", [(4,), (6, 5), (6, 4, 1)])
def test_a_new_value_has_the_shape_but_for_rows(base, tmp_path, shape):
  name = "model.layers.0.q_proj.weight"
  full = {name: np.ones(shape, np.float32)}
  with pytest.raises(ValueError, match=f"{name}: new value .*the base that"):
    save_merged(tmp_path / "merged", open_checkpoint(base[1]), {}, full=full)


def test_only_tables_change_the_number_of_tokens(base, tmp_path):
  """Wherever config.json has it; and no other number there."""
  _, folder = base
  config = {"vocab_size": 5, "text_config": {"vocab_size": 7, "dtype": "x"}}
  (folder / "config.json").write_text(json.dumps(config))
  rows = {
    "model.embed_tokens.weight": np.ones((9, 4), BF16),
    "model.layers.0.q_proj.weight": np.ones((8, 4), BF16),
  }
  base = open_checkpoint(folder)
  save_merged(tmp_path / "merged", base, {}, full=rows, dtype="float16")
  found = json.loads((tmp_path / "merged" / "config.json").read_text())
  text = {"vocab_size": 9, "dtype": "float16"}
  assert found == {"vocab_size": 5, "text_config": text}
  (folder / "config.json").write_text('{"vocab_size": 5}')
  with pytest.raises(ValueError, match="vocab_size is 5, but tables have 7"):
    save_merged(tmp_path / "other", base, {}, full=rows)
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
  "dtype", ["int8", np.int64, bool, "float8_e4m3fn", "complex64", "floot", 3]
)
def test_a_dtype_that_holds_no_floats_as_they_are_is_refused(tmp_path, dtype):
  """Integers would cut them off, and codes of float8 mean nothing alone."""
  write_safetensors(tmp_path / "b.safetensors", {K: np.eye(4, dtype="f4")})
  base = open_checkpoint(tmp_path / "b.safetensors")
  with pytest.raises(ValueError, match="dtype is .*; give bfloat16, float16"):
    save_merged(tmp_path / "m", base, {}, dtype=dtype)
  assert [file.name for file in tmp_path.iterdir()] == ["b.safetensors"]
