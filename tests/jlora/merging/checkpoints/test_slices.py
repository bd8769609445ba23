# SPDX-License-Identifier: Apache-2.0
"""Layers put together anew, against transformers' own modules."""

import copy
import io
import json
import re

import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.merging.checkpoints.mergekit import read_recipe
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.run import merge_checkpoints
from jlora.pairing.layer_numbers import configure_layers
from jlora.pairing.layers import find_layers
from tests.helpers import tiny_models

TOKENS = torch.arange(7)[None]


def run(recipe, out):
  return merge_checkpoints(recipe, out, log=io.StringIO())


def logits_of(folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  with torch.no_grad():
    return model.eval()(TOKENS, use_cache=False).logits.numpy()


@pytest.mark.parametrize("case", ["llama-tied", "qwen3", "gpt2"])
def test_repeated_layers_run_in_transformers(case, tmp_path):
  folder = tmp_path / "model"
  tiny_models.write_model(folder, case)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  parts = (
    Slice((Input(str(folder), (0, 2)),)),
    Slice((Input(str(folder), (0, 1)),)),
    Slice((Input(str(folder), (1, 2)),)),
  )
  run(Recipe(jlora.merging.passthrough, parts), tmp_path / "out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config.get("num_hidden_layers", config.get("n_layer")) == 4
  body = model.transformer if case == "gpt2" else model.model
  name = "h" if case == "gpt2" else "layers"
  layers = getattr(body, name)
  setattr(
    body,
    name,
    torch.nn.ModuleList(copy.deepcopy(layers[at]) for at in (0, 1, 0, 1)),
  )
  model.config.num_hidden_layers = 4
  if hasattr(model.config, "layer_types"):
    model.config.layer_types = model.config.layer_types * 2
  with torch.no_grad():
    expected = model.eval()(TOKENS, use_cache=False).logits.numpy()
  np.testing.assert_allclose(
    logits_of(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5
  )


@pytest.fixture
def three(tmp_path):
  """Models whose entries all are 0, 1 and 2, of five layers."""
  paths = []
  for value, name in enumerate("abc"):
    folder = tmp_path / name
    folder.mkdir()
    tensors = {
      "model.embed_tokens.weight": np.full((4, 2), value, np.float32),
      "model.norm.weight": np.full(2, value, np.float32),
      "lm_head.weight": np.full((4, 2), value, np.float32),
    }
    tensors |= {
      f"model.layers.{at}.q_proj.weight": np.full((2, 2), value, np.float32)
      for at in range(5)
    }
    jlora.checkpoints.write_safetensors(folder / "model.safetensors", tensors)
    text = json.dumps({"num_hidden_layers": 5, "layer_types": list("vwxyz")})
    (folder / "config.json").write_text(text)
    paths.append(str(folder))
  return paths


def corners(folder):
  return {
    name.removeprefix("model.").removesuffix(".weight"): float(array.flat[0])
    for name, array in open_checkpoint(folder).items()
  }


SLICES = """
merge_method: {method}
slices:
  - sources:
      - model: {b}
        layer_range: [0, 3]
        parameters: {{{key}: [0.0, 1.0]}}
  - sources:
      - model: {c}
        layer_range: [1, 4]
        parameters: {{{key}: [0.0, 1.0]}}
parameters: {options}
"""


@pytest.mark.parametrize(
  ("method", "key", "options"),
  [("linear", "weight", "{normalize: false}"), ("passthrough", "scale", "{}")],
)
def test_gradients_run_along_each_slice(method, key, options, three, tmp_path):
  """What mergekit 0.1.5 gave for this recipe with `linear`."""
  _, b, c = three
  file = tmp_path / "recipe.yml"
  file.write_text(
    SLICES.format(method=method, b=b, c=c, key=key, options=options)
  )
  run(read_recipe(file), tmp_path / "out")
  layers = [f"layers.{at}.q_proj" for at in range(6)]
  assert corners(tmp_path / "out") == {
    "embed_tokens": 0.0,
    **dict(zip(layers, [0.0, 0.5, 1.0, 0.0, 1.0, 2.0], strict=True)),
    "norm": 0.0,
    "lm_head": 0.0,
  }
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["layer_types"] == list("vwxwxy")


def test_what_lies_before_layers_is_the_first_models(three, tmp_path):
  """What mergekit 0.1.5 gave for this recipe."""
  _, b, c = three
  parts = (Slice((Input(b, (0, 3)),)), Slice((Input(c, (1, 4)),)))
  run(Recipe(jlora.merging.passthrough, parts), tmp_path / "out")
  found = corners(tmp_path / "out")
  assert found["embed_tokens"] == 1
  assert found["norm"] == found["lm_head"] == 2
  assert [found[f"layers.{at}.q_proj"] for at in range(6)] == [1] * 3 + [2] * 3


def test_slices_have_a_base_of_their_own_layers(three, tmp_path):
  a, b, c = three
  parts = (
    Slice((Input(a, (0, 2)), Input(b, (0, 2)), Input(c, (3, 5)))),
    Slice((Input(c, (0, 1)),)),
  )
  recipe = Recipe(jlora.merging.task_arithmetic, parts, {"weight": 0.5}, base=a)
  run(recipe, tmp_path / "out")
  found = corners(tmp_path / "out")
  assert [found[f"layers.{at}.q_proj"] for at in range(3)] == [1.5, 1.5, 1.0]


ONE_LAYER = """
merge_method: linear
slices:
  - sources: [{{model: {b}, layer_range: [0, 2]}}]
  - sources:
      - model: {c}
        layer_range: [2, 3]
        parameters: {{weight: [0.1, 0.9]}}
  - sources:
      - model: {c}
        layer_range: [1, 3]
        parameters:
          weight:
            - {{filter: layers.2., value: 5}}
            - {{filter: layers.4., value: 7}}
            - value: 3
parameters: {{normalize: false, weight: 1}}
"""


def test_one_layer_and_filters_by_number(three, tmp_path):
  """As mergekit 0.1.5: a gradient's end, and the names in the inputs."""
  _, b, c = three
  (tmp_path / "recipe.yml").write_text(ONE_LAYER.format(b=b, c=c))
  report = run(read_recipe(tmp_path / "recipe.yml"), tmp_path / "out")
  found = corners(tmp_path / "out")
  layers = [found[f"layers.{at}.q_proj"] for at in range(5)]
  np.testing.assert_allclose(layers, [1, 1, 1.8, 6, 10], rtol=1e-6)
  assert report.notes == [
    "layers [2, 3]: a gradient over one layer is at its end, as in mergekit",
    *(
      f"weight, filter layers.{n}.: layers are counted as in the model that "
      "they come from, as in mergekit"
      for n in (2, 4)
    ),
  ]


def test_filters_of_the_whole_merge_see_the_results_numbers(three, tmp_path):
  a, b, _ = three
  rule = [{"filter": "layers.2.", "value": 2.0}, {"value": 1.0}]
  parts = [Slice((Input(b, (0, 2)),)), Slice((Input(b, (1, 3)),))]
  method = jlora.merging.task_arithmetic
  recipe = Recipe(method, tuple(parts), {"scale": rule}, base=a)
  run(recipe, tmp_path / "out")
  found = corners(tmp_path / "out")
  assert [found[f"layers.{at}.q_proj"] for at in range(4)] == [1, 1, 2, 1]


def test_a_gradient_runs_along_every_stack_of_layers(tmp_path):
  """Of an encoder and a decoder, of which no configuration tells one."""
  names = [f"encoder.block.{at}.w" for at in range(3)]
  names += [f"decoder.block.{at}.w" for at in range(2)] + ["one.layer.0.w"]
  names += ["shared.weight"]
  file = tmp_path / "m.safetensors"
  tensors = {name: np.ones(2, np.float32) for name in names}
  jlora.checkpoints.write_safetensors(file, tensors)
  inputs = (Slice((Input(str(file)),)),)
  recipe = Recipe(jlora.merging.passthrough, inputs, {"weight": [1.0, 3.0]})
  run(recipe, tmp_path / "out")
  found = open_checkpoint(tmp_path / "out")
  assert [float(found[name][0]) for name in names] == [1, 2, 3, 1, 3, 3, 1]


def test_slices_with_bases_of_their_own(three, tmp_path):
  a, b, c = three
  parts = (
    Slice((Input(c, (0, 1)),), {}, a),
    Slice((Input(c, (1, 2)),), {}, b),
    Slice((Input(c, (2, 3)),)),
  )
  recipe = Recipe(jlora.merging.task_arithmetic, parts, {"scale": 3.0}, base=b)
  run(recipe, tmp_path / "out")
  found = corners(tmp_path / "out")
  assert [found[f"layers.{at}.q_proj"] for at in range(3)] == [6, 4, 4]


def test_an_order_that_a_configuration_cannot_say(three, tmp_path):
  """Is refused before anything is written."""
  _, b, _ = three
  config = f"{b}/config.json"
  with open(config, "w") as stream:
    json.dump({"num_hidden_layers": 5, "first_k_dense_replace": 1}, stream)
  parts = (Slice((Input(b, (0, 2)),)), Slice((Input(b, (0, 2)),)))
  with pytest.raises(ValueError, match="first_k_dense_replace 1, which cannot"):
    run(Recipe(jlora.merging.passthrough, parts), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_layers_that_are_not_there(three, tmp_path):
  a, b, _ = three
  for parts, said in (
    ((Slice((Input(a, (3, 6)),)),), "has no layer 5"),
    (
      (Slice((Input(a, (0, 2)), Input(b, (0, 3)))),),
      "must be as many of each model",
    ),
    ((Slice((Input(a, (2, 2)),)),), "must be as many"),
  ):
    with pytest.raises(ValueError, match=said):
      run(Recipe(jlora.merging.passthrough, parts), tmp_path / "out")


def test_layers_in_names():
  tower = [f"vision.layers.{at}.q" for at in range(3)]
  names = [*tower, *(f"model.layers.{at}.q" for at in range(2))]
  assert find_layers(names, 2).prefix == "model.layers."
  with pytest.raises(ValueError, match="does not tell"):
    find_layers(names, 7)
  assert find_layers(["w"]).count == 0
  nested = {"text_config": {"num_hidden_layers": 2}, "x": 1}
  assert configure_layers(nested, [0, 1, 1]) == {
    "text_config": {"num_hidden_layers": 3}, "x": 1
  }  # fmt: skip


BASE_OF_A_SLICE = """
merge_method: {method}
slices:
  - base_model: {b}
    sources:
      - {{model: {b}, layer_range: [0, 1]}}
      - {{model: {c}, layer_range: [1, 2]}}
  - base_model: {b}
    sources:
      - {{model: {b}, layer_range: [1, 2]}}
      - {{model: {c}, layer_range: [0, 1]}}
parameters: {options}
"""


@pytest.mark.parametrize(
  ("method", "options", "expected", "said"),
  [
    ("linear", "{weight: 1}", 1.5, "base_model .*/b of a slice: left out"),
    ("slerp", "{t: 0.5}", 1.5, None),
    ("karcher", "{}", 1.5, None),
    ("multislerp", "{weight: 1}", 2.0, None),
    ("task_arithmetic", "{weight: 3}", 4.0, None),
  ],
)
def test_a_base_that_only_slices_have(
  method, options, expected, said, three, tmp_path
):
  """It is merged where it is one of the models, else subtracted."""
  _, b, c = three
  text = BASE_OF_A_SLICE.format(method=method, b=b, c=c, options=options)
  (tmp_path / "r.yml").write_text(text)
  report = run(read_recipe(tmp_path / "r.yml"), tmp_path / "out")
  found = corners(tmp_path / "out")
  layers = [found[f"layers.{at}.q_proj"] for at in range(2)]
  np.testing.assert_allclose(layers, expected, rtol=1e-6)
  assert [bool(re.search(said, note)) for note in report.notes] == (
    [True] if said else []
  )


def test_slices_of_an_encoder_and_a_decoder_are_refused(three, tmp_path):
  """Also where config.json has the number of one of the two."""
  _, b, _ = three
  tensors = dict(open_checkpoint(b))
  decoder = {
    name.replace("model.layers", "model.decoder.layers"): array
    for name, array in tensors.items()
    if "layers.4" not in name
  }
  file = f"{b}/model.safetensors"
  jlora.checkpoints.write_safetensors(file, tensors | decoder)
  recipe = Recipe(jlora.merging.passthrough, (Slice((Input(b, (0, 2)),)),))
  for config in ({}, {"num_hidden_layers": 5, "is_encoder_decoder": True}):
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="/b: .*list them as `models`"):
      run(recipe, tmp_path / "out")
  recipe = Recipe(jlora.merging.passthrough, (Slice((Input(b),)),))
  run(recipe, tmp_path / "out")
  assert len(open_checkpoint(tmp_path / "out")) == len(tensors | decoder)
