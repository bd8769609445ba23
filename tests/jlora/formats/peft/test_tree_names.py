# SPDX-License-Identifier: Apache-2.0
"""Trees of JAX go to PEFT and come back by their own paths."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import linen, nnx

import jlora
from jlora.formats.peft.tree_names import leaves_of, name_path
from jlora.loras import dense
from jlora.paths import flatten


class Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(4, name="l2")(linen.Dense(7, name="l1")(x))


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.l1 = nnx.Linear(5, 7, rngs=rngs)
    self.l2 = nnx.Linear(7, 4, rngs=rngs)


def linen_trees():
  x = jnp.ones((1, 5))
  return [Linen().init(jax.random.key(seed), x) for seed in (0, 1)]


def nnx_trees():
  return [nnx.split(Nnx(nnx.Rngs(s)), nnx.Param)[1] for s in (0, 1)]


TREES = {"linen": linen_trees, "nnx": nnx_trees}


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_goes_to_peft_and_comes_back(kind, tmp_path):
  base, finetuned = TREES[kind]()
  loras = jlora.extract(base, finetuned, rank=2)
  assert not jlora.save_peft(tmp_path, loras, like=base, task_type=None)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert sorted(config["target_modules"]) == ["l1", "l2"]
  found = jlora.load_peft(tmp_path, like=base).loras
  assert found.keys() == loras.keys()
  for path, lora in loras.items():
    np.testing.assert_allclose(dense(found[path]), dense(lora), atol=1e-6)


def test_what_the_folder_holds_is_what_torch_would_add(tmp_path):
  base, finetuned = nnx_trees()
  loras = jlora.extract(base, finetuned, rank=2)
  jlora.save_peft(tmp_path, loras, like=base, task_type=None)
  file = jlora.open_checkpoint(tmp_path / "adapter_model.safetensors")
  a, b = (file[f"base_model.model.l1.lora_{x}.weight"] for x in "AB")
  np.testing.assert_allclose((b @ a).T, dense(loras["l1/kernel"]), atol=1e-6)


def test_shapes_alone_and_flat_paths_do_as_well(tmp_path):
  base, finetuned = nnx_trees()
  loras = jlora.extract(base, finetuned, rank=2)
  files = []
  trees = (base, flatten(base), jax.eval_shape(lambda: base))
  for number, like in enumerate(trees):
    folder = tmp_path / str(number)
    jlora.save_peft(folder, loras, like=like, task_type=None)
    files.append((folder / "adapter_model.safetensors").read_bytes())
  assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
  ("path", "name"),
  [
    ("l1/kernel", "l1.weight"),
    ("params/Dense_0/bias", "Dense_0.bias"),
    ("layers/0/norm/scale", "layers.0.norm.weight"),
    ("embed/embedding", "embed.weight"),
    ("layers/0/weight", "layers.0.weight"),
    ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
  ],
)
def test_names(path, name):
  assert name_path(path) == name


def test_pairs_change_the_names_that_flax_gives(tmp_path):
  base, finetuned = nnx_trees()
  loras = jlora.extract(base, finetuned, rank=2)
  rename = [(r"^l(\d)", r"layers.\1")]
  jlora.save_peft(tmp_path, loras, like=base, task_type=None, rename=rename)
  keys = jlora.open_checkpoint(tmp_path / "adapter_model.safetensors")
  assert "base_model.model.layers.1.lora_A.weight" in keys


def test_scanned_layers_need_names(tmp_path):
  lora = jlora.Lora(np.ones((3, 1, 5)), np.ones((3, 1, 5)), np.ones(3))
  one = jlora.Lora(lora.a[0], lora.b[0], lora.scale[0])
  like = {"h": {"kernel": np.ones((3, 5, 5))}, "l": {"kernel": np.ones((5, 5))}}
  loras = {"h/kernel": lora, "l/kernel": one}
  left = jlora.save_peft(tmp_path / "one", loras, like=like, task_type=None)
  assert list(left) == ["h/kernel"]
  assert "rename= has to give 3 names" in left["h/kernel"]

  def rename(path):
    name = name_path(path)
    return [f"h.{i}.weight" for i in range(3)] if path[0] == "h" else name

  jlora.save_peft(
    tmp_path / "all", loras, like=like, task_type=None, rename=rename
  )
  assert "h.2.weight" in jlora.load_peft(tmp_path / "all").loras


def test_errors_say_how_to_rename(tmp_path):
  lora = jlora.Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(1))
  with pytest.raises(ValueError, match="not a.w.*rename=lambda.*r.layers"):
    jlora.save_peft(tmp_path, {"a/w": lora}, like={"a": {"w": np.ones((3, 2))}})
  with pytest.raises(ValueError, match="like=dict has no arrays.*pytree"):
    leaves_of({"a": None})


def test_peft_computes_what_the_tree_computes(tmp_path):
  """A torch module of the same names, with the tree's weights transposed."""
  base, finetuned = nnx_trees()
  loras = jlora.extract(base, finetuned, rank=2)
  jlora.save_peft(tmp_path, loras, like=base, task_type=None)
  net = torch.nn.Module()
  net.l1, net.l2 = torch.nn.Linear(5, 7), torch.nn.Linear(7, 4)
  net.forward = lambda x: net.l2(net.l1(x))
  for path, array in flatten(base).items():
    parameter = net.get_parameter(name_path(path))
    parameter.data = torch.tensor(np.array(array).T)
  x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
  adapted = peft.PeftModel.from_pretrained(net, str(tmp_path))
  with torch.no_grad():
    found = adapted(torch.tensor(x)).numpy()
  merged = flatten(jlora.apply(base, loras))
  (w1, b1), (w2, b2) = (
    [np.asarray(merged[f"{name}/{leaf}"]) for leaf in ("kernel", "bias")]
    for name in ("l1", "l2")
  )
  wanted = (x @ w1 + b1) @ w2 + b2
  np.testing.assert_allclose(found, wanted, atol=1e-5)
