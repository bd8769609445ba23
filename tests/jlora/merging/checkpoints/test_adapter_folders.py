# SPDX-License-Identifier: Apache-2.0
"""Adapter folders merged into one: PEFT loads it, and it is what it should."""

import functools
import io
import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
from torch import nn

from jlora.checkpoints import write_safetensors
from jlora.formats import load_peft
from jlora.loras import dense
from jlora.merging import (
  Input,
  Recipe,
  Slice,
  core_space,
  dare,
  knots,
  linear,
  merge,
  merge_checkpoints,
  read_recipe,
  slerp,
  task_arithmetic,
  ties,
)


class Experts(nn.Module):
  """A stack of matrices that no module holds."""

  def __init__(self):
    super().__init__()
    self.down_proj = nn.Parameter(torch.randn(3, 6, 8))

  def forward(self, x):
    return torch.einsum("bi,eio->bo", x, self.down_proj)


class Net(nn.Module):
  """A layer of every kind that PEFT puts LoRAs on."""

  def __init__(self):
    super().__init__()
    self.table = nn.Embedding(11, 6)
    self.conv = nn.Conv2d(6, 5, 3, padding=1)
    self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
    self.up = nn.Linear(5, 6)
    self.experts = Experts()
    self.head = nn.Linear(8, 4)

  def forward(self, ids):
    x = self.table(ids).permute(0, 3, 1, 2)
    x = self.conv(x).mean((2, 3))
    for layer in self.layers:
      x = torch.tanh(layer(x))
    return self.head(self.experts(self.up(x)))


EVERY = {
  "target_modules": ["table", "conv", "0", "1", "2", "up"],
  "target_parameters": ["experts.down_proj"],
}
NO_HEAD = {"target_modules": ["0", "2", "up"]}
# Name -> the adapters' own settings of PEFT.
SETS = {
  "all kinds": [
    {**EVERY, "r": 2, "lora_alpha": 6},
    {**EVERY, "r": 3, "lora_alpha": 3, "use_rslora": True},
  ],
  "other modules": [
    {**EVERY, "r": 2, "lora_alpha": 6},
    {**NO_HEAD, "r": 1, "lora_alpha": 4},
    {"target_modules": ["1", "up"], "r": 2, "lora_alpha": 1},
  ],
  "patterns": [
    {**NO_HEAD, "r": 2, "rank_pattern": {"up": 3}, "lora_alpha": 4},
    {**NO_HEAD, "r": 2, "alpha_pattern": {"0": 5}, "lora_alpha": 4},
  ],
  "biases": [
    {**NO_HEAD, "r": 2, "lora_bias": True},
    {**NO_HEAD, "r": 2, "lora_bias": True, "lora_alpha": 16},
  ],
  "a head stored whole": [
    {**NO_HEAD, "r": 2, "modules_to_save": ["head"]},
    {**NO_HEAD, "r": 2, "modules_to_save": ["head"]},
  ],
}


def base():
  torch.manual_seed(0)
  return Net()


def write(folder, settings, seed):
  """Saves an adapter of random numbers, as PEFT does."""
  model = peft.get_peft_model(base(), peft.LoraConfig(**settings))
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name or "modules_to_save" in name:
        parameter.add_(torch.randn_like(parameter))
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*lora_B.bias")  # they have one axis
    model.save_pretrained(folder)


def merged_weights(folder):
  """The model's parameters with an adapter, as PEFT merges them."""
  with warnings.catch_warnings():
    # PEFT looks for patterns of parameters among the names of modules here; it
    # does use them.
    warnings.filterwarnings("ignore", ".*_pattern keys did not match")
    model = peft.PeftModel.from_pretrained(base(), folder)
  state = model.merge_and_unload().state_dict()
  return {name: x.double().numpy() for name, x in state.items()}


def run(method, folders, out, weights=None, *, key=None, **options):
  inputs = tuple(
    Input(str(folder), settings={"weight": w})
    for folder, w in zip(folders, weights or [1.0] * len(folders), strict=True)
  )
  recipe = Recipe(method, (Slice(inputs),), **options)
  return merge_checkpoints(recipe, out, key=key, log=io.StringIO())


@pytest.fixture
def folders(tmp_path):
  """Writes the adapters of a set."""

  def make(name):
    found = []
    for i, settings in enumerate(SETS[name]):
      found.append(tmp_path / f"adapter{i}")
      write(found[-1], settings, i + 1)
    return found

  return make


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("method", [linear, task_arithmetic])
def test_peft_loads_the_sum_of_the_changes(name, method, folders, tmp_path):
  given, out = folders(name), tmp_path / "out"
  weights = [0.7, 0.3, 1.5][: len(given)]
  run(method, given, out, weights)
  if method is linear:
    weights = [w / sum(weights) for w in weights]
  start = {k: v.double().numpy() for k, v in base().state_dict().items()}
  each = [merged_weights(folder) for folder in given]
  found = merged_weights(out)
  assert found.keys() == start.keys()
  for key, value in start.items():
    wanted = value + sum(
      w * (own[key] - value) for w, own in zip(weights, each, strict=True)
    )
    np.testing.assert_allclose(found[key], wanted, rtol=1e-4, atol=2e-5)


def test_a_smaller_rank_is_the_best_and_says_what_it_loses(folders, tmp_path):
  given, out = folders("patterns"), tmp_path / "out"
  report = run(task_arithmetic, given, out, rank=2)
  lost = energy = 0.0
  found = load_peft(out).loras
  for name, lora in found.items():
    whole = sum(np.asarray(dense(load_peft(f).loras[name])) for f in given)
    s = np.linalg.svd(whole, compute_uv=False)
    missing = np.linalg.norm(whole - np.asarray(dense(lora)))
    np.testing.assert_allclose(missing, np.sqrt((s[2:] ** 2).sum()), rtol=1e-4)
    lost, energy = lost + missing**2, energy + (s**2).sum()
  assert (
    f"{np.sqrt(lost / energy):.1%} of the merged change" in report.notes[-1]
  )
  assert json.loads((out / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("space", [core_space, knots])
def test_a_space_is_that_of_the_function(space, folders, tmp_path):
  given, out = folders("patterns"), tmp_path / "out"
  method = functools.partial(space, method=ties)
  run(method, given, out, [1.0, 2.0])
  loras = [load_peft(folder).loras for folder in given]
  for name, lora in load_peft(out).loras.items():
    wanted = space([own[name] for own in loras], [1.0, 2.0], method=ties)
    np.testing.assert_allclose(dense(lora), dense(wanted), rtol=1e-3, atol=1e-4)


def test_ties_is_that_of_the_changes(folders, tmp_path):
  given, out = folders("other modules"), tmp_path / "out"
  method = functools.partial(ties, density=0.5)
  run(method, given, out, [1.0, 2.0, 1.0], rank=99)
  start = {k: v.double().numpy() for k, v in base().state_dict().items()}
  each = [merged_weights(folder) for folder in given]
  wanted = merge(
    [{k: np.float32(own[k] - x) for k, x in start.items()} for own in each],
    method=method,
    base={k: np.zeros(x.shape, np.float32) for k, x in start.items()},
    weights=[1.0, 2.0, 1.0],
  )
  found = merged_weights(out)
  for key, value in wanted.items():
    change = found[key] - start[key]
    np.testing.assert_allclose(change, value, rtol=1e-3, atol=2e-4)


def test_what_is_drawn_hangs_on_the_key(folders, tmp_path):
  given = folders("patterns")
  method = functools.partial(dare, density=0.5)
  seeds = {"one": 0, "again": 0, "other": 1}
  for out, seed in seeds.items():
    run(method, given, tmp_path / out, key=jax.random.key(seed))
  one, again, other = (
    (tmp_path / out / "adapter_model.safetensors").read_bytes() for out in seeds
  )
  assert one == again != other


def test_settings_are_those_of_a_recipe(folders, tmp_path):
  given, out = folders("patterns"), tmp_path / "out"
  (tmp_path / "recipe.yml").write_text(f"""
merge_method: task_arithmetic
base_model: some/model
models:
- model: {given[0]}
  parameters: {{weight: [{{filter: up, value: 2}}, {{value: 0.5}}]}}
- model: {given[1]}
  parameters: {{weight: [0, 1]}}
""")
  merge_checkpoints(
    read_recipe(tmp_path / "recipe.yml"), out, log=io.StringIO()
  )
  loras = [load_peft(folder).loras for folder in given]
  weights = {
    "layers.0.weight": (0.5, 0.0),
    "layers.2.weight": (0.5, 1.0),
    "up.weight": (2.0, 0.0),
  }
  for name, lora in load_peft(out).loras.items():
    wanted = sum(
      w * np.asarray(dense(own[name]))
      for w, own in zip(weights[name], loras, strict=True)
    )
    np.testing.assert_allclose(dense(lora), wanted, rtol=1e-4, atol=1e-5)
  config = json.loads((out / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "some/model"


def test_layers_of_several_kinds_matter_only_to_gradients(tmp_path):
  given = [
    scaled(
      tmp_path / f"a{i}", 1.0 + i, "f4", ("v.layers.0.up", "t.layers.0.up")
    )
    for i in range(2)
  ]
  run(task_arithmetic, given, tmp_path / "out")
  assert len(load_peft(tmp_path / "out").loras) == 2
  with pytest.raises(ValueError, match="Layers of several kinds"):
    run(task_arithmetic, given, tmp_path / "other", [[0.0, 1.0], [1.0, 0.0]])


def test_a_gradient_over_a_single_layer_is_at_its_end(tmp_path):
  """As in merges of models."""
  given = [
    scaled(tmp_path / f"a{i}", 1.0 + i, "f4", ("layers.0.up",))
    for i in range(2)
  ]
  run(task_arithmetic, given, tmp_path / "out", [[0.0, 1.0], [5.0, 2.0]])
  (lora,) = load_peft(tmp_path / "out").loras.values()
  np.testing.assert_allclose(dense(lora), 2 * (1 * 1.0 + 2 * 2.0), rtol=1e-5)


def scaled(folder, by, dtype, modules=("up",)):
  """An adapter whose first factors are times a number."""
  folder.mkdir()
  tensors = {
    f"base_model.model.{module}.lora_{factor}.weight": x.astype(dtype)
    for module in modules
    for factor, x in (("A", by * np.ones((2, 5))), ("B", np.ones((6, 2))))
  }
  write_safetensors(folder / "adapter_model.safetensors", tensors)
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
  config["target_modules"] = ["up"]
  (folder / "adapter_config.json").write_text(json.dumps(config))
  return folder


def test_what_cannot_be_is_refused(folders, tmp_path):
  given, out = folders("a head stored whole"), tmp_path / "out"
  write_safetensors(tmp_path / "m.safetensors", {"w": np.ones(2, np.float32)})
  nan = scaled(tmp_path / "nan", np.nan, "f4")
  large = scaled(tmp_path / "large", 7e4, "f4")
  small = scaled(tmp_path / "small", 1.0, "f4")
  wrong = [
    (slerp, given, {}, "slerp merges models"),
    (linear, [given[0], tmp_path / "m.safetensors"], {}, "m.safetensors.* not"),
    (linear, given, {"base": str(given[0])}, "base .* is an adapter"),
    (task_arithmetic, given, {}, "head.bias is stored whole"),
    (ties, given, {}, "stored whole"),
    (linear, [nan, small], {}, "nan: up.weight is not finite"),
    (
      linear, [small, large], {"dtype": "float16"},
      "up.weight: .* more than float16 holds",
    ),
  ]  # fmt: skip
  for method, models, options, message in wrong:
    with pytest.raises(ValueError, match=message):
      run(method, models, out, **options)
    assert not (out / "adapter_model.safetensors").exists()
