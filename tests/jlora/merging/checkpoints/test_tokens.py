# SPDX-License-Identifier: Apache-2.0
"""Rows merged by token: every rule, on tokenizers that differ.

A row is (model, number there), so that a merged row tells what it is made of.
"""

import io
import json

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.checkpoints import run as merge_runs
from jlora.merging.checkpoints.mergekit import read_recipe
from jlora.merging.checkpoints.report import MERGE
from jlora.merging.checkpoints.run import merge_checkpoints

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Letter -> (tokens by number, its special tokens, rows of its tables).
MODELS = {
  "a": (["<s>", "</s>", "a", "b", "c", "ab"], ["<x>"], 9),
  "b": (["<s>", "</s>", "c", "a", "b", "d", "bc"], ["<y>", "<x>"], 9),
  "c": (["</s>", "<s>", "c", "a", "b", "z"], [], 6),
}
PLACES = {name: at for at, name in enumerate(MODELS)}


def tokens_of(name):
  words, special, _ = MODELS[name]
  return [*words, *special]


def row(name, token, head=False):
  """What stands at a token's row of a model: of width 3, ones where it is."""
  found = np.zeros(3, np.float32)
  at = tokens_of(name).index(token) if isinstance(token, str) else token
  found[PLACES[name]] = 1 + at + 100 * head
  return found


def write(folder, name, tied=False, **settings):
  """A model of two tables, whose rows tell what they are, with a tokenizer."""
  words, special, rows = MODELS[name]
  model = tokenizers.models.BPE({w: n for n, w in enumerate(words)}, [])
  fast = tokenizers.Tokenizer(model)
  fast.pre_tokenizer = pre_tokenizers.Whitespace()
  whole = transformers.PreTrainedTokenizerFast(
    tokenizer_object=fast, bos_token="<s>", eos_token="</s>", **settings
  )
  whole.add_special_tokens({"additional_special_tokens": special})
  whole.save_pretrained(folder)
  tables = {
    key: np.stack([row(name, at, key == HEAD) for at in range(rows)])
    for key in ((TABLE,) if tied else (TABLE, HEAD))
  }
  write_safetensors(f"{folder}/model.safetensors", tables)
  ends = {
    f"{end}_token_id": words.index(token)
    for end, token in (("bos", "<s>"), ("eos", "</s>"))
  }
  config = {"vocab_size": rows, "tie_word_embeddings": tied, **ends}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "generation_config.json").write_text(json.dumps(ends))


@pytest.fixture
def folder(tmp_path):
  for name in MODELS:
    write(tmp_path / name, name)
  return tmp_path


LINEAR = """
merge_method: linear
models:
- {model: $/a, parameters: {weight: 1}}
- {model: $/b, parameters: {weight: 1}}
- {model: $/c, parameters: {weight: 1}}
"""


def merge(folder, text, out="out"):
  (folder / "r.yml").write_text(text.replace("$", str(folder)))
  recipe = read_recipe(folder / "r.yml")
  report = merge_checkpoints(recipe, folder / out, log=io.StringIO())
  return report, open_checkpoint(folder / out), folder / out


def mean(*rows):
  return np.mean(rows, axis=0)


def check(found, out, expected):
  """Tables, config.json and tokenizer agree, and rows are the expected ones."""
  fast = transformers.AutoTokenizer.from_pretrained(out)
  vocabulary = fast.get_vocab()
  assert set(vocabulary) == set(expected)
  config = json.loads((out / "config.json").read_text())
  for head, key in ((False, TABLE), (True, HEAD)):
    table = found[key]
    assert len(table) == config["vocab_size"]
    for token, rows in expected.items():
      wanted = mean(*(row(*one, head) if one else np.zeros(3) for one in rows))
      np.testing.assert_allclose(table[vocabulary[token]], wanted, rtol=1e-6)
  return config, vocabulary


def of_all(token, names="abc"):
  return [(name, token) for name in names]


# Where nobody lacks anything: all three.
SHARED = {token: of_all(token) for token in ("<s>", "</s>", "a", "b", "c")}


def test_the_tokens_of_the_base(folder):
  text = LINEAR + "base_model: $/a\ntokenizer_source: base\n"
  report, found, out = merge(folder, text)
  config, vocabulary = check(
    found,
    out,
    {
      **SHARED,
      "ab": of_all("ab", "aaa"),  # b and c lack it: the base's
      "<x>": of_all("<x>", "aba"),
    },
  )
  # Rows of padding stay: by number, the base's where another has a token there.
  assert config["vocab_size"] == 9
  padding = mean(row("a", 7), row("a", 7), row("a", 7))
  np.testing.assert_allclose(found[TABLE][7], padding)
  assert config["bos_token_id"] == 0
  said = [note for note in report.notes if "lacks" in note]
  assert any(n.startswith(f"{folder}/b lacks 1 tokens, ab") for n in said)
  assert any(n.startswith(f"{folder}/c lacks 2 tokens, ab, <x>") for n in said)


def test_the_tokens_of_all(folder):
  text = LINEAR + "base_model: $/b\ntokenizer_source: union\n"
  report, found, out = merge(folder, text)
  expected = {
    **SHARED,
    "d": of_all("d", "bbb"),
    "bc": of_all("bc", "bbb"),
    "<y>": of_all("<y>", "bbb"),
    "<x>": of_all("<x>", "abb"),
    "ab": of_all("ab", "aaa"),  # the only model that has it
    "z": of_all("z", "ccc"),
  }
  _, vocabulary = check(found, out, expected)
  for number, token in enumerate(tokens_of("b")):  # the base keeps its numbers
    assert vocabulary[token] == number
  assert any("2 tokens are added" in note for note in report.notes)
  added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
  assert {one["content"] for one in added if one["special"]} == {
    "<s>", "</s>", "<x>", "<y>"
  }  # fmt: skip


def test_without_a_base_the_mean_of_those_that_have_a_token(folder):
  text = LINEAR + "tokenizer: {source: union}\n"
  _, found, out = merge(folder, text)
  check(
    found,
    out,
    {
      **SHARED,
      "ab": of_all("ab", "aaa"),
      "<x>": of_all("<x>", "abab"),  # c lacks it: the mean of a and b
      "d": of_all("d", "bbb"),
      "bc": of_all("bc", "bbb"),
      "<y>": of_all("<y>", "bbb"),
      "z": of_all("z", "ccc"),
    },
  )


def test_the_tokens_of_a_path(folder):
  """Special tokens get the numbers that they have there."""
  text = LINEAR + "base_model: $/a\ntokenizer_source: $/c\n"
  _, found, out = merge(folder, text)
  config, vocabulary = check(found, out, {**SHARED, "z": of_all("z", "ccc")})
  assert [vocabulary[t] for t in ("</s>", "<s>")] == [0, 1]
  generation = json.loads((out / "generation_config.json").read_text())
  for one in (config, generation):
    assert (one["bos_token_id"], one["eos_token_id"]) == (1, 0)
  assert config["vocab_size"] == 6


def test_a_path_that_is_not_merged(folder, tmp_path):
  """Tokens that no model has are zeros, and it is said."""
  only = tmp_path / "only"
  write(only, "c")
  (only / "model.safetensors").unlink()
  text = LINEAR.replace("- {model: $/c, parameters: {weight: 1}}\n", "")
  report, found, out = merge(folder, text + "tokenizer_source: $/only\n")
  shared = {token: of_all(token, "ab") for token in SHARED}
  check(found, out, {**shared, "z": [None]})
  assert "1 tokens are in no model, rows of zeros: z" in report.notes


ONE = "base_model: $/a\ntokenizer: {source: base, tokens: {%s}}\n"
BASE = {**SHARED, "ab": of_all("ab", "aaa"), "<x>": of_all("<x>", "aba")}
TOKENS = {
  "a model": ("<x>: {source: $/b}", {"<x>": of_all("<x>", "abb")}),
  "forced": ("b: {source: $/b, force: true}", {"b": of_all("b", "bbb")}),
  "zero": ("<n>: {source: {kind: zero}}", {"<n>": [None]}),
  "forced zeros": ("b: {source: {kind: zero}, force: true}", {"b": [None]}),
  "another token": (
    "ab: {source: {kind: model_token, model: $/b, token: bc}}",
    {"ab": [("a", "ab"), ("b", "bc"), ("b", "bc")]},
  ),
  "a number": (
    "<n>: {source: {kind: model_token, model: $/b, token_id: 3}}",
    {"<n>": [("b", "a")] * 3},
  ),
  "by the rules": ("<y>: {}", {"<y>": of_all("<y>", "bbb")}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_where_the_rows_of_a_token_come_from(folder, name):
  text, expected = TOKENS[name]
  _, found, out = merge(folder, LINEAR + ONE % text)
  check(found, out, {**BASE, **expected})


def test_changes_of_tokens_that_the_base_lacks(folder):
  """The base's row is filled in by the same rules: then nothing changes it."""
  text = """
merge_method: task_arithmetic
base_model: $/a
models:
- {model: $/b, parameters: {weight: 1}}
- {model: $/c, parameters: {weight: 1}}
tokenizer_source: union
"""
  _, found, out = merge(folder, text)
  vocabulary = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
  table = found[TABLE]
  for token, wanted in (
    ("a", row("b", "a") + row("c", "a") - row("a", "a")),
    ("d", row("b", "d")),
    ("z", row("c", "z")),
    ("<x>", row("b", "<x>")),
    ("ab", row("a", "ab")),
  ):
    np.testing.assert_allclose(table[vocabulary[token]], wanted)


def test_tied_models_and_rows_to_a_multiple(folder, tmp_path):
  write(tmp_path / "tied", "b", tied=True)
  text = LINEAR.replace("$/b", "$/tied")
  text += "base_model: $/a\ntokenizer: {source: base, pad_to_multiple_of: 4}\n"
  report, found, _ = merge(folder, text)
  assert len(found[TABLE]) == len(found[HEAD]) == 12
  at = tokens_of("a").index("c")
  heads = [row("a", "c", True), row("b", "c"), row("c", "c", True)]
  np.testing.assert_allclose(found[HEAD][at], mean(*heads), rtol=1e-6)
  np.testing.assert_array_equal(found[HEAD][11], np.zeros(3))
  assert any("tables have 12 rows" in note for note in report.notes)


def test_the_same_tokens_change_nothing(folder, tmp_path):
  """Rows go by number then, padding too, and files are the base's."""
  for name in "de":
    write(tmp_path / name, "a")
  text = """
merge_method: linear
models:
- {model: $/d, parameters: {weight: 1}}
- {model: $/e, parameters: {weight: 3}}
tokenizer: {source: union}
"""
  report, found, out = merge(folder, text)
  np.testing.assert_allclose(
    found[TABLE], open_checkpoint(out.with_name("d"))[TABLE]
  )
  assert report.notes == []
  for name in ("tokenizer.json", "tokenizer_config.json"):
    own = (tmp_path / "d" / name).read_bytes()
    assert (out / name).read_bytes() == own


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("ab: {source: $/b}", "token ab: .*/b has no ab"),
    ("ab: {source: $/x}", "token ab comes from .*/x, which is not merged"),
    ("<n>: {}", "token <n> is in no model; say its `source`"),
    (
      "<n>: {source: {kind: model_token, model: $/c, token_id: 6}}",
      "token <n>: .*/c has no row 6",
    ),
  ],
)
def test_rows_that_are_not_there(folder, text, said):
  with pytest.raises(ValueError, match=said):
    merge(folder, LINEAR + ONE % text)
  assert not (folder / "out").exists()


def test_tokenizers_that_are_not_there(folder):
  with pytest.raises(ValueError, match="nowhere does not exist"):
    merge(folder, LINEAR + "tokenizer_source: $/nowhere\n")
  (folder / "b" / "tokenizer.json").unlink()
  with pytest.raises(ValueError, match="/b has no tokenizer that can be read"):
    merge(folder, LINEAR + "tokenizer_source: union\n")


def test_parameters_with_a_row_for_each_token_that_nobody_knows(folder):
  tables = dict(open_checkpoint(folder / "b"))
  tables["model.per_token.weight"] = np.ones((9, 2), np.float32)
  write_safetensors(folder / "b" / "model.safetensors", tables)
  with pytest.raises(
    ValueError, match="per_token.weight may have a row for each"
  ):
    merge(folder, LINEAR + "tokenizer_source: union\n")


def test_chat_templates(folder, tmp_path):
  """The one that most models have; or the recipe's."""
  own, other = "{{ 'own' }}", "{{ 'other' }}"
  (folder / "a" / "chat_template.jinja").write_text(own)
  for name in "bc":
    (folder / name / "chat_template.jinja").write_text(other)
  talk = [{"role": "user", "content": "hi"}]
  for given, expected in (
    ("auto", "other"),
    ("chatml", "<|im_start|>user\nhi<|im_end|>\n"),
    ("\"{{ messages[0]['role'] }}\"", "user"),
  ):
    text = f"{LINEAR}tokenizer_source: base\nchat_template: {given}\n"
    report, _, out = merge(folder, text, f"out {expected[:5]}")
    fast = transformers.AutoTokenizer.from_pretrained(out)
    assert fast.apply_chat_template(talk, tokenize=False) == expected
    said = [n for n in report.notes if "chat_template auto: 2 of 3" in n]
    assert bool(said) == (given == "auto")
  old = folder / "a" / "tokenizer_config.json"
  settings = json.loads(old.read_text()) | {"chat_template": other}
  old.write_text(json.dumps(settings))
  copy = "merge_method: passthrough\nmodels: [{model: $/a}]\n"
  merge(folder, f"{copy}chat_template: chatml\n", "old")
  settings = json.loads((folder / "old" / old.name).read_text())
  assert "im_start" in settings["chat_template"]


def test_settings_of_added_tokens_are_kept_where_they_are(folder):
  """Older folders list added tokens in two more files."""
  settings = folder / "a" / "tokenizer_config.json"
  given = json.loads(settings.read_text())
  settings.write_text(json.dumps({**given, "added_tokens_decoder": {}}))
  (folder / "a" / "added_tokens.json").write_text('{"<x>": 6}')
  text = LINEAR + "base_model: $/a\ntokenizer_source: union\n"
  _, _, out = merge(folder, text)
  listed = json.loads((out / settings.name).read_text())["added_tokens_decoder"]
  added = json.loads((out / "added_tokens.json").read_text())
  assert set(added) - {"<x>"} == {one["content"] for one in listed.values()}
  assert {one["content"] for one in listed.values() if one["special"]} == {
    "<y>"
  }


def test_trimming_a_model_as_a_whole_sees_the_same_rows(folder):
  text = LINEAR.replace("linear", "ties") + "base_model: $/a\n"
  (folder / "r.yml").write_text(
    (text + "tokenizer_source: base\n").replace("$", str(folder))
  )
  recipe = jlora.merging.trim_models(read_recipe(folder / "r.yml"), 1.0)
  inputs = {one.model[-1]: one.settings for one in recipe.slices[0].inputs}
  assert inputs["b"]["threshold"] == 0.0  # rows that b lacks change nothing


def only_tokens(folder):
  """A folder with the tokenizer of "c" alone, and a recipe that names it."""
  write(folder / "only", "c")
  (folder / "only" / "model.safetensors").unlink()
  (folder / "r.yml").write_text(
    (LINEAR + "tokenizer_source: $/only\n").replace("$", str(folder))
  )
  return folder / "only", read_recipe(folder / "r.yml")


def run(recipe, out, **options):
  return merge_checkpoints(recipe, out, log=io.StringIO(), **options)


def test_a_tokenizer_of_a_path_is_kept_apart_from_the_result(folder):
  """Its own files would be taken for those of a result to be replaced."""
  only, recipe = only_tokens(folder)
  before = {file: file.read_bytes() for file in only.iterdir()}
  with pytest.raises(ValueError, match="is or holds what is read: .*only"):
    run(recipe, only, overwrite=True)
  assert before == {file: file.read_bytes() for file in only.iterdir()}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_tokenizer_of_a_path_is_noticed(folder, name):
  only, recipe = only_tokens(folder)
  report = run(recipe, folder / "out")
  assert run(recipe, folder / "out", resume=True) == report
  (only / name).write_text((only / name).read_text() + " ")
  with pytest.raises(ValueError, match="small files was .*, is "):
    run(recipe, folder / "out", resume=True)


def test_a_tokenizer_that_changes_meanwhile_is_noticed(folder, monkeypatch):
  """Rows would be in the order of one, and the files those of the other."""
  only, recipe = only_tokens(folder)
  real = merge_runs._write_shards

  def change(*args):
    real(*args)
    file = only / "tokenizer.json"
    file.write_text(file.read_text() + " ")

  monkeypatch.setattr(merge_runs, "_write_shards", change)
  with pytest.raises(ValueError, match="tokenizer.json changed while it was"):
    run(recipe, folder / "out")
  assert not (folder / "out" / MERGE).exists()


def test_tokenizers_beside_single_files_count(folder):
  """They lie in no folder that was given."""
  text = LINEAR + "tokenizer_source: base\n"
  for name in "abc":
    text = text.replace(f"$/{name},", f"$/{name}/model.safetensors,")
  text = text.replace("$", str(folder))
  (folder / "r.yml").write_text(text)
  recipe = read_recipe(folder / "r.yml")
  report = run(recipe, folder / "out")
  assert run(recipe, folder / "out", resume=True) == report
  file = folder / "b" / "tokenizer.json"
  found = json.loads(file.read_text())
  vocabulary = found["model"]["vocab"]
  one, two = vocabulary["a"], vocabulary["b"]
  vocabulary |= {"a": two, "b": one}
  file.write_text(json.dumps(found))
  with pytest.raises(ValueError, match="tensors was .*, is "):
    run(recipe, folder / "out", resume=True)


@pytest.mark.parametrize(
  "text",
  [
    '{"added_tokens_decoder": []}',
    '{"added_tokens_decoder": "x"}',
    '{"chat_template": ["x"]}',
    '{"chat_template": [{"name": "default"}]}',
    '{"chat_template": 3}',
    "[]",
  ],
)
def test_settings_of_a_tokenizer_that_are_none_are_named(folder, text):
  more = "base_model: $/a\ntokenizer_source: union\nchat_template: auto\n"
  (folder / "a" / "tokenizer_config.json").write_text(text)
  with pytest.raises(ValueError, match="a/tokenizer_config.json"):
    merge(folder, LINEAR + more)
  assert not (folder / "out").exists()


def test_a_decoder_of_added_tokens_that_is_null(folder):
  settings = folder / "a" / "tokenizer_config.json"
  given = json.loads(settings.read_text()) | {"added_tokens_decoder": None}
  settings.write_text(json.dumps(given))
  merge(folder, LINEAR + "base_model: $/a\ntokenizer_source: union\n")
  copied = json.loads((folder / "out" / settings.name).read_text())
  assert copied["added_tokens_decoder"] is None


@pytest.mark.parametrize(
  "config",
  [
    {"tie_word_embeddings": True},
    {"model_type": "gemma2"},  # which is tied where nothing says so
    {"text_config": {"tie_word_embeddings": True, "dtype": "float32"}},
  ],
)
def test_a_head_of_its_own_is_said_wherever_heads_are_tied(folder, config):
  write(folder / "tied", "a", tied=True)
  (folder / "tied" / "config.json").write_text(json.dumps(config))
  text = """
merge_method: linear
base_model: $/tied
models:
- {model: $/a, parameters: {weight: 1}}
- {model: $/tied, parameters: {weight: 1}}
dtype: bfloat16
"""
  _, found, out = merge(folder, text)
  assert HEAD in found
  config = json.loads((out / "config.json").read_text())
  assert config["tie_word_embeddings"] is False
  text = config.get("text_config", {})
  assert text in ({}, {"tie_word_embeddings": False, "dtype": "bfloat16"})


def test_a_merge_of_single_files_by_token_has_their_tokenizer(folder):
  """What lies beside a file does not go along else."""
  text = LINEAR + "tokenizer_source: union\n"
  for name in "abc":
    text = text.replace(f"$/{name},", f"$/{name}/model.safetensors,")
  _, found, out = merge(folder, text)
  fast = transformers.AutoTokenizer.from_pretrained(out)
  vocabulary = fast.get_vocab()
  assert len(found[TABLE]) == max(vocabulary.values()) + 1
  for token in SHARED:
    rows = [row(*one) for one in of_all(token)]
    wanted = np.mean(rows, axis=0)
    np.testing.assert_allclose(found[TABLE][vocabulary[token]], wanted, 1e-6)


@pytest.mark.parametrize(
  ("number", "multiple"), [(10**12, 4), (2**31, 4), (9, 10**9)]
)
def test_rows_without_end_are_refused(folder, number, multiple):
  """A damaged number of a token, or padding of a recipe, in no time."""
  file = folder / "a" / "tokenizer.json"
  found = json.loads(file.read_text())
  found["model"]["vocab"]["ab"] = number
  file.write_text(json.dumps(found))
  text = "base_model: $/a\ntokenizer: {source: base, pad_to_multiple_of: %d}\n"
  with pytest.raises(ValueError, match="correct the number or the recipe's"):
    merge(folder, LINEAR + text % multiple)
  assert not (folder / "out").exists()
