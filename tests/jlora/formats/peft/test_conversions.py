# SPDX-License-Identifier: Apache-2.0
"""Loras of tensors that transformers stacks, cuts or joins on loading."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open as open_file

from jlora.formats import VLLM, load_peft, save_peft
from jlora.formats.peft.conversions import (
  Conversion,
  convert_base,
  convert_full,
  convert_loras,
  find_conversions,
  revert_full,
  revert_loras,
  spread_reasons,
)
from jlora.formats.peft.families import KNOWN_CONVERSIONS
from jlora.formats.peft.parts import describe_base
from jlora.loras import Lora

EXPERTS, INNER, WIDTH = 3, 5, 4
MOE = {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]}
CUT = {"model_type": "tipsv2", "architectures": ["Tipsv2Model"]}
IN_LAYER = "model.layers.0.block_sparse_moe.experts"
FUSED = "model.layers.0.mlp.experts"


def moe_like():
  shapes = {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}
  names = {
    f"{IN_LAYER}.{e}.{leaf}.weight": np.zeros(shape, np.float32)
    for e in range(EXPERTS)
    for leaf, shape in shapes.items()
  }
  return names | {
    "model.layers.0.self_attn.q_proj.weight": np.zeros((WIDTH, WIDTH))
  }


def lora_of(shape, rank, seed, scale=1.0):
  out, in_ = shape
  draw = np.random.default_rng(seed).standard_normal
  return Lora(
    np.float32(draw((rank, in_))),
    np.float32(draw((rank, out))),
    np.float32(scale),
  )


def change_of(lora):
  """The change (..., out, in) of a Lora."""
  scale = np.asarray(lora.scale)[..., None, None]
  return scale * np.einsum("...ro,...ri->...oi", lora.b, lora.a)


def base_of(like, config):
  return describe_base(like, None, None, None, config)


def fused_loras(loras, like, config=MOE):
  base = base_of(like, config)
  left = {}
  found = convert_loras(loras, find_conversions(base), base, left)
  return {path: found[path] for path in found}, left


@settings(max_examples=20, deadline=None)
@given(
  st.lists(st.integers(0, 3), min_size=9, max_size=9),
  st.integers(0, 2**31),
)
def test_stacks_of_any_ranks_hold_the_changes_of_their_experts(ranks, seed):
  like = moe_like()
  names = [name for name in like if "experts" in name]
  loras = {
    name: lora_of(like[name].shape, rank, seed + at, 1 + at % 2)
    for at, (name, rank) in enumerate(zip(names, ranks, strict=True))
    if rank
  }
  found, left = fused_loras(loras, like)
  assert not left
  for target, parts in (("gate_up_proj", ["w1", "w3"]), ("down_proj", ["w2"])):
    rows = [
      np.concatenate(
        [
          change_of(loras[name])
          if name in loras
          else np.zeros(like[name].shape)
          for name in (f"{IN_LAYER}.{e}.{part}.weight" for part in parts)
        ]
      )
      for e in range(EXPERTS)
    ]
    if any(f".{part}." in name for name in loras for part in parts):
      got = change_of(found[f"{FUSED}.{target}"])
      np.testing.assert_allclose(got, np.stack(rows), atol=1e-5)
    else:
      assert f"{FUSED}.{target}" not in found
  base = base_of(like, MOE)
  back = revert_loras(found, find_conversions(base), base)
  assert back.keys() == loras.keys()
  for name, lora in back.items():
    assert len(lora.a) <= len(loras[name].a)
    np.testing.assert_allclose(
      change_of(lora), change_of(loras[name]), atol=1e-5
    )


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_cut_tensor_shares_its_first_factor(scale):
  like = {"qkv.weight": np.zeros((6, 4))}
  each = Conversion(
    ("q.weight", "k.weight", "v.weight"), (("qkv.weight",),), (("Chunk", 0),)
  )
  whole = lora_of((6, 4), 2, 0, scale)
  base = base_of(like, None)
  found = convert_loras({"qkv.weight": whole}, [each], base, {})
  rows = [change_of(found[name]) for name in each.parameters]
  np.testing.assert_allclose(np.concatenate(rows), change_of(whole), atol=1e-6)
  assert all(found[name].a is whole.a for name in each.parameters)
  assert convert_base(base, [each]).shapes["k.weight"] == (2, 4)


GROUPED = {"model_type": "sarvam_moe", "architectures": ["Glm4MoeForCausalLM"]}
ATTENTION = "model.layers.0.attention"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_unequal_parts_are_as_high_as_what_reads_them(
  groups, keys, size, is_big
):
  """Queries have as many rows as the output projection has columns."""
  heights = [groups * keys * size, keys * size, keys * size]
  path = f"{ATTENTION}.query_key_value.weight"
  like = {
    path: np.zeros((sum(heights), 4)),
    f"{ATTENTION}.dense.weight": np.zeros((4, heights[0])),
  }
  base = base_of(like, GROUPED)
  (each,) = find_conversions(base)
  whole = lora_of(like[path].shape, 2, 0, 1.5)
  found, left = fused_loras({path: whole}, like, GROUPED)
  assert not left
  parts = [found[name] for name in each.parameters]
  assert [part.b.shape[-1] for part in parts] == heights
  rows = np.concatenate([change_of(part) for part in parts])
  np.testing.assert_allclose(rows, change_of(whole), atol=1e-6)
  shapes = convert_base(base, [each]).shapes
  assert [shapes[name][0] for name in each.parameters] == heights
  lost = each.parameters[-1] if is_big else each.parameters[0]
  some = {name: lora for name, lora in found.items() if name != lost}
  back = change_of(revert_loras(some, [each], base)[path])
  at = slice(-heights[-1], None) if is_big else slice(heights[0])
  assert not back[at].any()
  want = change_of(whole)
  want[at] = 0
  np.testing.assert_allclose(back, want, atol=1e-6)
  full = {path: np.arange(float(like[path].size)).reshape(like[path].shape)}
  parted = convert_full(full, {}, [each], base, {})
  np.testing.assert_array_equal(
    revert_full(dict(parted), [each], base)[path], full[path]
  )


@pytest.mark.parametrize("columns", [7, 8, None])
def test_parts_whose_heights_nothing_tells_are_in_the_ledger(columns):
  path = f"{ATTENTION}.query_key_value.weight"
  like = {path: np.zeros((8, 4))}
  if columns:
    like[f"{ATTENTION}.dense.weight"] = np.zeros((4, columns))
  assert not find_conversions(base_of(like, GROUPED))
  found, left = fused_loras({path: lora_of((8, 4), 2, 0)}, like, GROUPED)
  assert not found
  assert "and PEFT not its LoRA" in left[path]


def test_an_adapter_of_cut_tensors_is_read_back(tmp_path):
  path = "text_encoder.transformer.resblocks.0.attn.in_proj_weight"
  like = {path: np.zeros((12, 4))}
  assert find_conversions(base_of(like, CUT))
  lora = lora_of((12, 4), 2, 3)
  left = save_peft(tmp_path / "out", {path: lora}, like=like, config=CUT)
  assert not left
  back = load_peft(tmp_path / "out", like=like, config=CUT)
  assert back.loras.keys() == {path}
  np.testing.assert_allclose(
    change_of(back.loras[path]), change_of(lora), atol=1e-6
  )


def test_whole_tensors_are_made_and_parted():
  like = moe_like()
  base = base_of(like, MOE)
  draw = np.random.default_rng(0).standard_normal
  full = {name: draw(leaf.shape) for name, leaf in like.items()}
  left = {}
  found = convert_full(full, {}, find_conversions(base), base, left)
  stacked = found[f"{FUSED}.gate_up_proj"]
  assert not left
  assert stacked.shape == (EXPERTS, 2 * INNER, WIDTH)
  second = full[f"{IN_LAYER}.1.w3.weight"]
  np.testing.assert_array_equal(stacked[1, INNER:], second)
  back = revert_full(dict(found), find_conversions(base), base)
  assert back.keys() == full.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value, full[name])


def test_what_is_not_whole_is_said():
  like = moe_like()
  base = base_of(like, MOE)
  one, other = (f"{IN_LAYER}.{e}.w2.weight" for e in range(2))
  found, left = find_conversions(base), {}
  assert not dict(convert_full({one: 0}, {}, found, base, left))
  assert "give them all" in left[one]
  convert_full({one: 0}, {other: 0}, found, base, left)
  assert "others that have Loras" in left[one]


def test_an_expert_that_is_not_there_leaves_all_in_the_ledger():
  like = moe_like()
  lost = f"{IN_LAYER}.1.w1.weight"
  del like[lost]
  loras = {
    name: lora_of(leaf.shape, 1, 0)
    for name, leaf in like.items()
    if "experts" in name
  }
  found, left = fused_loras(loras, like)
  assert found.keys() == {f"{FUSED}.down_proj"}
  assert {name.split(".")[-2] for name in left} == {"w1", "w3"}
  assert all("gate_up_proj" in reason for reason in left.values())


def test_a_consumer_that_does_not_load_with_transformers_gets_them_apart(
  tmp_path,
):
  like = moe_like()
  loras = {n: lora_of(leaf.shape, 1, 0) for n, leaf in like.items()}
  left = save_peft(tmp_path / "out", loras, like=like, config=MOE, profile=VLLM)
  assert not left
  with open_file(tmp_path / "out/adapter_model.safetensors", "np") as file:
    names = {key.partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
  prefix = "base_model.model."
  # vLLM has no class of this name: it runs transformers' own
  assert names == {
    prefix + name.replace("block_sparse_moe", "mlp").removesuffix(".weight")
    for name in like
  }


def test_reasons_of_a_parameter_are_those_of_its_tensors():
  each = Conversion(("q", "k"), (("qk",),), (("Chunk", 0),))
  left = {"q": "because", "other": "why"}
  spread_reasons(left, [each], ["qk"])
  assert left == {"qk": "q: because", "other": "why"}


def test_every_known_conversion_is_one_of_transformers():
  from experiments import collect_families

  facts = collect_families.FILE.read_text()
  for operations in KNOWN_CONVERSIONS:
    text = ",".join(f'["{name}",{axis}]' for name, axis in operations)
    assert f"[{text}]" in facts
