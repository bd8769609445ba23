# SPDX-License-Identifier: Apache-2.0
"""The doors that read files: a folder that each opens, and how it does."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import ml_dtypes
import numpy as np
import yaml

import jlora
from jlora import formats, models
from jlora.checkpoints import stream_checkpoint, write_safetensors
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.checkpoints.quantised import VALUES
from jlora.commands.contents import contents_of
from jlora.commands.estimates import list_modules
from jlora.commands.serving.completions import (
  Answer,
  Limits,
  choice_of,
  read_completion,
  read_load,
  read_unload,
  usage_of,
)
from jlora.commands.serving.decoding import Sizes
from jlora.commands.serving.refusals import Refused
from jlora.commands.show import lines_of
from jlora.extraction import port_checkpoint, read_report
from jlora.loras import Lora
from jlora.merging import read_recipe
from jlora.merging.checkpoints.planning import plan_merge
from tests.fuzz.resumed import build_finished, build_killed, enter_resumed

D, V = 8, 12
LLAMA = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": V,
  "hidden_size": D,
  "intermediate_size": D,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
  "text_config": {"num_hidden_layers": 1, "model_type": "llama"},
}
MIXTRAL = LLAMA | {
  "model_type": "mixtral",
  "architectures": ["MixtralForCausalLM"],
  "num_local_experts": 2,
  "num_experts_per_tok": 1,
  "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
Q = "model.layers.0.self_attn.q_proj"
PEFT = {
  "peft_type": "LORA",
  "r": 2,
  "lora_alpha": 4,
  "target_modules": ["q_proj", "v_proj"],
  "exclude_modules": None,
  "rank_pattern": {r"model\.layers\.0\.self_attn\.v_proj": 1},
  "alpha_pattern": {r"(.*\.)?v_proj": 1},
  "modules_to_save": ["lm_head"],
  "bias": "none",
  "use_rslora": False,
  "base_model_name_or_path": "org/base",
  "task_type": "CAUSAL_LM",
}


class Door(NamedTuple):
  """A door, and how often it is tried against the others.

  Attributes:
    build: makes what it opens, in a folder.
    enter: opens it and reads all that it would.
    weight: share of the tries.
  """

  build: Callable[[Path], None]
  enter: Callable[[Path], object]
  weight: int = 4


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _llama(seed=0, experts=0):
  layer = "model.layers.0"
  tensors = {
    "model.embed_tokens.weight": _random(V, D, seed=seed),
    "model.norm.weight": np.ones(D, np.float32),
    "lm_head.weight": _random(V, D, seed=seed + 1),
    f"{layer}.input_layernorm.weight": np.ones(D, np.float32),
    f"{layer}.post_attention_layernorm.weight": np.ones(D, np.float32),
  }
  names = [f"{layer}.self_attn.{x}_proj" for x in "qkvo"]
  inner = [f"{layer}.mlp.{x}_proj" for x in ("gate", "up", "down")]
  if experts:
    moe = f"{layer}.block_sparse_moe"
    inner = [
      f"{moe}.experts.{i}.w{j}" for i in range(experts) for j in (1, 2, 3)
    ]
    tensors[f"{moe}.gate.weight"] = _random(experts, D)
  for at, name in enumerate([*names, *inner]):
    tensors[f"{name}.weight"] = _random(D, D, seed=seed + 2 + at)
  return tensors


def _tokenizer(shift=0):
  vocabulary = {f"t{(i + shift) % V}": i for i in range(V)}
  added = [{"id": 1, "content": "<s>", "special": True}]
  return {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added}


def _write_model(folder, tensors, config=None, tokenizer=None, shards=False):
  spec = {name: (x.shape, x.dtype) for name, x in tensors.items()}
  size = 1200 if shards else 2**30
  stream_checkpoint(folder, spec, tensors.items(), max_shard_bytes=size)
  for name, text in (("config", config), ("tokenizer", tokenizer)):
    if text is not None:
      (folder / f"{name}.json").write_text(json.dumps(text))


def _read_all(path):
  checkpoint = jlora.open_checkpoint(path)
  assert checkpoint.model_type is None or checkpoint.config
  return [checkpoint[name].shape for name in checkpoint]


def _build_orbax(folder):
  tree = {
    "layers": {"q": {"kernel": _random(4, 6)}, "b": np.ones(3, np.float32)}
  }
  jlora.checkpoints.save_orbax(folder / "run", tree)


def _bnb():
  """Four bits with nested scales, and eight, as bitsandbytes writes them."""
  state = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float32",
    "shape": [8, 16],
    "nested_blocksize": 4,
    "nested_offset": 0.5,
  }
  rng = np.random.default_rng(0)
  key = "m.weight.quant_state.bitsandbytes__nf4"
  return {
    "m.weight": rng.integers(0, 256, (64, 1)).astype(np.uint8),
    "m.weight.absmax": np.array([3, 200], np.uint8),
    "m.weight.quant_map": VALUES["nf4"],
    "m.weight.nested_absmax": np.ones(1, np.float32),
    "m.weight.nested_quant_map": np.linspace(-1, 1, 256).astype(np.float32),
    key: np.frombuffer(json.dumps(state).encode(), np.uint8),
    "n.weight": rng.integers(-99, 99, (4, 6)).astype(np.int8),
    "n.SCB": np.ones(4, np.float32),
    "n.weight_format": np.zeros((), np.uint8),
  }


def _packed_weights():
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 256, (2, 4, 2, 16)).astype(np.uint8)
  return {
    "e.gate_up_proj_blocks": codes,
    "e.gate_up_proj_scales": np.full((2, 4, 2), 120, np.uint8),
    "q.weight": _random(130, 140).astype(ml_dtypes.float8_e4m3fn),
    "q.weight_scale_inv": np.ones((2, 2), np.float32),
    "q.input_scale": np.ones((), np.float32),
    "r.weight": _random(4, 6).astype(ml_dtypes.float8_e5m2),
    "r.weight_scale": np.ones((4, 1), np.float32),
  }


def _foreign(kind):
  words = np.zeros((4, 2), np.int32)
  tensors = {f"l.0.q.{x}": words for x in ("qweight", "qzeros")}
  tensors["l.0.q.scales"] = np.ones((4, 1), np.float16)
  tensors |= {"l.0.q.g_idx": words[:, 0]} if kind == "gptq" else {}
  return tensors | {"norm.weight": np.ones(4, np.float32)}


def _build_foreign(folder):
  for kind in ("gptq", "awq"):
    said = LLAMA | {"quantization_config": {"quant_method": kind, "bits": 4}}
    _write_model(folder / kind, _foreign(kind), said)


def _enter_foreign(folder):
  for kind in ("gptq", "awq"):
    checkpoint = jlora.open_checkpoint(folder / kind)
    try:
      check_dequantised(checkpoint)
    except ValueError as error:
      if "is quantised" not in str(error):
        raise


def _build_adapter(folder):
  _write_model(folder / "base", _llama(), LLAMA)
  prefix = f"base_model.model.{Q}"
  value = prefix.replace("q_proj", "v_proj")
  (folder / "adapter").mkdir()
  write_safetensors(
    folder / "adapter" / "adapter_model.safetensors",
    {
      f"{prefix}.lora_A.weight": _random(2, D),
      f"{prefix}.lora_B.weight": _random(D, 2),
      f"{value}.lora_A.weight": _random(1, D),
      f"{value}.lora_B.weight": _random(D, 1),
      "base_model.model.lm_head.weight": _random(V, D),
    },
  )
  text = json.dumps(PEFT, indent=2)
  (folder / "adapter" / "adapter_config.json").write_text(text)


def _build_ported(folder):
  _build_pair(folder)
  base = jlora.open_checkpoint(folder / "one")
  loras = {
    f"{Q}.weight": Lora(_random(2, D), _random(2, D), np.ones((), np.float32)),
    "model.embed_tokens.weight": Lora(
      _random(1, V), _random(1, D), np.ones((), np.float32)
    ),
  }
  jlora.save_peft(
    folder / "adapter",
    loras,
    like=base.spec,
    config=base.config,
    fingerprint=formats.fingerprint(base, loras),
  )


def _port(folder, out, resume=False):
  port_checkpoint(
    *(folder / "adapter", folder / "one", folder / "two", out),
    resume=resume,
    log=io.StringIO(),
  )


def _enter_ported(folder):
  _port(folder, folder / "out")


def _enter_adapter(folder):
  jlora.load_peft(folder / "adapter")
  formats.read_fingerprint(folder / "adapter")
  base = jlora.open_checkpoint(folder / "base")
  jlora.load_peft(folder / "adapter", like=base.spec, config=base.config)


def _build_adapters(folder):
  _build_adapter(folder)
  files = [*(folder / "base").iterdir()]
  for file in files:
    file.unlink()
  (folder / "base").rmdir()
  (folder / "adapter").rename(folder / "one")
  (folder / "two").mkdir()
  for file in (folder / "one").iterdir():
    (folder / "two" / file.name).write_bytes(file.read_bytes())
  models = [{"model": x, "parameters": {"weight": 0.5}} for x in ("one", "two")]
  recipe = {"merge_method": "linear", "models": models}
  (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))


def _build_pair(folder):
  config = {k: v for k, v in LLAMA.items() if k != "text_config"}
  _write_model(folder / "one", _llama(), config, _tokenizer())
  _write_model(folder / "two", _llama(50), config, _tokenizer(1), shards=True)


def _extract(folder, out, resume=False):
  jlora.extract_checkpoint(
    *(folder / "one", folder / "two", out),
    rank=1,
    resume=resume,
    log=io.StringIO(),
  )


def _enter_pair(folder):
  _extract(folder, folder / "out")


def _build_merge(method):
  def build(folder):
    _build_pair(folder)
    same = (folder / "one" / "tokenizer.json").read_bytes()
    (folder / "two" / "tokenizer.json").write_bytes(same)
    recipe = {
      "merge_method": method,
      "base_model": "one",
      "models": [
        {"model": name, "parameters": {"weight": [0.1, 0.2]}}
        for name in (("one", "two") if method == "linear" else ("one",))
      ],
      "dtype": "float32",
      "tokenizer_source": "base",
    }
    if method == "passthrough":
      recipe["models"][0].pop("parameters")
      recipe["parameters"] = {
        "scale": [{"filter": "mlp", "value": 1}, {"value": 1}]
      }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))

  return build


def _recipe_in(folder):
  """Reads the recipe, with its models in the folder."""
  recipe = read_recipe(folder / "recipe.yml")
  place = lambda name: str(folder / name) if name else name  # noqa: E731
  parts = tuple(
    part._replace(
      inputs=tuple(one._replace(model=place(one.model)) for one in part.inputs)
    )
    for part in recipe.slices
  )
  own = {key: place(getattr(recipe, key)) for key in ("base", "reference")}
  return recipe._replace(slices=parts, **own)


def _merge(folder, out, resume=False):
  recipe = _recipe_in(folder)
  jlora.merge_checkpoints(recipe, out, resume=resume, log=io.StringIO())


def _enter_merge(folder):
  _merge(folder, folder / "out")


def _build_packed(folder):
  lora = Lora(_random(3, 6), _random(3, 5), np.float32(0.5))
  packed = {
    name: formats.pack(lora, bits) for name, bits in (("q", 4), ("k", 2))
  }
  formats.save_packed(folder / "x.safetensors", packed)


def _enter_packed(folder):
  for one in formats.load_packed(folder / "x.safetensors").values():
    formats.unpack(one)
  _show(folder / "x.safetensors")


def _show(path):
  with warnings.catch_warnings(action="ignore"):
    found = contents_of(str(path))
    json.dumps(found)
    return "\n".join(lines_of(found))


def _build_shown(folder):
  _build_pair(folder)
  _enter_pair(folder)
  recipe = folder / "recipe.yml"
  text = {
    "merge_method": "passthrough",
    "models": [{"model": str(folder / "one")}],
  }
  recipe.write_text(json.dumps(text))
  jlora.merge_checkpoints(
    read_recipe(recipe), folder / "merged", log=io.StringIO()
  )
  recipe.unlink()
  for file in (folder / "one").iterdir():
    file.unlink()


def _enter_shown(folder):
  read_report(folder / "out")
  for name in ("out", "out/report.json", "merged", "merged/merge.json", "two"):
    _show(folder / name)


COMPLETION = {
  "model": "one",
  "prompt": [[1, 2], [3]],
  "max_tokens": 4,
  "temperature": 0.5,
  "seed": 3,
  "stop": None,
  "stream": True,
  "stream_options": {"include_usage": True},
  "n": 1,
  "logit_bias": {},
  "ignore_eos": True,
  "return_token_ids": True,
}
REQUESTS = {
  "completion": COMPLETION,
  "load": {"lora_name": "x", "lora_path": "x/y", "load_inplace": True},
  "unload": {"lora_name": "x", "lora_int_id": 1},
}


def _build_requests(folder):
  for name, body in REQUESTS.items():
    (folder / f"{name}.json").write_text(json.dumps(body))


def _enter_requests(folder):
  """Reads all bodies as a server does; a refusal must be the asker's fault."""
  limits, sizes = Limits(4, 8, 8, V), Sizes(2, 32, 4, 2)
  files = {name: folder / f"{name}.json" for name in REQUESTS}
  if not all(file.is_file() for file in files.values()):
    raise ValueError("bodies come in no other way")
  bodies = {name: file.read_bytes() for name, file in files.items()}
  try:
    wanted = read_completion(bodies["completion"], limits, sizes, None)
    read_load(bodies["load"])
    read_unload(bodies["unload"])
  except Refused as refused:
    json.dumps(refused.body())
    kind = ValueError if refused.status == 400 else RuntimeError
    raise kind(str(refused)) from refused
  assert len(wanted.seeds) == len(wanted.prompts) <= limits.prompts
  assert all(0 <= i < V for ids in wanted.prompts for i in ids)
  answer = Answer(0, "", [1], "stop")
  json.dumps([choice_of(answer, wanted, is_whole=True), usage_of(wanted, 1)])
  np.random.default_rng(wanted.seeds[0])


def _build_mixture(folder):
  _write_model(folder / "moe", _llama(experts=2), MIXTRAL)


def _build_image_adapter(folder):
  """Files of kohya and diffusers, LoHa, LoKr and whole changes."""
  name = "unet.mid_block.attentions.0.proj_in"
  lora = Lora(_random(2, D), _random(2, D), np.float32(1))  # type: ignore[arg-type]
  ours = {"like": {name: (D, D)}, "family": "sdxl"}
  formats.save_kohya(folder / "kohya.safetensors", {name: lora}, **ours)
  formats.save_diffusers(folder / "diffusers.safetensors", {name: lora})
  tensors = {f"x.hada_w{i}_a": _random(D, 2) for i in "12"}
  tensors |= {f"x.hada_w{i}_b": _random(2, D) for i in "12"}
  tensors |= {"y.lokr_w1": _random(2, 2), "y.lokr_w2_a": _random(4, 2)}
  tensors |= {"y.lokr_w2_b": _random(2, 4), "z.diff": _random(D)}
  tensors["x.alpha"] = np.float32(1)
  write_safetensors(folder / "lycoris.safetensors", tensors)


def _enter_image_adapter(folder):
  found = [
    formats.open_adapter(folder / f"{name}.safetensors")
    for name in ("kohya", "diffusers", "lycoris")
  ]
  return [
    part.shape
    for adapter in found
    for lora in adapter.values()
    for part in (lora.a, lora.b)
  ] + [change.shape for adapter in found for change in adapter.shifts.values()]


def _build_states(folder):
  """States of qwix, tunix and MaxText, and the base of one."""
  path = "layers/0/self_attention/query/kernel"
  one = np.ones((), np.float32)
  lora = Lora(_random(2, D), _random(2, D), one)
  like = {path: np.zeros((D, 2, D // 2), np.float32)}
  jlora.checkpoints.save_orbax(folder / "base", like)
  dot = {path: "dot"}
  formats.save_qwix(folder / "qwix", {path: lora}, like=like, equations=dot)
  formats.save_maxtext(folder / "maxtext", {path: lora}, like=like)
  config = LLAMA | {"num_key_value_heads": 2}
  formats.save_tunix(folder / "tunix", {Q: lora}, config=config)


def _enter_states(folder):
  found = [
    formats.open_adapter(folder / name, base and folder / base)
    for name, base in (("qwix", "base"), ("maxtext", "base"), ("tunix", None))
  ]
  return [lora.a.shape for adapter in found for lora in adapter.values()]


def _build_gguf(folder):
  """A model in two types, and an adapter, of llama.cpp."""
  for name, kind in (("model", "llama"), ("quantised", "qwen2")):
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", kind)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b"])
    for tensor in ("token_embd", "blk.0.attn_q", "output"):
      own = _random(32, 32)
      if kind == "llama":
        writer.add_tensor(f"{tensor}.weight", own)
      else:
        q8 = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(own, q8)
        writer.add_tensor(f"{tensor}.weight", stored, raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  lora = Lora(_random(2, D), _random(2, D), np.ones((), np.float32))
  formats.save_gguf(folder / "lora.gguf", {Q: lora}, config=LLAMA)


def _enter_gguf(folder):
  found = [_read_all(folder / f"{x}.gguf") for x in ("model", "quantised")]
  adapter = formats.open_adapter(folder / "lora.gguf")
  return found, [lora.a.shape for lora in adapter.values()]


DOORS = {
  "safetensors": Door(
    lambda folder: write_safetensors(folder / "x.safetensors", _llama()),
    lambda folder: _read_all(folder / "x.safetensors"),
  ),
  "sharded": Door(
    lambda folder: _write_model(folder / "m", _llama(), LLAMA, shards=True),
    lambda folder: _read_all(folder / "m"),
  ),
  "orbax": Door(_build_orbax, lambda folder: _read_all(folder / "run"), 2),
  "bitsandbytes": Door(
    lambda folder: write_safetensors(folder / "x.safetensors", _bnb()),
    lambda folder: _read_all(folder / "x.safetensors"),
  ),
  "fp8 and mxfp4": Door(
    lambda folder: write_safetensors(
      folder / "x.safetensors", _packed_weights()
    ),
    lambda folder: _read_all(folder / "x.safetensors"),
  ),
  "gptq and awq": Door(_build_foreign, _enter_foreign, 2),
  "packed loras": Door(_build_packed, _enter_packed, 3),
  "adapters of image models": Door(
    _build_image_adapter, _enter_image_adapter, 6
  ),
  "gguf": Door(_build_gguf, _enter_gguf, 4),
  "states of JAX": Door(_build_states, _enter_states, 3),
  "load_peft": Door(_build_adapter, _enter_adapter, 6),
  "extract_checkpoint": Door(_build_pair, _enter_pair, 4),
  "read_recipe, plan": Door(
    _build_merge("linear"), lambda folder: plan_merge(_recipe_in(folder)), 6
  ),
  "merge_checkpoints": Door(_build_merge("passthrough"), _enter_merge, 3),
  "merge adapters": Door(_build_adapters, _enter_merge, 3),
  "resume extract": Door(
    build_killed(_build_pair, _extract), enter_resumed(_extract), 4
  ),
  "extract again": Door(
    build_finished(_build_pair, _extract), enter_resumed(_extract), 3
  ),
  "port_checkpoint": Door(_build_ported, _enter_ported, 3),
  "port again": Door(
    build_finished(_build_ported, _port), enter_resumed(_port), 2
  ),
  "resume merge": Door(
    build_killed(_build_merge("linear"), _merge), enter_resumed(_merge), 3
  ),
  "merge again": Door(
    build_finished(_build_merge("linear"), _merge), enter_resumed(_merge), 3
  ),
  "adapters again": Door(
    build_finished(_build_adapters, _merge), enter_resumed(_merge), 2
  ),
  "show": Door(_build_shown, _enter_shown, 6),
  "show an adapter": Door(
    _build_adapter, lambda folder: _show(folder / "adapter"), 2
  ),
  "requests": Door(_build_requests, _enter_requests),
  "load a mixture": Door(
    _build_mixture, lambda folder: models.load(folder / "moe"), 2
  ),
  "plan": Door(
    lambda folder: (folder / "config.json").write_text(json.dumps(LLAMA)),
    lambda folder: list_modules(str(folder / "config.json"), None),
    1,
  ),
}
