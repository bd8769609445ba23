# SPDX-License-Identifier: Apache-2.0
"""The ledger on random pairs of checkpoints: every tensor exactly once."""

import collections
import io
import tempfile
from unittest import mock

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.extraction import run
from tests.helpers.small_pairs import (
  adapter_tensors,
  draw,
  shared_extractor,
  write_pair,
)

LAYER = "model.layers.0"
# Few shapes of matrices, as each is compiled once.
SHAPES = {
  "model.embed_tokens.weight": (9, 8),
  "lm_head.weight": (9, 8),
  f"{LAYER}.self_attn.q_proj.weight": (8, 8),
  f"{LAYER}.self_attn.q_proj.bias": (8,),
  f"{LAYER}.norm.weight": (8,),
  f"{LAYER}.norm.bias": (8,),
  f"{LAYER}.bn.num_batches_tracked": (),
  f"{LAYER}.codes.weight": (8, 8),
  "rotary.inv_freq": (4,),
}
DTYPES = {
  f"{LAYER}.bn.num_batches_tracked": np.int64,
  f"{LAYER}.codes.weight": np.int8,
}
FATES = ("same", "changed", "base", "finetuned")


def values(name, seed):
  return (100 * draw(*SHAPES[name], seed=seed)).astype(
    DTYPES.get(name, np.float32)
  )


@st.composite
def pairs(draw_):
  """Two checkpoints that share at least one changed matrix."""
  prefix = draw_(st.sampled_from(["", "language_model."]))
  grown = draw_(st.sampled_from([0, 2]))
  base = {"model.anchor.weight": draw(8, 8)}
  finetuned = {prefix + "model.anchor.weight": draw(8, 8, seed=1)}
  for seed, name in enumerate(SHAPES):
    fate = draw_(st.sampled_from(FATES))
    if fate != "finetuned":
      base[name] = values(name, seed)
    if fate != "base":
      value = values(name, seed + 50 * (fate == "changed"))
      if name == "model.embed_tokens.weight":
        value = np.concatenate([value, draw(grown, 8)])
      finetuned[prefix + name] = value
  for side, at in ((base, ""), (finetuned, prefix)):
    form = draw_(st.sampled_from(EXPERTS))
    side.update({at + name: value for name, value in form(len(at)).items()})
  return tuple(in_dtypes(side, draw_) for side in (base, finetuned))


def no_experts(_):
  return {}


def separate_experts(seed):
  """Two experts as six tensors; the seed moves one of them."""
  return {
    f"{LAYER}.mlp.experts.{i}.{name}.weight": draw(8, 8, seed=20 + i)
    + np.float32(seed * (name == "up_proj"))
    for i in range(2)
    for name in ("gate_proj", "up_proj", "down_proj")
  }


def fused_experts(seed):
  """The same experts as two tensors."""
  one = separate_experts(seed)
  name = f"{LAYER}.mlp.experts"
  stack = lambda part: np.stack(  # noqa: E731
    [one[f"{name}.{i}.{part}.weight"] for i in range(2)]
  )
  both = np.concatenate([stack("gate_proj"), stack("up_proj")], axis=1)
  return {f"{name}.gate_up_proj": both, f"{name}.down_proj": stack("down_proj")}


EXPERTS = (no_experts, separate_experts, fused_experts)


def in_dtypes(tensors, draw_):
  """A checkpoint's float32 tensors in one dtype or another."""
  dtype = draw_(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
  return {
    name: x.astype(dtype) if x.dtype == np.float32 else x
    for name, x in tensors.items()
  }


@settings(max_examples=25, deadline=None)
@given(pairs())
def test_every_tensor_of_both_is_in_one_row(pair):
  base, finetuned = pair
  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(run, "Extractor", shared_extractor),
  ):
    report = run.extract_checkpoint(
      *write_pair(folder, base, finetuned),
      f"{folder}/out",
      rank=2,
      allow_unmatched=True,  # half of the names are on one side only
      log=io.StringIO(),
    )
    stored = adapter_tensors(f"{folder}/out")
  for side, tensors in (("base", base), ("finetuned", finetuned)):
    named = collections.Counter(n for row in report.ledger for n in row[side])
    assert named == collections.Counter(list(tensors))
  for row in report.ledger:
    check_row(row, base, finetuned, stored)


def check_row(row, base, finetuned, stored):
  """A row's status is what really became of its tensors."""
  left = [base[name] for name in row["base"]]
  right = [finetuned[name] for name in row["finetuned"]]
  if row["status"] == "unchanged":
    if "experts" in row["base"][0]:  # cut otherwise on the other side
      one, two = (
        np.sort(np.concatenate([np.float32(x).ravel() for x in side]))
        for side in (left, right)
      )
      np.testing.assert_array_equal(one, two)
    else:  # a tie puts three tensors in a row
      assert all(np.array_equal(x, left[0]) for x in left + right)
  elif row["status"] == "extracted":
    modules = {name.rpartition(".lora_")[0] for name in stored}
    # An untied head bears the finetune's name without its wrapper's prefix.
    names = row["base"] + row["finetuned"]
    names += [name.removeprefix("language_model.") for name in names]
    if "experts" in names[0]:  # named by PEFT's rules for fused parameters
      assert any("experts" in name for name in modules)
    else:
      assert any(name.removesuffix(".weight") in modules for name in names)
  elif row["status"] == "kept whole":
    carried = [stored.get(name) for name in row["base"]]
    bias = stored.get(row["base"][0].removesuffix("bias") + "lora_B.bias")
    whole = any(
      value is not None and np.array_equal(value, x)
      for value in carried
      for x in right
    )
    if not whole:
      # In float32, as the bias is: a float16 difference would be rounded.
      change = np.float32(right[0]) - np.float32(left[0])
      np.testing.assert_allclose(bias, change, rtol=1e-6, atol=1e-4)
  else:
    is_buffer = row["status"] == "no parameter"
    ends = ("inv_freq", "num_batches_tracked")
    assert is_buffer == (row["base"] + row["finetuned"])[0].endswith(ends)
    assert row["why"]
