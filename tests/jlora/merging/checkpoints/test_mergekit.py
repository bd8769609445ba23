# SPDX-License-Identifier: Apache-2.0
"""Recipes: every key of mergekit's that is known, and every other by name."""

import re

import numpy as np
import pytest
import yaml

from jlora.merging.checkpoints.mergekit import FORMS, read_recipe
from jlora.merging.checkpoints.recipes import first_setting, setting_at
from jlora.pairing.match import common_rows, same_rows

TWO = [
  {"model": "a", "parameters": {"weight": 0.7}},
  {"model": "b", "parameters": {"weight": 0.3}},
]
LINEAR = {"merge_method": "linear", "models": TWO}
TIES = {"merge_method": "ties", "base_model": "o", "models": TWO}


@pytest.fixture
def read(tmp_path):
  def read(recipe):
    file = tmp_path / "recipe.yml"
    file.write_text(recipe if isinstance(recipe, str) else yaml.dump(recipe))
    return read_recipe(file)

  return read


def test_models_their_weights_and_the_order(read):
  recipe = read(LINEAR)
  assert recipe.models == ["a", "b"]
  (part,) = recipe.slices
  assert [one.settings for one in part.inputs] == [
    {"weight": 0.7}, {"weight": 0.3}
  ]  # fmt: skip
  assert recipe.base is None
  assert recipe.vocabulary is same_rows
  assert recipe.dtype is None


def test_a_base_lends_its_names_where_nothing_is_subtracted(read):
  recipe = read({**LINEAR, "base_model": "b"})
  assert (recipe.base, recipe.reference) == (None, "b")
  assert recipe.models == ["b", "a"]
  assert read(TIES).base == "o"


def test_the_dtype_of_the_result(read):
  assert read({**LINEAR, "dtype": "bfloat16"}).dtype == "bfloat16"
  both = {"dtype": "float32", "out_dtype": "float16"}
  assert read({**LINEAR, **both}).dtype == "float16"


def test_the_tokenizer_of_the_base_takes_common_rows(read):
  assert read({**TIES, "tokenizer_source": "base"}).vocabulary is common_rows


def test_slices_and_ranges_of_layers(read):
  source = {"model": "a", "layer_range": [1, 3], "parameters": {"scale": 2}}
  recipe = read({
    "merge_method": "passthrough",
    "slices": [{"sources": [source], "parameters": {"scale": 3}}],
  })  # fmt: skip
  (part,) = recipe.slices
  assert part.inputs[0].layers == (1, 3)
  assert part.inputs[0].settings == {"weight": 2}
  assert part.settings == {"weight": 3}


def test_slerp_begins_at_the_base(read):
  for models in (["a", "b"], ["b", "a"], ["b"]):
    recipe = read({
      "merge_method": "slerp",
      "base_model": "a",
      "models": [{"model": name} for name in models],
      "parameters": {"t": [0.0, 1.0]},
    })  # fmt: skip
    assert [one.model for one in recipe.slices[0].inputs] == ["a", "b"]
    assert recipe.base is None


def test_settings_have_our_names(read):
  parameters = {"lambda": 0.5, "density": 0.2, "int8_mask": True}
  recipe = read({**TIES, "parameters": {**parameters, "normalize": False}})
  assert recipe.settings == {"scale": 0.5, "density": 0.2}
  assert recipe.method.keywords["normalize"] is False


@pytest.mark.parametrize(
  ("method", "parameters", "options"),
  [
    ("nuslerp", {}, {}),
    ("nuslerp", {"nuslerp_flatten": True}, {"axis": None}),
    ("nuslerp", {"nuslerp_flatten": False}, {"axis": -1}),
    (
      "nuslerp",
      {"nuslerp_flatten": False, "nuslerp_row_wise": True},
      {"axis": 0},
    ),
    ("karcher", {"max_iter": 3, "tol": 1e-4}, {"steps": 3, "tol": 1e-4}),
    ("model_stock", {"filter_wise": True}, {"axis": -1}),
    ("breadcrumbs", {"gamma": 0.1}, {"gamma": 0.1, "erases_small": True}),
    ("della", {"epsilon": 0.1}, {"epsilon": 0.1}),
  ],
)
def test_what_cannot_vary_is_an_option(read, method, parameters, options):
  models = [{"model": "a"}, {"model": "b"}]
  if FORMS[method].required:
    parameters = {**parameters, "weight": 1}
  recipe = read({
    "merge_method": method,
    "base_model": "o",
    "models": models,
    "parameters": parameters,
  })  # fmt: skip
  found = getattr(recipe.method, "keywords", {})
  assert options.items() <= found.items()


def test_an_option_of_each_model_must_be_the_same(read):
  def recipe(left, right):
    models = [
      {"model": name, "parameters": {"weight": 1, "gamma": gamma}}
      for name, gamma in (("a", left), ("b", right))
    ]
    return {"merge_method": "breadcrumbs", "base_model": "o", "models": models}

  assert read(recipe(0.1, 0.1)).method.keywords["gamma"] == 0.1
  with pytest.raises(ValueError, match=r"gamma is 0.1 and 0.2"):
    read(recipe(0.1, 0.2))


@pytest.mark.parametrize("name", FORMS)
def test_every_method_is_read(read, name):
  form = FORMS[name]
  given = dict.fromkeys(form.numbers, 0.5)
  wide = {k: v for k, v in given.items() if k in ("weight", "density")}
  rest = {k: v for k, v in given.items() if k not in wide}
  recipe = read({
    "merge_method": name,
    "base_model": "o",
    "models": [{"model": "a", "parameters": wide}],
    "parameters": rest,
  })  # fmt: skip
  assert callable(recipe.method)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"merge_method": "arcee_fusion"}, "'arcee_fusion' is none of linear"),
    ({"merge_method": None}, "None is none of"),
    ({"chat_template": "auto"}, "chat_template, which is not known"),
    ({"tokenizer_source": "union"}, "'union': only `base`"),
    ({"dtype": "int8"}, "dtype 'int8' is none of"),
    ({"out_dtype": "x"}, "out_dtype 'x' is none of"),
    ({"slices": []}, "one of the two"),
    ({"models": []}, "no models to merge"),
    ({"models": ["a"]}, "a model is no mapping: 'a'"),
    ({"models": [{"modle": "a"}]}, "modle, which is not known"),
    ({"models": [{"parameters": {"weight": 1}}]}, "has no `model`"),
    ({"models": [{"model": "a"}]}, "weight is not given for a"),
    ({"models": [{"model": 1}]}, "model of a model is 1, no str"),
    ({"parameters": {"densty": 1}}, "parameters densty are not known"),
    ({"parameters": {"weight": "much"}}, "weight: 'much' is no number"),
    ({"parameters": {"weight": [[1, 2]]}}, "is no number"),
    ({"parameters": {"weight": [{"filter": "x"}]}}, "weight: None"),
    ({"parameters": {"weight": [{"fliter": "x"}]}}, "fliter, which is not"),
    ({"parameters": {"normalize": "yes"}}, "normalize: 'yes' is not known"),
  ],
)
def test_what_is_not_known_is_said_by_name(read, change, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    read({**LINEAR, **change})


def test_more_that_is_refused(read):
  with pytest.raises(ValueError, match="ties needs a base_model"):
    read({**TIES, "base_model": None})
  with pytest.raises(ValueError, match=r"rescale: True .* only False"):
    read({**TIES, "parameters": {"rescale": True}})
  models = [{"model": "a", "parameters": {"weight": 1, "lambda": 1}}]
  with pytest.raises(ValueError, match="lambda of a: one for all models"):
    read({**TIES, "models": models})
  slices = [{"sources": [{"model": "a", "layer_range": [1]}]}]
  with pytest.raises(ValueError, match=r"layer_range \[1\] of a"):
    read({"merge_method": "passthrough", "slices": slices})
  with pytest.raises(ValueError, match="cannot be read"):
    read("a: [")
  with pytest.raises(ValueError, match="the recipe is no mapping"):
    read("just words")


def test_gradients_and_filters_as_mergekit_has_them():
  """The values that mergekit 0.1.5 gave for these recipes, five layers."""
  places = np.linspace(0, 1, 5)
  assert [setting_at([0.0, 1.0], "q", p) for p in places] == [
    0, 0.25, 0.5, 0.75, 1
  ]  # fmt: skip
  conditions = [
    {"filter": "q_proj", "value": [0, 0.5]},
    {"filter": "norm", "value": 7},
    {"value": 3},
  ]
  assert setting_at(conditions, "layers.1.q_proj", 0.25) == 0.125
  assert setting_at(conditions, "model.norm.weight", 0.0) == 7
  assert setting_at(conditions, "lm_head.weight", 0.0) == 3


def test_a_condition_that_does_not_hold_leaves_it_to_the_next_level():
  levels = [{"weight": [{"filter": "q", "value": 1}]}, {"weight": 3}]
  assert first_setting(levels, "weight", "q", 0.0) == 1
  assert first_setting(levels, "weight", "k", 0.0) == 3
  assert first_setting(levels[:1], "weight", "k", 0.0) is None
