# SPDX-License-Identifier: Apache-2.0
"""Rows are merged where they are the same tokens, in every size of a table."""

import io
import json

import numpy as np
import pytest

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.checkpoints.mergekit import read_recipe
from jlora.merging.checkpoints.planning import plan_merge
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.run import merge_checkpoints
from jlora.pairing.comparison import read_pair
from jlora.pairing.match import common_rows, keep_whole, pair_up
from jlora.pairing.pairs import Rows, TensorPart, read_region_of_side, read_side
from jlora.pairing.vocabularies import (
  differing_rows,
  read_both_tokens,
  read_tokens,
  rows_by_token,
)

TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def write(folder, tokens, value, rows=None):
  """A model of constant tables, a row for each token, and its tokenizer."""
  folder.mkdir()
  rows = len(tokens) if rows is None else rows
  column = np.arange(rows, dtype=np.float32)[:, None] + value
  tables = {TABLE: np.tile(column, 3), HEAD: np.tile(column, 3)}
  write_safetensors(folder / "model.safetensors", tables)
  (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
  vocabulary = {token: number for number, token in enumerate(tokens)}
  text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
  (folder / "tokenizer.json").write_text(text)
  return str(folder)


def merged(out, recipe):
  report = merge_checkpoints(recipe, out, log=io.StringIO())
  found = open_checkpoint(out)
  np.testing.assert_array_equal(found[TABLE], found[HEAD])
  config = json.loads((out / "config.json").read_text())
  assert config["vocab_size"] == len(found[TABLE])
  return found[TABLE][:, 0].tolist(), report.notes


def recipe_of(*paths, **more):
  inputs = tuple(Input(path) for path in paths)
  return Recipe(jlora.merging.linear, (Slice(inputs),), **more)


# The reference has four rows 0 1 2 3, the others' begin with 10 and with 20.
SIZES = {
  "more": ([6, 4], [10.0, 11.0, 12.0, 13.0]),
  "fewer": ([3, 4], [10.0, 11.0, 12.0, (3 + 3 + 23) / 3]),
  "both": ([2, 6], [10.0, 11.0, (2 + 2 + 22) / 3, (3 + 3 + 23) / 3]),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_result_has_the_rows_of_the_reference(name, tmp_path):
  """What a model has besides is left out, what it lacks is the reference's."""
  sizes, expected = SIZES[name]
  paths = [write(tmp_path / "base", list("abcd"), 0)]
  for i, size in enumerate(sizes):
    paths.append(write(tmp_path / f"m{i}", list("abcdef")[:size], 10 + 10 * i))
  with pytest.raises(ValueError, match=r"vocabulary \(4, 3\) in the base, \("):
    plan_merge(recipe_of(*paths))
  recipe = recipe_of(*paths, vocabulary=jlora.pairing.common_rows)
  found, notes = merged(tmp_path / "out", recipe)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  changed = [size for size in sizes if size != 4]
  said = [note for note in notes if TABLE in note]
  assert len(said) == 1
  for size in changed:
    assert f"vocabulary 4 in the base, {size} in the finetune" in said[0]
  kept, _ = merged(
    tmp_path / "kept", recipe._replace(vocabulary=jlora.pairing.keep_whole)
  )
  assert kept == [0.0, 1.0, 2.0, 3.0]


def test_changes_of_rows_that_a_finetune_lacks_are_none(tmp_path):
  """Of task vectors too: the base's row less the base's row; by token."""
  base = write(tmp_path / "base", list("abcd"), 0)
  tuned = write(tmp_path / "tuned", list("bac"), 10)
  file = tmp_path / "recipe.yml"
  file.write_text(json.dumps({
    "merge_method": "task_arithmetic", "base_model": base,
    "models": [{"model": tuned, "parameters": {"weight": 0.5}}],
    "tokenizer_source": "base",
  }))  # fmt: skip
  found, _ = merged(tmp_path / "out", read_recipe(file))
  assert found == [5.5, 5.5, 7.0, 3.0]


def test_other_tokens_of_the_same_rows_are_named(tmp_path):
  base = write(tmp_path / "base", list("abcdef"), 0)
  tuned = write(tmp_path / "tuned", list("aBCDEf"), 10)
  recipe = recipe_of(base, tuned, vocabulary=jlora.pairing.common_rows)
  expected = (
    r"tuned: 4 rows are other tokens than in .*base: row 1 is 'B', not 'b', "
    r"row 2 is 'C', not 'c', row 3 is 'D', not 'd' and 1 more"
  )
  with pytest.raises(ValueError, match=expected):
    plan_merge(recipe)
  # Without a word about tokens rows are added up by number, and it is said.
  notes = plan_merge(
    recipe._replace(vocabulary=jlora.pairing.match.same_rows)
  ).notes
  assert len(notes) == 1
  assert "row 1 is 'B', not 'b'" in notes[0]
  # A table that is not merged may have any.
  plan = plan_merge(recipe_of(base, vocabulary=jlora.pairing.common_rows))
  assert plan.notes == []


def test_a_base_with_other_tokens_counts_and_rows_of_padding_do_not(tmp_path):
  base = write(tmp_path / "base", ["a", "b"], 0, rows=4)
  tuned = write(tmp_path / "tuned", list("abc"), 10, rows=4)
  other = write(tmp_path / "other", ["b", "a"], 10, rows=4)
  rows = {"vocabulary": jlora.pairing.common_rows, "reference": tuned}
  inputs = (Slice((Input(tuned),)),)
  assert plan_merge(
    Recipe(jlora.merging.task_arithmetic, inputs, base=base, **rows)
  )
  with pytest.raises(ValueError, match="other: 2 rows are other tokens than"):
    plan_merge(
      Recipe(jlora.merging.task_arithmetic, inputs, base=other, **rows)
    )


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]},
                         "added_tokens": [{"id": 1, "content": "<b>"}]}},
     {0: "a", 1: "<b>"}),
    ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<c>": 2}},
     {0: "a", 1: "b", 2: "<c>"}),
    ({"vocab.txt": "[PAD]\na\n"}, {0: "[PAD]", 1: "a"}),
    ({"tokenizer.json": {"of": "another form"}}, None),
    ({}, None),
  ],
)  # fmt: skip
def test_tokens_of_every_form(files, expected, tmp_path):
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
  assert read_tokens(tmp_path) == expected
  assert read_tokens(tmp_path / "model.safetensors") == expected


def test_a_broken_tokenizer_is_named(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer.json is no JSON"):
    read_tokens(tmp_path)


def test_only_rows_of_both_count():
  assert differing_rows({0: "a", 5: "x"}, {1: "b", 5: "y"}, 5) == []
  assert differing_rows({5: "x"}, {5: "y"}, 6) == ["row 5 is 'y', not 'x'"]


def numbered(tokens):
  return {n: token for n, token in enumerate(tokens) if token != "."}


# Tokens of the base, of the finetune (a dot: none), rows of both, and for each
# row of the base the finetune's.
ORDERS = {
  "the same": ("abcd", "abcd", (4, 4), None),
  "appended": ("abc", "abcde", (3, 5), None),
  "cut off": ("abcd", "ab", (4, 2), None),
  "prepended": ("abc", "xyabc", (3, 5), (2, 3, 4)),
  "reversed": ("abcd", "dcba", (4, 4), (3, 2, 1, 0)),
  "inserted": ("abcd", "abxcd", (4, 5), (0, 1, 3, 4)),
  "removed within": ("abcd", "acd", (4, 3), (0, -1, 1, 2)),
  "renamed in place": ("abcd", "axcd", (4, 4), None),
  "renamed and moved": ("abcd", "bacx", (4, 4), (1, 0, 2, 3)),
  "padding": ("ab..", "ab..", (4, 4), None),
  "padding put to use": ("ab..", "abxy", (4, 4), None),
  "padding and prepended": ("ab..", "xab.", (4, 4), (1, 2, -1, 3)),
  "beyond the table": ("abc", "xabc", (3, 3), (1, 2, -1)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_rows_of_the_same_tokens(name):
  one, two, rows, expected = ORDERS[name]
  found = rows_by_token(numbered(one), numbered(two), rows)
  assert found == expected
  for row, other in enumerate(found or ()):
    if other >= 0 and one[row] in two:
      assert two[other] == one[row]


def table(tokens, width=3):
  """A row for each token that only its own letter gives."""
  rows = np.array([ord(token) for token in tokens], np.float32)
  return rows[:, None] + np.arange(width, dtype=np.float32) / 10


@pytest.mark.parametrize("name", ["prepended", "reversed", "removed within"])
def test_a_table_in_another_order_is_unchanged_token_by_token(name):
  one, two, *_ = ORDERS[name]
  base = {HEAD: table(one), "norm.weight": np.ones(3, np.float32)}
  finetuned = base | {HEAD: table(two)}
  tokens = numbered(one), numbered(two)
  found = pair_up(base, finetuned, vocabulary=common_rows, tokens=tokens)
  pair = next(pair for pair in found.pairs if pair.path == HEAD)
  assert isinstance(pair.finetuned, Rows)
  assert "by token" in pair.note
  left, right = read_pair(pair, base, finetuned)
  np.testing.assert_array_equal(left, right)
  # By number they differ, which nobody would see.
  found = pair_up(base, finetuned, vocabulary=common_rows)
  pair = next(pair for pair in found.pairs if pair.path == HEAD)
  assert "token" not in pair.note
  assert (np.subtract(*read_pair(pair, base, finetuned)) != 0).any()


def test_a_policy_that_keeps_tables_whole_compares_no_rows():
  base, finetuned = {TABLE: table("abc")}, {TABLE: table("xabc")}
  tokens = numbered("abc"), numbered("xabc")
  (pair,) = pair_up(base, finetuned, vocabulary=keep_whole, tokens=tokens).pairs
  assert pair.whole
  assert pair.finetuned == TensorPart(TABLE)


def test_a_policy_of_fewer_rows_is_kept():
  def first_two(path, one, two):
    return slice(0, 2)

  base, finetuned = {TABLE: table("abc")}, {TABLE: table("xabc") + 1}
  tokens = numbered("abc"), numbered("xabc")
  (pair,) = pair_up(base, finetuned, vocabulary=first_two, tokens=tokens).pairs
  left, right = read_pair(pair, base, finetuned)
  np.testing.assert_allclose(right - left, [[1] * 3, [1] * 3, [0] * 3])


def test_rows_are_read_in_parts():
  side, one = Rows("w", (2, -1, 0)), {"w": table("abc")}
  read = read_side(one, side)
  assert np.isnan(read[1]).all()
  np.testing.assert_array_equal(read[[0, 2]], one["w"][[2, 0]])
  part = read_region_of_side(one, side, (slice(1, 3), slice(2)))
  np.testing.assert_array_equal(part, read[1:3, :2])


def test_other_parameters_keep_their_rows():
  base = {"model.layers.0.q_proj.weight": table("abc")}
  tokens = numbered("abc"), numbered("cba")
  (pair,) = pair_up(base, base, tokens=tokens).pairs
  assert pair.finetuned == pair.base


def test_tokens_of_both_are_read_where_they_differ(tmp_path):
  one = write(tmp_path / "one", list("abc"), 0)
  same = write(tmp_path / "same", list("abc"), 1)
  other = write(tmp_path / "other", list("cab"), 1)
  (tmp_path / "none").mkdir()
  assert read_both_tokens(one, same) is None
  assert read_both_tokens(one, tmp_path / "none") is None
  found = read_both_tokens(one, other)
  assert found == (numbered("abc"), numbered("cab"))
  # Other bytes, the same tokens.
  file = tmp_path / "same" / "tokenizer.json"
  file.write_text(json.dumps(json.loads(file.read_text()), indent=2))
  assert read_both_tokens(one, same) is None


@pytest.mark.parametrize("text", ["{}", '{"model": {"type": "x"}}'])
def test_tokenizers_of_other_forms_have_no_tokens(text, tmp_path):
  (tmp_path / "tokenizer.json").write_text(text)
  assert read_tokens(tmp_path) is None


ODD = {
  "[]": "holds no object",
  "3": "holds no object",
  '{"model": []}': r"model is \[\], needed is an object",
  '{"model": {"vocab": {"a": "0"}}}': "vocab is",
  '{"model": {"vocab": {"a": -1}}}': "vocab is",
  '{"model": {"vocab": [["a", 0.5], []]}}': r"each entry \[token, score\]",
  '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}': "added_tokens is",
}


@pytest.mark.parametrize("text", ODD)
def test_tokens_that_are_not_numbered_are_told_with_the_file(text, tmp_path):
  file = tmp_path / "tokenizer.json"
  file.write_text(text)
  with pytest.raises(ValueError, match=f"tokenizer.json.*{ODD[text]}"):
    read_tokens(tmp_path)
