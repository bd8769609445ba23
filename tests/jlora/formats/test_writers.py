# SPDX-License-Identifier: Apache-2.0
"""Every writer, then the one reader: the same change, and the same bytes."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.formats import (
  attention_layers,
  kohya_layers,
  linear_layers,
  names,
  open_adapter,
  save_comfy,
  save_diffusers,
  save_kohya,
  save_mlx,
)
from jlora.formats.joining import cut, join
from jlora.formats.storing import balanced
from jlora.loras import Lora
from tests.helpers.image_adapters import FAMILIES, D, clip, draw, product

HALF = np.float16
WRITERS = {
  "diffusers": save_diffusers,
  "kohya": save_kohya,
  "comfy": save_comfy,
}
LLAMA = {f"model.layers.{i}.{name}": (D, D + 1) for i in range(3)
         for name in ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip


def save_mlx_of_llama(path, loras, *, like, dtype):
  config = {"model_type": "llama", "num_hidden_layers": 3}
  return save_mlx(path, loras, config=config, like=like, dtype=dtype)


NETWORKS = [name for name in FAMILIES if names.FAMILIES[name].network]
WRITTEN = [(writer, family) for writer in WRITERS for family in FAMILIES
           if writer != "kohya" or family in NETWORKS]  # fmt: skip
CONFORMING = [
  *((WRITERS[writer], FAMILIES[family]) for writer, family in WRITTEN),
  (save_mlx_of_llama, LLAMA),
]
CASES = [f"{x}-{y}" for x, y in WRITTEN] + ["mlx-llama"]
ROUNDING = {HALF: 2e-3, ml_dtypes.bfloat16: 2e-2, np.float32: 1e-6}


def differs(found, want):
  return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize(("writer", "shapes"), CONFORMING, ids=CASES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: np.dtype(d).name)
def test_what_is_written_is_read_as_the_same_change(
  writer, shapes, dtype, tmp_path
):
  # mlx-lm has one rank.
  loras = draw(shapes, scale=1.7, ranks=(2,) if shapes is LLAMA else (2, 3))
  path = tmp_path / "x.safetensors"
  left = writer(path, loras, like=shapes, dtype=dtype)
  assert left == {}
  for base in (None, shapes):
    adapter = open_adapter(path, base)
    assert set(adapter) == set(loras)
    assert adapter.shapes == shapes
    for module, lora in loras.items():
      found = adapter[module]
      assert found.a.dtype == found.b.dtype == dtype
      assert found.rank == lora.rank
      assert differs(product(found), product(lora)) < ROUNDING[dtype]


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_the_file_alone_tells_the_family(family, tmp_path):
  shapes = FAMILIES[family]
  path = tmp_path / "x.safetensors"
  save_kohya(path, draw(shapes), like=shapes)
  assert open_adapter(path).family == family


def parts_of(module, family):
  """How many modules of diffusers the original has as one."""
  found = names.find_ours(module.partition(".")[2], names.FAMILIES[family].rows)
  return len(found.row.ours) if found else 1


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("one_alpha", [True, False])
def test_kohya_to_diffusers_to_kohya_is_the_same_bytes(
  family, one_alpha, tmp_path
):
  shapes = FAMILIES[family]
  # With one alpha for all, bytes are kept where the ranks are the same.
  loras = draw(shapes, ranks=(2,) if one_alpha else (2, 3), scale=0.3)
  first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
  if one_alpha and family not in ("z-image", "qwen-image"):
    # What is joined has a rank of its own.
    shapes = {m: s for m, s in shapes.items() if parts_of(m, family) == 1}
    loras = {m: loras[m] for m in shapes}
  how = {"family": family, "one_alpha": one_alpha}
  save_kohya(first, loras, like=shapes, **how)
  save_diffusers(second, open_adapter(first))
  save_kohya(third, open_adapter(second), **how)
  assert first.read_bytes() == third.read_bytes()


def test_a_file_of_another_tool_keeps_its_bytes(tmp_path):
  """Its factors are far from balanced; nothing is rounded, so they stay."""
  rng, stem = (
    np.random.default_rng(0),
    "lora_unet_mid_block_attentions_0_proj_in",
  )
  tensors = {
    f"{stem}.lora_down.weight": 30 * rng.standard_normal((2, D)),
    f"{stem}.lora_up.weight": 0.01 * rng.standard_normal((D, 2)),
    f"{stem}.alpha": np.array(2),
  }
  halves = {key: np.asarray(x, HALF) for key, x in tensors.items()}
  first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
  write_safetensors(first, halves)
  save_diffusers(second, open_adapter(first))
  save_kohya(third, open_adapter(second), family="sd1")
  found = load_file(third)
  assert found.keys() == halves.keys()
  for key, x in halves.items():
    assert found[key].tobytes() == x.tobytes()


def test_ranks_that_differ_have_one_alpha_or_their_own(tmp_path):
  shapes = FAMILIES["sd1"]
  loras = draw(shapes, ranks=(2, 4, 5))
  for one_alpha, want in ((True, {5.0}), (False, {2.0, 4.0, 5.0})):
    path = tmp_path / f"{one_alpha}.safetensors"
    save_kohya(path, loras, like=shapes, one_alpha=one_alpha, dtype=np.float32)
    adapter = open_adapter(path)
    assert set(adapter.alphas.values()) == want
    assert adapter.metadata["ss_network_dim"] == "Dynamic"
    worst = max(
      differs(product(adapter[m]), product(lora)) for m, lora in loras.items()
    )
    assert worst < 1e-6


def test_alpha_is_exact_also_where_the_dtype_would_round_it(tmp_path):
  shapes = {"unet.mid_block.attentions.0.proj_in": (600, 600)}
  loras = draw(shapes, ranks=(257,))
  path = tmp_path / "x.safetensors"
  save_kohya(path, loras, like=shapes, family="sdxl", dtype=ml_dtypes.bfloat16)
  (module,) = loras
  assert float(open_adapter(path)[module].scale) == 1.0
  key = "lora_unet_middle_block_1_proj_in.alpha"
  assert open_checkpoint(path)[key].shape == ()


def keys_of(path):
  return {key: tuple(x.shape) for key, x in load_file(path).items()}


def test_keys_and_shapes_are_those_of_the_formats(tmp_path):
  shapes = {"unet.down_blocks.0.resnets.0.conv1": (6, 4, 3, 3)}
  loras = draw(shapes)
  path = tmp_path / "x.safetensors"
  stem = "unet.down_blocks.0.resnets.0.conv1"
  save_diffusers(path, loras, like=shapes)
  assert keys_of(path) == {
    f"{stem}.lora_A.weight": (2, 4, 3, 3),
    f"{stem}.lora_B.weight": (6, 2, 1, 1),
  }
  save_kohya(path, loras, like=shapes, family="sdxl")
  stem = "lora_unet_input_blocks_1_0_in_layers_2"
  assert keys_of(path) == {
    f"{stem}.lora_down.weight": (2, 4, 3, 3),
    f"{stem}.lora_up.weight": (6, 2, 1, 1),
    f"{stem}.alpha": (),
  }
  save_comfy(path, loras, like=shapes, family="sdxl")
  stem = "diffusion_model.input_blocks.1.0.in_layers.2"
  assert keys_of(path) == {
    f"{stem}.lora_A.weight": (2, 4, 3, 3),
    f"{stem}.lora_B.weight": (6, 2, 1, 1),
  }


def test_metadata_says_what_readers_look_for(tmp_path):
  shapes = FAMILIES["sdxl"]
  path = tmp_path / "x.safetensors"
  save_kohya(path, draw(shapes, ranks=(3,)), like=shapes,
             metadata={"modelspec.title": "mine"})  # fmt: skip
  found = open_checkpoint(path).metadata
  assert found["ss_network_module"] == "networks.lora"
  assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "3")
  assert json.loads(found["ss_network_args"]) == {
    "conv_dim": "3", "conv_alpha": "3"}  # fmt: skip
  assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
  assert found["modelspec.title"] == "mine"


def test_text_encoders_have_the_prefixes_of_their_family(tmp_path):
  module = "encoder.layers.0.mlp.fc1"  # as transformers 5 names it
  names = [f"text_encoder.{module}", f"text_encoder_2.{module}"]
  loras = draw(dict.fromkeys(names, (D, D)))
  path = tmp_path / "x.safetensors"
  with pytest.raises(ValueError, match="can be of sdxl, flux, sd3; say which"):
    save_kohya(path, loras)
  save_kohya(path, loras, family="sdxl")
  stems = {key.partition(".")[0] for key in load_file(path)}
  tail = "text_model_encoder_layers_0_mlp_fc1"
  assert stems == {f"lora_te1_{tail}", f"lora_te2_{tail}"}
  save_comfy(path, loras, family="sd3")
  stems = {key.rpartition(".lora")[0] for key in load_file(path)}
  assert stems == {f"text_encoders.clip_{x}.transformer.text_model.{module}"
                   for x in "lg"}  # fmt: skip


def test_nothing_is_clamped_and_what_does_not_fit_is_an_error(tmp_path):
  shapes = {"unet.conv_in": (2, 3)}
  big = Lora(
    np.full((1, 3), 1e6, "f4"), np.full((1, 2), 1e5, "f4"), np.float32(1)
  )
  with pytest.raises(ValueError, match="more than float16 holds.*bfloat16"):
    save_diffusers(tmp_path, {"unet.conv_in": big}, like=shapes)
  assert list(tmp_path.iterdir()) == []
  save_diffusers(tmp_path, {"unet.conv_in": big}, dtype=ml_dtypes.bfloat16)
  uneven = Lora(
    np.full((1, 3), 1e8, "f4"), np.full((1, 2), 1e-6, "f4"), np.float32(1)
  )
  save_diffusers(tmp_path, {"unet.conv_in": uneven})
  found = open_adapter(tmp_path)["unet.conv_in"]
  assert differs(product(found), product(uneven)) < 1e-3


def test_balancing_changes_no_digit_and_settles():
  loras = draw({"x": (5, 7)}, ranks=(4,))
  a = loras["x"].a * np.float32([[1e-3], [1], [1e4], [0]])
  b = loras["x"].b
  one, other = balanced(a, b)
  np.testing.assert_array_equal(
    one[:, :, None] * other[:, None], a[:, :, None] * b[:, None]
  )
  norms = np.linalg.norm(other[:3], axis=1) / np.linalg.norm(one[:3], axis=1)
  assert np.all((norms > 0.49) & (norms < 2.01))
  again = balanced(one, other)
  np.testing.assert_array_equal(again[0], one)


def test_joined_and_cut_changes_are_exact():
  parts = {f"{i}": (n, 6) for i, n in enumerate((4, 4, 8))}
  loras = list(draw(parts, ranks=(2, 3, 1)).values())
  given = [(lora.a, lora.b.T) for lora in loras]
  a, b = join(given, (4, 4, 8))
  assert a.shape == (6, 6)
  ends = [(0, 4), (4, 8), (8, 16)]
  for (start, stop), (own, tall) in zip(ends, given, strict=True):
    back = cut(a, b, start, stop)
    np.testing.assert_array_equal(back[0], own)
    np.testing.assert_array_equal(back[1], tall)
  shared = [(given[0][0], given[i][1][:, :1].repeat(2, 1)) for i in range(2)]
  a, b = join(shared, (4, 4))
  assert (a.shape, b.shape) == ((2, 6), (8, 2))
  missing = join([None, given[1]], (4, 4))
  assert missing[0].shape == (3, 6)
  assert not missing[1][:4].any()


def test_a_part_without_a_lora_has_rank_0(tmp_path):
  shapes = {m: s for m, s in FAMILIES["flux"].items() if "single" in m}
  module = "transformer.single_transformer_blocks.3.attn.to_k"
  loras = draw({module: shapes[module]})
  path = tmp_path / "x.safetensors"
  save_kohya(path, loras, like=shapes, dtype=np.float32)
  adapter = open_adapter(path)
  assert differs(product(adapter[module]), product(loras[module])) < 1e-6
  assert [lora.rank for lora in adapter.values()] == [0, 2, 0, 0]
  again, third = (tmp_path / f"{i}.safetensors" for i in "ab")
  left = save_diffusers(again, adapter, dtype=np.float32)
  assert set(left.values()) == {"rank 0: no change"}
  save_kohya(third, open_adapter(again), dtype=np.float32, family="flux")
  assert third.read_bytes() == path.read_bytes()


def test_what_a_format_cannot_carry_is_in_the_ledger(tmp_path):
  shapes = {
    "unet.conv_in": (D, 4, 3, 3),
    "text_encoder.text_model.embeddings.token_embedding": (D, D),
    "unet.mid_block.odd": (D, D),
  }
  loras = draw({m: shapes[m] for m in shapes}, ranks=(1,))
  loras["unet.conv_in"] = draw({"x": (D, 4, 3, 3)})["x"]
  shifts = {"unet.conv_norm_out.weight": np.ones(D, "f4"),
            "unet.mid_block.odd.bias": np.ones(D, "f4")}  # fmt: skip
  path = tmp_path / "x.safetensors"
  left = save_diffusers(path, loras, like=shapes, shifts=shifts)
  assert left == {
    "text_encoder.text_model.embeddings.token_embedding":
      "a table of tokens: the format has no LoRA for embeddings",
    "unet.conv_norm_out.weight":
      "diffusers adds LoRAs alone; merge whole changes into a checkpoint",
    "unet.mid_block.odd.bias":
      "diffusers adds biases to all modules with a LoRA or to none, and not "
      "all have one",
  }  # fmt: skip
  left = save_comfy(path, loras, like=shapes, shifts=shifts, family="sdxl")
  no_name = "sdxl has no such module in its table of names"
  assert left == {
    "text_encoder.text_model.embeddings.token_embedding":
      "a table of tokens: the format has no LoRA for embeddings",
    "unet.mid_block.odd": no_name,
    "unet.mid_block.odd.bias": no_name,
  }  # fmt: skip
  assert "diffusion_model.out.0.diff" in load_file(path)
  save_kohya(path, loras, like=shapes, shifts=shifts, family="sdxl")
  assert "lora_unet_out_0.w_norm" in load_file(path)
  assert list(open_adapter(path).shifts) == ["unet.conv_norm_out.weight"]


def test_biases_of_all_modules_are_written_and_read(tmp_path):
  shapes = {
    "unet.conv_in.weight": (D, 4, 3, 3),
    "unet.conv_in.bias": (D,),
    "unet.conv_out.weight": (4, D),
    "unet.conv_out.bias": (4,),
  }
  loras = draw({n: s for n, s in shapes.items() if n.endswith(".weight")})
  shifts = {"unet.conv_in.bias": np.arange(D, dtype="f4")}
  path = tmp_path / "x.safetensors"
  assert save_diffusers(path, loras, like=shapes, shifts=shifts) == {}
  found = open_adapter(path)
  np.testing.assert_array_equal(
    found.shifts["unet.conv_in.bias"], shifts["unet.conv_in.bias"]
  )
  assert not found.shifts["unet.conv_out.bias"].any()
  config = json.loads(found.metadata["lora_adapter_metadata"])
  assert config["unet.lora_bias"] is True


def test_a_joined_bias_holds_every_part(tmp_path):
  shapes = {m: s for m, s in FAMILIES["flux"].items() if "single" not in m}
  prefix = "transformer.transformer_blocks.1.attn"
  shifts = {f"{prefix}.to_{x}.bias": np.full(D, i, "f4")
            for i, x in ((1, "q"), (3, "v"))}  # fmt: skip
  path = tmp_path / "x.safetensors"
  assert save_kohya(path, draw(shapes), like=shapes, shifts=shifts) == {}
  stored = load_file(path)["lora_unet_double_blocks_1_img_attn_qkv.diff_b"]
  np.testing.assert_array_equal(stored, np.repeat([1, 0, 3], D))
  found = open_adapter(path).shifts
  np.testing.assert_array_equal(found[f"{prefix}.to_v.bias"], np.full(D, 3))


def test_layers_are_chosen_by_functions(tmp_path):
  shapes = FAMILIES["sd1"]
  counts = {}
  for select in (attention_layers, linear_layers, kohya_layers):
    path = tmp_path / "x.safetensors"
    left = save_kohya(path, draw(shapes), like=shapes, select=select)
    assert set(left.values()) == {"not among the layers asked for"}
    kept = set(shapes) - set(left)
    counts[select.__name__] = kept
    assert set(open_adapter(path)) == kept
  assert all(
    ".attn" in m or "self_attn" in m for m in counts["attention_layers"]
  )
  assert not [m for m in counts["linear_layers"] if shapes[m][2:] == (3, 3)]
  own = counts["kohya_layers"]
  assert "unet.down_blocks.0.attentions.1.proj_in" in own
  assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in own
  assert not [m for m in own if "resnets" in m or "conv_in" in m]


ONE = {"unet.conv_in": (D, 4)}
WRONG = {
  "none": ({}, {}, "there is no Lora to write"),
  "not in like": (
    draw(ONE), {"like": {"unet.x": (1, 1)}}, "`like` has no unet"),
  "shapes": (draw(ONE), {"like": {"unet.conv_in": (D, 5)}},
             r"for \(4, 8\), the weight reads 5 and writes 8"),
  "a stack": (
    {"unet.conv_in": Lora(np.ones((2, 1, 4)), np.ones((2, 1, D)), np.ones(2))},
    {"like": ONE}, "is a stack"),
  "rank 0": (
    {"unet.conv_in": Lora(np.ones((0, 4)), np.ones((0, D)), np.ones(()))},
    {}, "No module is left to write: unet.conv_in: rank 0"),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_mistakes_are_told_before_anything_is_written(why, tmp_path):
  loras, more, said = WRONG[why]
  with pytest.raises(ValueError, match=said):
    save_diffusers(tmp_path / "x.safetensors", loras, **more)
  assert list(tmp_path.iterdir()) == []


def test_families_that_are_not_known_are_told(tmp_path):
  path = tmp_path / "x.safetensors"
  with pytest.raises(ValueError, match="no family 'sd9'; known are sd1, sd2"):
    save_kohya(path, draw(ONE), family="sd9")
  odd = draw({"transformer.layers.0.attention.to_query": (D, D)})
  with pytest.raises(ValueError, match="Write the format diffusers"):
    save_comfy(path, odd)
  assert save_diffusers(path, odd) == {}
  with pytest.raises(ValueError, match="which component .* say it: component="):
    save_diffusers(path, draw({"layers.0.q": (D, D)}))


def test_a_family_without_a_network_of_kohyas_is_told(tmp_path):
  shapes = FAMILIES["ltx"]
  with pytest.raises(ValueError, match="no network for ltx; write the format"):
    save_kohya(tmp_path / "x.safetensors", draw(shapes), like=shapes)


def test_the_base_tells_what_blocks_alone_do_not(tmp_path):
  """Attention of Flux and of HunyuanVideo has the same names."""
  path, whole = tmp_path / "x.safetensors", FAMILIES["hunyuan-video"]
  block = {m: s for m, s in whole.items() if "transformer_blocks.1.attn" in m}
  save_comfy(path, draw(block), like=whole)
  keys = [*open_checkpoint(path)]
  assert [key for key in keys if ".img_attn_qkv." in key]
  assert not [key for key in keys if ".img_attn.qkv." in key]
  assert {*open_adapter(path, whole)} == {*block}
  with pytest.raises(ValueError, match="can be of flux, sd3"):
    save_comfy(path, draw(block))


def test_a_file_is_not_written_over_itself(tmp_path):
  path = tmp_path / "x.safetensors"
  save_diffusers(path, draw(ONE))
  with pytest.raises(ValueError, match="Give another out"):
    save_diffusers(path, open_adapter(path))
  assert len(open_adapter(path)) == 1


# Names of diffusers, and those that the originals' checkpoints have.
ORIGINALS = {
  "flux": {
    "transformer_blocks.7.attn.to_q": "double_blocks.7.img_attn.qkv",
    "transformer_blocks.7.attn.add_v_proj": "double_blocks.7.txt_attn.qkv",
    "transformer_blocks.7.ff_context.net.2": "double_blocks.7.txt_mlp.2",
    "single_transformer_blocks.9.proj_out": "single_blocks.9.linear2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "context_embedder": "txt_in",
  },
  "sd3": {
    "transformer_blocks.4.attn.to_add_out":
      "joint_blocks.4.context_block.attn.proj",
    "transformer_blocks.4.ff.net.0.proj": "joint_blocks.4.x_block.mlp.fc1",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
  },
  "wan": {
    "blocks.3.attn1.to_out.0": "blocks.3.self_attn.o",
    "blocks.3.attn2.add_k_proj": "blocks.3.cross_attn.k_img",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
  },
}  # fmt: skip


@pytest.mark.parametrize("family", ORIGINALS)
def test_files_have_the_originals_names(family, tmp_path):
  for ours, theirs in ORIGINALS[family].items():
    name, path = f"transformer.{ours}", tmp_path / "x.safetensors"
    sizes = {name: (D, D)}
    save_comfy(path, draw(sizes), like=sizes, family=family)
    stems = {key.rpartition(".lora_")[0] for key in load_file(path)}
    assert stems == {f"diffusion_model.{theirs}"}
    save_kohya(path, draw(sizes), like=sizes, family=family)
    stems = {key.partition(".")[0] for key in load_file(path)}
    assert stems == {"lora_unet_" + theirs.replace(".", "_")}


@pytest.mark.parametrize(
  ("family", "module", "outputs", "turned"),
  [
    ("flux", "norm_out.linear", 2 * D, True),
    ("sd3", "norm_out.linear", 2 * D, True),
    ("sd3", "transformer_blocks.5.norm1_context.linear", 2 * D, True),
    ("sd3", "transformer_blocks.5.norm1_context.linear", 6 * D, False),
    ("flux", "transformer_blocks.5.norm1_context.linear", 6 * D, False),
  ],
)
def test_halves_change_places_where_the_originals_have(
  family, module, outputs, turned, tmp_path
):
  """The original has the shift before the scale, diffusers after it."""
  name, path = f"transformer.{module}", tmp_path / "x.safetensors"
  sizes = {name: (outputs, D)}
  loras, bias = draw(sizes), np.arange(outputs, dtype=np.float32)
  how = {"like": sizes, "family": family, "dtype": np.float32}
  save_kohya(path, loras, shifts={f"{name}.bias": bias}, **how)
  stored = load_file(path)
  up = next(x for key, x in stored.items() if "lora_up" in key)
  change = next(x for key, x in stored.items() if "diff_b" in key)
  half = outputs // 2
  want = np.roll(loras[name].b.T, half, 0) if turned else loras[name].b.T
  np.testing.assert_array_equal(up, want)
  np.testing.assert_array_equal(change, np.roll(bias, half) if turned else bias)
  found = open_adapter(path)
  np.testing.assert_array_equal(found[name].b, loras[name].b)
  np.testing.assert_array_equal(found.shifts[f"{name}.bias"], bias)


def test_metadata_fits_clip_with_and_without_text_model(tmp_path):
  """Diffusers takes `text_model.` off tensors, not off their metadata."""
  shapes = clip("text_encoder")
  path = tmp_path / "x.safetensors"
  save_diffusers(path, draw(shapes, ranks=(2, 3)), like=shapes)
  text = open_checkpoint(path).metadata["lora_adapter_metadata"]
  config = json.loads(text)
  targets = config["text_encoder.target_modules"]
  assert not [name for name in targets if name.startswith("text_model")]
  for pattern, rank in config["text_encoder.rank_pattern"].items():
    own = [n for n in targets if re.match(rf"(.*\.)?({pattern})$", n)]
    full = [
      n
      for n in shapes
      if re.match(pattern + "$", n.removeprefix("text_encoder."))
    ]
    assert (len(own), len(full), rank) == (1, 1, 2)
  assert {*open_adapter(path).ranks.values()} == {2, 3}
