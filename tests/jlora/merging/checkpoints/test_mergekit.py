# SPDX-License-Identifier: Apache-2.0
"""Recipes: every key of mergekit's that is known, and every other by name."""

import contextlib
import copy
import re

import numpy as np
import pytest
import yaml

from jlora.merging.arrays.sparsifiers import match_l1, unscaled
from jlora.merging.checkpoints.mergekit import read_recipe, read_recipes
from jlora.merging.checkpoints.mergekit_forms import FORMS, IDLE, KNOWN
from jlora.merging.checkpoints.mergekit_tokenizers import CHAT_TEMPLATES
from jlora.merging.checkpoints.recipes import (
  Tokenizer,
  TokenSource,
  first_setting,
  setting_at,
)
from jlora.pairing.match import same_rows

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


TOKENIZERS = {
  "tokenizer_source: base": Tokenizer("base"),
  "tokenizer_source: union": Tokenizer("union"),
  "tokenizer_source: a": Tokenizer("a"),
  "tokenizer: {}": Tokenizer("union"),
  "tokenizer: {source: b, pad_to_multiple_of: 8}": Tokenizer("b", {}, 8),
  "tokenizer: {source: base, pad_to_multiple_of: null}": Tokenizer("base"),
  "tokenizer: {tokens: {<x>: {}}}": Tokenizer("union", {"<x>": None}),
  "tokenizer: {tokens: {<x>: {source: a}}}": Tokenizer(
    "union", {"<x>": TokenSource("a")}
  ),
  "tokenizer: {tokens: {<x>: {source: a, force: true}}}": Tokenizer(
    "union", {"<x>": TokenSource("a", force=True)}
  ),
  "tokenizer: {tokens: {<x>: {source: {kind: zero}}}}": Tokenizer(
    "union", {"<x>": TokenSource()}
  ),
  "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: a, "
  "token: <y>}}}}": Tokenizer("union", {"<x>": TokenSource("a", "<y>")}),
  "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: a, "
  "token_id: 3}}}}": Tokenizer("union", {"<x>": TokenSource("a", None, 3)}),
}


@pytest.mark.parametrize("text", TOKENIZERS)
def test_tokenizers(read, text):
  recipe = read(f"{yaml.dump(LINEAR)}{text}\n")
  assert recipe.tokenizer == TOKENIZERS[text]
  assert recipe.vocabulary is same_rows
  assert read(LINEAR).tokenizer is None


def test_chat_templates(read):
  own = "{{ messages[0]['content'] }}"
  assert read(LINEAR).chat_template is None
  for given in ("auto", own):
    assert read({**LINEAR, "chat_template": given}).chat_template == given
  for name in CHAT_TEMPLATES:
    assert "{%" in read({**LINEAR, "chat_template": name}).chat_template


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
    ("ties", {"rescale": True}, {"rescale": match_l1}),
    ("breadcrumbs", {"rescale": True}, {"rescale": match_l1}),
    ("dare_ties", {"rescale": False}, {"rescale": unscaled}),
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


def test_an_option_is_one_for_all_slices(read):
  def recipe(*given):
    slices = [
      {"sources": [{"model": "a", "layer_range": [0, 1]}], "parameters": one}
      for one in given
    ]
    return {**LINEAR, "slices": slices, "models": None} | {
      "parameters": {"weight": 1}
    }

  both = recipe({"normalize": False}, {"normalize": False})
  assert read(both).method.keywords == {"normalize": False}
  with pytest.raises(ValueError, match="normalize is False, None in slices"):
    read(recipe({"normalize": False}, {}))


def test_numbers_of_each_model(read):
  """What mergekit has for each model: gamma and epsilon too."""
  for method, key in (("breadcrumbs", "gamma"), ("della_linear", "epsilon")):
    models = [
      {"model": name, "parameters": {"weight": 1, key: value}}
      for name, value in (("a", 0.1), ("b", 0.2))
    ]
    recipe = read({"merge_method": method, "base_model": "o", "models": models})
    inputs = recipe.slices[0].inputs
    assert [one.settings[key] for one in inputs] == [0.1, 0.2]
    assert key in recipe.of_inputs


@pytest.mark.parametrize("name", FORMS)
def test_every_method_is_read(read, name):
  form = FORMS[name]
  given = dict.fromkeys(form.numbers, 0.5)
  own = {k: v for k, v in given.items() if k in form.by_model}
  rest = {k: v for k, v in given.items() if k not in own}
  recipe = read({
    "merge_method": name,
    "base_model": "o",
    "models": [{"model": "a", "parameters": own}],
    "parameters": rest,
  })  # fmt: skip
  assert callable(recipe.method)
  assert len(recipe.notes) == (form.base == "averaged")


@pytest.mark.parametrize("name", FORMS)
def test_what_a_method_does_not_have_is_left_out_and_said(name, read):
  """As mergekit leaves it out, without a word."""
  form = FORMS[name]
  others = sorted(KNOWN - IDLE - {*form.numbers, *form.constants})
  needed = {key: 1 for key in form.required}
  recipe = {
    "merge_method": name,
    "base_model": "o",
    "models": [{"model": "a"}, {"model": "o"}],
    "parameters": {**needed, **dict.fromkeys(others, 1)},
  }
  said = lambda notes: [n for n in notes if "left out" in n]  # noqa: E731
  notes = said(read(recipe).notes)
  assert sorted(note.split(":")[0] for note in notes) == others
  assert all(f"{name} has no such parameter" in note for note in notes)
  wide = sorted(set(form.numbers) - set(form.by_model) - set(form.required))
  model = {"model": "a", "parameters": dict.fromkeys(wide, 1)}
  notes = said(read(recipe | {"models": [model], "parameters": needed}).notes)
  assert len(notes) == len(wide)
  assert all("of a single model: left out" in note for note in notes)


def test_parameters_outside_of_parameters_are_left_out_and_said(read):
  """As mergekit leaves them out; a number that is needed is then missed."""
  models = [{**one, "density": 0.5} for one in TWO]
  recipe = read({**TIES, "models": models, "normalize": False})
  assert recipe.notes == (
    *(
      f"{what}: left out, as by mergekit; it goes to `parameters`"
      for what in ("normalize of the recipe", "density of a model")
    ),
  )
  assert "normalize" not in recipe.method.keywords
  with pytest.raises(ValueError, match="weight is not given for a"):
    read({**LINEAR, "models": [{"model": "a", "weight": 1}]})


def test_negative_weights_under_normalize_are_said(read):
  """Where signs are elected; without an election the mean is mergekit's."""
  models = [
    {"model": "a", "parameters": {"weight": 1}},
    {"model": "b", "parameters": {"weight": [{"value": [0.5, -0.5]}]}},
  ]
  for method, is_said in (
    ("ties", True), ("della", True), ("task_arithmetic", False),
    ("dare_ties", False), ("sce", False),
  ):  # fmt: skip
    recipe = {"merge_method": method, "base_model": "o", "models": models}
    notes = [n for n in read(recipe).notes if "negative weights" in n]
    assert bool(notes) == is_said
    recipe["parameters"] = {"normalize": method == "dare_ties"}
    notes = [n for n in read(recipe).notes if "negative weights" in n]
    assert bool(notes) == (method == "dare_ties")


def test_numbers_that_yaml_reads_as_words(read):
  text = yaml.dump(LINEAR).replace("0.7", "7e-1").replace("0.3", "[1e0, .5e-3]")
  inputs = read(text).slices[0].inputs
  assert [one.settings["weight"] for one in inputs] == [0.7, [1.0, 0.0005]]
  text = "merge_method: karcher\nmodels: [model: a]\nparameters: {tol: 1e-10}\n"
  assert read(text).method.keywords == {"tol": 1e-10}


def test_one_condition_without_a_list(read):
  models = [
    {"model": "a", "parameters": {"weight": {"filter": "q", "value": 1}}}
  ]
  recipe = read({**LINEAR, "models": models})
  assert recipe.slices[0].inputs[0].settings == {
    "weight": [{"filter": "q", "value": 1}]
  }


def test_a_base_of_a_slice(read):
  def recipe(method, *bases):
    slices = [
      {
        "sources": [
          {"model": name, "layer_range": [0, 1], "parameters": {"weight": 1}}
          for name in "ab"
        ],
        "base_model": base,
      }
      for base in bases
    ]
    raw = {"merge_method": method, "slices": slices, "base_model": "a"}
    return read({**raw, "parameters": {"t": 0.5}})

  found = recipe("slerp", "b", None)
  firsts = [part.inputs[0].model for part in found.slices]
  assert firsts == ["b", "a"]
  found = recipe("task_arithmetic", "o", None)
  assert [part.base for part in found.slices] == ["o", None]
  assert found.models == ["a", "o", "b"]


def test_karcher_averages_the_base_too(read):
  for models, expected in ((["a", "b"], ["a", "b", "o"]), (["o", "a"],) * 2):
    recipe = read({
      "merge_method": "karcher",
      "base_model": "o",
      "models": [{"model": name} for name in models],
    })  # fmt: skip
    assert [one.model for one in recipe.slices[0].inputs] == expected
    assert (recipe.base, recipe.reference) == (None, "o")
    assert recipe.notes == (
      "base_model o: karcher averages it too, as in mergekit",
    )


def test_modules_of_one_kind(read):
  inner = {"models": TWO}
  for name in ("default", "text_decoder"):
    recipe = read({"merge_method": "linear", "modules": {name: inner}})
    assert recipe == read(LINEAR)
  with pytest.raises(
    ValueError, match="modules are vision_tower; known is.*whole.*`models`"
  ):
    read({"merge_method": "linear", "modules": {"vision_tower": inner}})


def test_models_in_the_long_form(read):
  models = [
    {"model": {"model": {"path": "a"}, "lora": {"path": "l"}}},
    {"model": {"path": "b"}},
  ]
  assert read({"merge_method": "karcher", "models": models}).models == [
    "a+l",
    "b",
  ]
  with pytest.raises(ValueError, match="a model has revision, which is not"):
    read({**LINEAR, "models": [{"model": {"path": "a", "revision": "x"}}]})


SEVERAL = """
merge_method: slerp
base_model: one
models: [{model: two}]
parameters: {t: 0.5}
---
name: two
merge_method: passthrough
models: [{model: one}]
---
name: one
merge_method: passthrough
models: [{model: a}]
"""


def test_several_recipes_in_a_file(read, tmp_path):
  file = tmp_path / "recipes.yml"
  file.write_text(SEVERAL)
  with pytest.raises(ValueError, match="holds 3 recipes; read them with"):
    read_recipe(file)
  found = read_recipes(file, "mid")
  assert [place and place.as_posix() for place, _ in found] == [
    "mid/one", "mid/two", None
  ]  # fmt: skip
  assert found[-1][1].models == ["mid/one", "mid/two"]
  for change, said in (
    (("models: [{model: a}]", "models: [{model: two}]"), "build on each other"),
    (("name: one", "name: two"), "two recipes have the name two"),
    (("name: one", ""), "two recipes have no name"),
    (("name: one", "name: ../one"), "is no name of a folder"),
  ):
    file.write_text(SEVERAL.replace(*change))
    with pytest.raises(ValueError, match=said):
      read_recipes(file, "mid")


def test_an_adapter_or_a_token_of_another_recipe_is_waited_for(tmp_path):
  file = tmp_path / "recipes.yml"
  one = "---\nname: one\nmerge_method: passthrough\nmodels: [{model: a}]\n"
  token = "tokenizer: {tokens: {<x>: {source: one}}}\n"
  for model, more, expected in (
    ("one+l", "", "mid/one+l"),
    ("b+one", "", "b+mid/one"),
    ("{model: {path: b}, lora: {path: one}}", "", "b+mid/one"),
    ("b", token, "b"),
  ):
    last = f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n"
    file.write_text(f"{last}{more}{one}")
    found = read_recipes(file, "mid")
    assert [place and place.name for place, _ in found] == ["one", None]
    assert found[1][1].models == [expected]


def test_a_base_among_the_models_needs_its_weight(read):
  """Unless it is subtracted from them."""
  models = [{"model": "o"}, TWO[0]]
  raw = {**LINEAR, "base_model": "o", "models": models}
  with pytest.raises(ValueError, match="weight is not given for o"):
    read(raw)
  assert read({**raw, "merge_method": "ties"}).base == "o"


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"merge_method": "mean"}, "'mean' is none of linear"),
    ({"merge_method": None}, "None is none of"),
    ({"chat_template": "chatlm"}, "'chatlm' is none of auto, chatml"),
    (
      {"tokenizer_source": "base", "tokenizer": {}},
      "Give `tokenizer` or `tokenizer_source`",
    ),
    ({"tokenizer": {"sauce": "base"}}, "tokenizer has sauce, which is not"),
    ({"tokenizer": {"pad_to_multiple_of": -1}}, "is -1; give 1 or more"),
    (
      {"tokenizer": {"tokens": {"<x>": {"source": {"kind": "one"}}}}},
      "source of token <x> is {'kind': 'one'}; give {kind: zero}",
    ),
    (
      {"tokenizer": {"tokens": {"<x>": {"force": 1}}}},
      "force of token <x> is 1",
    ),
    ({"dtype": "int8"}, "dtype 'int8' is none of"),
    ({"out_dtype": "x"}, "out_dtype 'x' is none of"),
    ({"slices": []}, "`models`, `slices` or `modules`, one of them"),
    ({"slices": [], "models": None}, "no slices to merge"),
    ({"models": []}, "no models to merge"),
    ({"models": ["a"]}, "a model is no mapping: 'a'"),
    ({"models": [{"modle": "a"}]}, "modle, which is not known"),
    ({"models": [{"parameters": {"weight": 1}}]}, "has no `model`"),
    ({"models": [{"model": "a"}]}, "weight is not given for a"),
    ({"models": [{"model": 1}]}, "1 is no path of a model"),
    (
      {"parameters": {"densty": 1}},
      "parameters densty are not known; is density meant?",
    ),
    (
      {"parameters": {"xyz": 1}},
      "xyz are not known. linear has normalize, weight",
    ),
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
  slices = [{"sources": [{"model": "a", "layer_range": [1]}]}]
  with pytest.raises(ValueError, match=r"layer_range \[1\] of a"):
    read({"merge_method": "passthrough", "slices": slices})
  with pytest.raises(ValueError, match="cannot be read"):
    read("a: [")
  with pytest.raises(ValueError, match="the recipe is no mapping"):
    read("just words")


def places_in(value, path=()):
  """Every place in a recipe."""
  yield path
  pairs = value.items() if isinstance(value, dict) else ()
  pairs = enumerate(value) if isinstance(value, list) else pairs
  for key, one in pairs:
    yield from places_in(one, (*path, key))


RICH = """
name: x
merge_method: ties
base_model: o
slices:
- sources:
  - model: {model: {path: a}, lora: {path: l}}
    layer_range: [0, 2]
    parameters: {weight: [{filter: q, value: [0, 1]}, {value: 1}], density: 0.5}
  parameters: {weight: {filter: m, value: 2}}
  base_model: b
parameters: {weight: 1, normalize: true, rescale: false, lambda: 1.0}
tokenizer:
  source: union
  tokens:
    <x>: {source: {kind: model_token, model: a, token_id: 3}, force: true}
  pad_to_multiple_of: 8
chat_template: chatml
"""
ODD = (None, 1, -1, 0.5, True, "x", "", [], {}, [1], {"a": 1}, [None], {1: 2})
ODD += (float("nan"), 10**400, [{}], [{"value": None}], "{{")


def test_anything_anywhere_is_read_or_a_valueerror(tmp_path):
  file = tmp_path / "r.yml"
  other = {"merge_method": "linear", "modules": {"default": {"models": TWO}}}
  raws = yaml.safe_load(RICH), other
  cases = [
    (raw, path, x) for raw in raws for path in places_in(raw) for x in ODD
  ]
  assert len(cases) > 500
  for raw, path, value in cases[::7]:  # all take minutes; 7 meets every value
    changed = copy.deepcopy(raw) if path else value
    inner = changed
    for key in path[:-1]:
      inner = inner[key]
    if path:
      inner[path[-1]] = value
    file.write_text(yaml.dump(changed))
    for reads in (read_recipe, lambda file: read_recipes(file, "mid")):
      with contextlib.suppress(ValueError):
        reads(file)


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
