# SPDX-License-Identifier: Apache-2.0
"""Adapters of mlx-lm by the rules of its loader, which is told in NumPy."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.formats import open_adapter, save_mlx, save_peft
from jlora.loras import Lora
from tests.helpers.image_adapters import product

V, D, F, E, LAYERS = 20, 8, 6, 3, 4
HEAD, TABLE = "lm_head", "model.embed_tokens"
CONFIG = {
  "model_type": "llama",
  "num_hidden_layers": LAYERS,
  "tie_word_embeddings": False,
}
EXPERTS = CONFIG | {"model_type": "qwen3_moe", "num_experts": E}
MIXTRAL = CONFIG | {"model_type": "mixtral", "num_local_experts": E}
DENSE = {"self_attn.q_proj": (D, D), "mlp.up_proj": (F, D),
         "mlp.down_proj": (D, F)}  # fmt: skip
FUSED = {"mlp.experts.gate_up_proj": (E, 2 * F, D),
         "mlp.experts.down_proj": (E, D, F), "mlp.gate": (E, D)}  # fmt: skip
OLD = {f"block_sparse_moe.experts.{i}.{name}": shape
       for i in range(E) for name, shape in
       (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D)))}  # fmt: skip
# mlx-lm's modules of a layer: what they are, and the shape of their weight.
OURS = {name: ("linear", shape) for name, shape in DENSE.items()}
SWITCH = {
  f"switch_mlp.{name}": ("switch", (E, *shape))
  for name, shape in
  (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F)))
}  # fmt: skip
TOP = {TABLE: ("table", (V, D)), HEAD: ("linear", (V, D))}


def spread(inner, layers=range(LAYERS)):
  return {f"model.layers.{i}.{name}": own
          for i in layers for name, own in inner.items()}  # fmt: skip


def draw(shapes, ranks=(2, 3, 1), seed=0):
  """Loras of all modules; a table's reads tokens, experts are stacks."""
  rng, found = np.random.default_rng(seed), {}
  for at, (name, (*stack, n_out, n_in)) in enumerate(shapes.items()):
    sides = (n_out, n_in) if name == TABLE else (n_in, n_out)
    a, b = (
      rng.standard_normal((*stack, ranks[at % len(ranks)], n), np.float32)
      for n in sides
    )
    found[name] = Lora(a, b, np.full(stack, 0.7, np.float32))
  return found


def change(lora):
  """The change in the order of the weight, (..., out, in)."""
  a, b = (np.asarray(x, np.float64) for x in (lora.a, lora.b))
  scale = np.asarray(lora.scale, np.float64)[..., None, None]
  return scale * np.swapaxes(b, -1, -2) @ a


def loaded(folder, modules):
  """{module: change} as mlx-lm applies it, its checks made on the way.

  The last `num_layers` layers (all if it is 0) get LoRAs of one rank where the
  name in the layer is a key, the rest of the model where the whole name is;
  every tensor of the file must then be there, of that shape.
  """
  config = json.loads((folder / "adapter_config.json").read_text())
  assert config["fine_tune_type"] == "lora"
  told = config["lora_parameters"]
  rank, scale, keys = told["rank"], told["scale"], set(told["keys"])
  assert told["dropout"] == 0.0
  chosen = set(range(LAYERS)[-max(config["num_layers"], 0) :])
  allowed = {}
  for name, (kind, shape) in modules.items():
    *_, inner = name.split(".", 3)
    in_layer = name.startswith("model.layers.")
    if in_layer and int(name.split(".")[2]) not in chosen:
      continue
    if (inner if in_layer else name) not in keys:
      continue
    *stack, n_out, n_in = shape
    both = {
      "linear": ((n_in, rank), (rank, n_out)),
      "table": ((n_out, rank), (rank, n_in)),
      "switch": ((*stack, rank, n_in), (*stack, n_out, rank)),
    }
    allowed |= dict(zip((f"{name}.lora_a", f"{name}.lora_b"), both[kind],
                        strict=True))  # fmt: skip
  tensors = load_file(folder / "adapters.safetensors")
  for name, tensor in tensors.items():
    assert tensor.shape == allowed[name], name
  found = {}
  for stem in {name.rpartition(".")[0] for name in tensors}:
    a, b = (tensors[f"{stem}.{side}"].astype(np.float64)
            for side in ("lora_a", "lora_b"))  # fmt: skip
    fused = {"linear": lambda a, b: b.T @ a.T, "table": lambda a, b: a @ b,
             "switch": lambda a, b: b @ a}  # fmt: skip
    found[stem] = scale * fused[modules[stem][0]](a, b)
  return found


def near(found, want, dtype=np.float32):
  most = {2: 2e-2, 4: 1e-6}[np.dtype(dtype).itemsize]
  return np.linalg.norm(found - want) <= most * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_mlx_adds_the_change(dtype, tmp_path):
  shapes = spread(DENSE) | {TABLE: (V, D), HEAD: (V, D)}
  loras = draw(shapes)
  assert save_mlx(tmp_path, loras, config=CONFIG, dtype=dtype) == {}
  found = loaded(tmp_path, spread(OURS) | TOP)
  assert set(found) == set(loras)
  for name, lora in loras.items():
    want = change(lora).T if name == TABLE else change(lora)
    assert near(found[name], want, dtype)
  for base in (None, shapes):
    adapter = open_adapter(tmp_path, base)
    assert (adapter.format, adapter.shapes) == ("mlx", shapes)
    for name, lora in adapter.items():
      assert lora.a.dtype == dtype
      assert lora.rank == 3
      assert near(product(lora), product(loras[name]), dtype)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_layers_are_counted_from_the_last(first, tmp_path):
  loras = draw(spread(DENSE, [first]))
  save_mlx(tmp_path, loras, config=CONFIG)
  told = json.loads((tmp_path / "adapter_config.json").read_text())
  assert told["num_layers"] == LAYERS - first
  assert told["lora_parameters"]["keys"] == sorted(DENSE)
  assert set(loaded(tmp_path, spread(OURS) | TOP)) == set(loras)


def test_what_is_in_no_layer_has_its_whole_name(tmp_path):
  save_mlx(tmp_path, draw({HEAD: (V, D)}), config=CONFIG)
  told = json.loads((tmp_path / "adapter_config.json").read_text())
  assert told["lora_parameters"]["keys"] == [HEAD]
  assert told["num_layers"] == 1  # 0 would be all
  assert set(loaded(tmp_path, spread(OURS) | TOP)) == {HEAD}


def test_fused_experts_become_stacks_and_come_back(tmp_path):
  shapes = spread(FUSED, [1, 3])
  loras = draw(shapes)
  assert save_mlx(tmp_path, loras, config=EXPERTS, dtype=np.float32) == {}
  mlx = {f"mlp.{name}": own for name, own in SWITCH.items()}
  mlx["mlp.gate"] = ("linear", (E, D))
  found = loaded(tmp_path, spread(mlx))
  for name, lora in loras.items():
    layer = name.partition(".mlp.")[0]
    if "gate_up" in name:
      halves = np.split(change(lora), 2, axis=-2)
      for side, want in zip(("gate", "up"), halves, strict=True):
        assert near(found[f"{layer}.mlp.switch_mlp.{side}_proj"], want)
    elif "down" in name:
      assert near(found[f"{layer}.mlp.switch_mlp.down_proj"], change(lora))
    else:
      assert near(found[name], change(lora))
  adapter = open_adapter(tmp_path, spread(FUSED))
  assert adapter.shapes == shapes
  for name, lora in loras.items():
    back = adapter[name]
    assert near(change(back), change(lora))
    assert back.rank == adapter.ranks[name]
  again = tmp_path / "again"
  save_mlx(again, adapter, config=EXPERTS, dtype=np.float32)
  told = json.loads((again / "adapter_config.json").read_text())
  assert told["lora_parameters"]["rank"] == 3  # halves are cut apart again
  after = loaded(again, spread(mlx))
  assert all(near(after[name], found[name]) for name in found)


def test_experts_that_are_modules_become_stacks_and_come_back(tmp_path):
  shapes = spread(OLD, [2])
  loras = draw(shapes)
  missing = "model.layers.2.block_sparse_moe.experts.1.w1"
  del loras[missing]
  save_mlx(tmp_path, loras, config=MIXTRAL, dtype=np.float32)
  mlx = {f"block_sparse_moe.{name}": own for name, own in SWITCH.items()}
  found = loaded(tmp_path, spread(mlx))
  sides = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
  for name, lora in loras.items():
    stem, _, (expert, side) = (
      *name.partition(".experts.")[:2],
      name.split(".")[-2:],
    )
    stack = found[f"{stem}.switch_mlp.{sides[side]}"]
    assert near(stack[int(expert)], change(lora))
  stem = "model.layers.2.block_sparse_moe.switch_mlp"
  assert not found[f"{stem}.gate_proj"][1].any()
  adapter = open_adapter(tmp_path, shapes)
  assert adapter.shapes == shapes
  assert all(near(change(adapter[n]), change(x)) for n, x in loras.items())
  assert not change(adapter[missing]).any()
  bare = open_adapter(tmp_path)
  assert bare.shapes[f"{stem}.down_proj"] == (E, D, F)
  assert bare[f"{stem}.down_proj"].scale.shape == (E,)


def test_half_of_a_fused_stack_alone_is_read(tmp_path):
  save_mlx(tmp_path, draw(spread(FUSED, [0])), config=EXPERTS)
  path = tmp_path / "adapters.safetensors"
  tensors = {name: x for name, x in load_file(path).items()
             if "up_proj" in name}  # fmt: skip
  save_file(tensors, path)
  adapter = open_adapter(tmp_path, spread(FUSED))
  (module,) = adapter
  assert not change(adapter[module])[:, :F].any()
  assert change(adapter[module])[:, F:].any()


def test_names_of_transformers_5_are_those_of_mixtral(tmp_path):
  loras = draw(spread(FUSED, [0]))
  save_mlx(tmp_path, loras, config=MIXTRAL)
  names = {n.rpartition(".")[0]
           for n in load_file(tmp_path / "adapters.safetensors")}  # fmt: skip
  moe = "model.layers.0.block_sparse_moe"
  assert names == {f"{moe}.gate", *(f"{moe}.{name}" for name in SWITCH)}


def test_a_scale_of_another_tool_multiplies(tmp_path):
  loras = draw(spread(DENSE, [3]))
  save_mlx(tmp_path, loras, config=CONFIG, dtype=np.float32)
  path = tmp_path / "adapter_config.json"
  told = json.loads(path.read_text())
  told["lora_parameters"]["scale"] = 20.0
  path.write_text(json.dumps(told))
  adapter = open_adapter(tmp_path)
  for name, lora in loras.items():
    assert near(product(adapter[name]), 20 * product(lora))
    assert adapter.alphas[name] == 60


def test_bytes_are_kept_where_nothing_is_rounded(tmp_path):
  shapes = spread(DENSE)
  one, other = tmp_path / "one", tmp_path / "other"
  save_mlx(one, draw(shapes), config=CONFIG)
  save_mlx(other, open_adapter(one), config=CONFIG)
  for name in ("adapters.safetensors", "adapter_config.json"):
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_what_mlx_lacks_is_in_the_ledger(tmp_path):
  loras = draw({TABLE: (V, D), HEAD: (V, D)})
  loras["model.patch"] = loras[HEAD]
  loras["model.layers"] = draw({"x": (2, D, D)})["x"]
  loras["model.layers.0.mlp.up_proj"] = Lora(
    np.ones((0, D)), np.ones((0, F)), np.float32(1)
  )
  loras["model.layers.1.mlp.up_proj"] = draw({"x": (F, D)})["x"]
  left = save_mlx(
    tmp_path,
    loras,
    config=CONFIG | {"tie_word_embeddings": True},
    like={"model.patch.weight": np.empty((V, 2, 2, 2))},
    shifts={"model.norm.weight": np.ones(D)},
    select=lambda module, shape: "layers.1" not in module,
  )
  assert left == {
    HEAD: "the head is the table of tokens (tied): the embedding's change "
          "serves both",
    "model.patch": "mlx-lm has no LoRA for convolutions",
    "model.layers":
      "a stack of layers; write its members under their own names",
    "model.layers.0.mlp.up_proj": "rank 0: no change",
    "model.layers.1.mlp.up_proj": "not among the layers asked for",
    "model.norm.weight":
      "mlx-lm's adapters hold LoRAs alone; merge it into a checkpoint",
  }  # fmt: skip


ONE = draw({HEAD: (V, D)})
TWICE = draw(spread({"block_sparse_moe.gate": (E, D), "mlp.gate": (E, D)}, [0]))
MISTAKES = {
  "a model": (ONE, {"config": {"model_type": "odd"}},
              "'odd' has no row .* llama, mistral"),
  "a dtype": (ONE, {"dtype": np.float64}, "dtype must be one of float32"),
  "large": ({HEAD: Lora(np.full((1, D), 1e6, "f4"), np.full((1, V), 1e6, "f4"),
                        np.float32(1))}, {}, "more than float16 holds"),
  "nothing": (ONE, {"config": CONFIG | {"tie_word_embeddings": True}},
              "No module is left to write. lm_head: .*merge it instead"),
  "experts": (draw(spread(OLD, [0])),
              {"config": MIXTRAL | {"num_local_experts": 2}},
              "has an expert 2, config.json 2 experts"),
  "a layer": (draw(spread(DENSE)),
              {"config": CONFIG | {"num_hidden_layers": 3}},
              "layers up to 3, counted from 0, config.json has .* 3;"),
  "no depth": (ONE, {"config": {"model_type": "phi3"}},
               "has num_hidden_layers None"),
  "twice": (TWICE, {"config": MIXTRAL}, "are all model.layers.0.block"),
}  # fmt: skip


@pytest.mark.parametrize("why", MISTAKES)
def test_mistakes_are_told_and_leave_no_file(why, tmp_path):
  loras, more, said = MISTAKES[why]
  with pytest.raises(ValueError, match=said):
    save_mlx(tmp_path, loras, **({"config": CONFIG} | more))
  assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_cannot_be_replaced_stays(tmp_path):
  save_mlx(tmp_path, ONE, config=CONFIG)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(ValueError, match="more than float16"):
    save_mlx(tmp_path, MISTAKES["large"][0], config=CONFIG)
  with pytest.raises(ValueError, match="Give another out"):
    save_mlx(tmp_path, open_adapter(tmp_path), config=CONFIG)
  assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def edited(folder, **more):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_damaged_folders_are_refused(tmp_path):
  path = tmp_path / "adapters.safetensors"
  save_mlx(tmp_path, ONE, config=CONFIG)
  with pytest.raises(ValueError, match="no module for 1 names of the file"):
    open_adapter(tmp_path, spread(DENSE))
  adapter = open_adapter(tmp_path, spread(DENSE), allow_missing=True)
  assert adapter.left_out == {HEAD: "the base has no such module"}
  with pytest.raises(ValueError, match=r"for a weight \(20, 8\), the base has"):
    open_adapter(tmp_path, {HEAD: (V, 9)})
  tensors = load_file(path)
  save_file({f"{HEAD}.lora_a": tensors[f"{HEAD}.lora_a"]}, path)
  with pytest.raises(ValueError, match="lacks lm_head.lora_b"):
    open_adapter(tmp_path)
  save_file(tensors | {f"{HEAD}.m": np.ones(3)}, path)
  with pytest.raises(ValueError, match="has, besides .* lm_head.m"):
    open_adapter(tmp_path)
  save_file(tensors | {f"{HEAD}.lora_b": np.ones((5, V))}, path)
  with pytest.raises(ValueError, match="1 modules have different ranks"):
    open_adapter(tmp_path)
  edited(tmp_path, lora_parameters={"rank": 2})
  with pytest.raises(ValueError, match="must have a finite scale, got None"):
    open_adapter(tmp_path)
  edited(tmp_path, lora_parameters={"scale": 10**400})
  with pytest.raises(ValueError, match="must have a finite scale"):
    open_adapter(tmp_path)
  edited(tmp_path, fine_tune_type="dora")
  with pytest.raises(ValueError, match="of the type 'dora', .* mlx_lm.fuse"):
    open_adapter(tmp_path)


@pytest.mark.parametrize("inner", [{"gate_proj": 5}, {"up_proj": 5}])
def test_halves_of_different_sizes_are_refused(inner, tmp_path):
  save_mlx(tmp_path, draw(spread(FUSED, [0])), config=EXPERTS)
  path = tmp_path / "adapters.safetensors"
  tensors = load_file(path)
  for side, size in inner.items():
    key = f"model.layers.0.mlp.switch_mlp.{side}.lora_b"
    tensors[key] = np.ascontiguousarray(tensors[key][:, :size])
  save_file(tensors, path)
  with pytest.raises(ValueError, match="it was made for another model"):
    open_adapter(tmp_path, spread(FUSED))


def test_folders_of_peft_are_still_read_as_such(tmp_path):
  name = "model.layers.0.mlp.up_proj.weight"
  save_peft(
    tmp_path, {name: draw({"x": (F, D)})["x"]}, like={name: np.empty((F, D))}
  )
  assert open_adapter(tmp_path).format == "PEFT"
