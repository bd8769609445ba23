# SPDX-License-Identifier: Apache-2.0
"""Merges taken up again, and kept apart from what they read."""

import json
import os

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora
from jlora.merging.checkpoints import run as merge_runs
from jlora.merging.checkpoints import trimming
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.report import MERGE
from jlora.runs.journal import FOLDER
from tests.helpers.small_merges import Q, linear, run, whole, write_models
from tests.helpers.small_pairs import draw, files_of


@pytest.fixture
def models(tmp_path):
  return write_models(tmp_path)


def trimmed(models):
  recipe = Recipe(jlora.merging.ties, whole(*models[1:]), base=models[0])
  return trimming.trim_models(recipe, 0.5)


# What makes a result, changed -> what the error names.
CHANGES = {
  "method": ({"method": jlora.merging.nuslerp}, "method was linear"),
  "code": (
    {"method": lambda *a, **k: jlora.merging.linear(*a, **k)}, "method was",
  ),
  "settings": ({"settings": {"weight": 2.0}}, "settings was"),
  "vocabulary": (
    {"vocabulary": lambda *a: jlora.pairing.same_rows(*a)}, "vocabulary was",
  ),
  "dtype": ({"dtype": "bfloat16"}, "dtype was None"),
  "key": (jax.random.key(1), r"key was \[0, 0\]"),
  "shards": (2**20, "max_shard_bytes was"),
  "weights": ("b/model.safetensors", "b times was"),
  "config": ("b/config.json", "b was"),
  "tokenizer": ("b/tokenizer.json", "b was"),
  "gone": ("out/model-00002-of-00002.safetensors", "00002.safetensors is gone"),
  "index": ("out/model.safetensors.index.json", "index.json was changed"),
  "result's config": ("out/config.json", "config.json was changed"),
  "result's tokenizer": ("out/tokenizer.json", "tokenizer.json was changed"),
  "report": ("out/merge.json", "merge.json is not as it was written"),
}  # fmt: skip


def _change(file):
  """Changes a file: its content, or its time alone, or removes it."""
  if file.name == "model.safetensors":
    os.utime(file, ns=(0, 10**9))
  elif file.suffix == ".safetensors":
    file.unlink()
  elif file.name == MERGE:
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"tensors": 7}))
  else:
    file.write_text(file.read_text() + " ")


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_made_a_merge_counts_or_it_is_not_given(
  models, tmp_path, change, message
):
  recipe, options = linear(models), {}
  report = run(recipe, tmp_path / "out")
  assert run(recipe, tmp_path / "out", resume=True) == report
  if isinstance(change, dict):
    recipe = recipe._replace(**change)
  elif isinstance(change, int):
    options = {"max_shard_bytes": change}
  elif isinstance(change, str):
    _change(tmp_path / change)
  else:
    options = {"key": change}
  before = files_of(tmp_path / "out")
  with pytest.raises(ValueError, match=message):
    run(recipe, tmp_path / "out", resume=True, **options)
  assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 10**5, '{"x": 1}'])
def test_a_report_that_is_none_is_said(models, tmp_path, text):
  run(linear(models), tmp_path / "out")
  (tmp_path / "out" / MERGE).write_text(text)
  with pytest.raises(ValueError, match="merge.json"):
    run(linear(models), tmp_path / "out", resume=True)


def test_an_adapter_of_a_model_counts(models, tmp_path):
  like = open_checkpoint(models[1]).spec
  lora = Lora(draw(2, 8), draw(2, 12), np.float32(1))
  save_peft(tmp_path / "adapter", {Q.format(0): lora}, like=like)
  named = f"{models[1]}+{tmp_path / 'adapter'}"
  recipe = Recipe(jlora.merging.linear, whole(named, models[2]))
  report = run(recipe, tmp_path / "out")
  assert run(recipe, tmp_path / "out", resume=True) == report
  file = tmp_path / "adapter" / "adapter_config.json"
  file.write_text(file.read_text() + " ")
  with pytest.raises(ValueError, match=r"adapter was .*, is "):
    run(recipe, tmp_path / "out", resume=True)
  with pytest.raises(ValueError, match="is or holds what is read: .*adapter"):
    run(recipe, tmp_path / "adapter", overwrite=True)


def test_thresholds_of_whole_models_count_by_value(models, tmp_path):
  run(trimmed(models), tmp_path / "out")
  assert run(trimmed(models), tmp_path / "out", resume=True)


def test_a_damaged_file_of_the_journal_is_named(models, tmp_path, monkeypatch):
  """And one that was written but not yet noted is made again."""
  recipe = linear(models)
  run(recipe, tmp_path / "whole")
  monkeypatch.setattr(merge_runs, "_place", _stop)
  with pytest.raises(KeyboardInterrupt):
    run(recipe, tmp_path / "out")
  monkeypatch.undo()
  folder = tmp_path / "out" / FOLDER
  first, second = sorted((folder / "shards").iterdir())
  for entry in folder.glob("*.safetensors"):
    if second.name in open_checkpoint(entry).metadata["entry"]:
      entry.unlink()
  second.write_bytes(second.read_bytes()[:-1] + b"x")
  good = first.read_bytes()
  first.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
  with pytest.raises(ValueError, match=f"{first.name} was changed since"):
    run(recipe, tmp_path / "out", resume=True)
  first.unlink()
  run(recipe, tmp_path / "out", resume=True)
  assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _stop(*_, **__):
  raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_merge_is_not_mixed_from_two_inputs(
  models, tmp_path, monkeypatch, file
):
  real = merge_runs._place

  def change(*args):
    os.utime(tmp_path / "c" / file, ns=(0, 10**9))
    return real(*args)

  monkeypatch.setattr(merge_runs, "_place", change)
  with pytest.raises(ValueError, match="c changed while it was read"):
    run(linear(models), tmp_path / "out")
  assert not (tmp_path / "out" / MERGE).exists()


def test_nothing_is_written_to_a_model(models, tmp_path):
  """By its own name, by a link, or as a folder that holds it."""
  (tmp_path / "link").symlink_to(models[1])
  before = files_of(tmp_path)
  for out in (*models[1:], tmp_path, tmp_path / "link"):
    for way in ({}, {"overwrite": True}, {"resume": True}):
      with pytest.raises(ValueError, match="is or holds what is read"):
        run(linear(models), out, **way)
  assert files_of(tmp_path) == before
  run(linear(models), tmp_path / "b" / "merged")
  after = files_of(tmp_path / "b")
  assert all(after[n] == files_of(tmp_path)[f"b/{n}"] for n in after)
  assert list(open_checkpoint(models[1])) == list(open_checkpoint(models[2]))


def test_links_in_the_output_are_not_written_through(models, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  names = [
    "config.json", "tokenizer.json", MERGE, "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
  ]  # fmt: skip
  (tmp_path / "mine").mkdir()
  for name in names:
    (tmp_path / "mine" / name).write_text("precious")
    (out / name).symlink_to(tmp_path / "mine" / name)
  (out / FOLDER).symlink_to(tmp_path / "mine")
  with pytest.raises(ValueError, match="is a link to .*mine; remove it"):
    run(linear(models), out, overwrite=True)
  (out / FOLDER).unlink()
  run(linear(models), out, overwrite=True)
  assert not any((out / name).is_symlink() for name in names)
  assert {*files_of(tmp_path / "mine").values()} == {b"precious"}


def test_a_tokenizer_that_leads_elsewhere_is_not_copied(models, tmp_path):
  (tmp_path / "secret").write_text("{}")
  (tmp_path / "b" / "tokenizer.json").unlink()
  (tmp_path / "b" / "tokenizer.json").symlink_to(tmp_path / "secret")
  with pytest.raises(ValueError, match="tokenizer.json leads to .*secret"):
    run(linear(models), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_report_of_a_merged_model_does_not_go_along(models, tmp_path):
  """Its merge.json would say that this merge was finished."""
  run(linear(models), tmp_path / "one")
  recipe = Recipe(jlora.merging.linear, whole(str(tmp_path / "one"), models[2]))
  report = run(recipe, tmp_path / "two")
  assert json.loads((tmp_path / "two" / MERGE).read_text()) == json.loads(
    json.dumps(report._asdict())
  )


def test_two_merges_at_once_are_one_and_an_error(models, tmp_path, monkeypatch):
  real = merge_runs._place

  def second(*args):
    for way in ({}, {"overwrite": True}, {"resume": True}):
      with pytest.raises(ValueError, match="being written by another run"):
        run(linear(models), tmp_path / "out", **way)
    return real(*args)

  monkeypatch.setattr(merge_runs, "_place", second)
  report = run(linear(models), tmp_path / "out")
  assert run(linear(models), tmp_path / "out", resume=True) == report


def test_functions_of_one_name_are_told_apart(models, tmp_path):
  """Of a vocabulary as of a method."""
  one, two = (
    lambda path, base, finetuned, rows=rows: slice(rows) for rows in (4, 5)
  )
  recipe = linear(models)._replace(vocabulary=one)
  run(recipe, tmp_path / "out")
  with pytest.raises(ValueError, match="vocabulary code was"):
    run(recipe._replace(vocabulary=two), tmp_path / "out", resume=True)


def test_numbers_of_numpy_are_numbers(models, tmp_path):
  plain = linear(models)._replace(settings={"weight": [0.5, 1.0]})
  odd = plain._replace(settings={"weight": list(np.float32([0.5, 1.0]))})
  report = run(odd, tmp_path / "out")
  assert run(plain, tmp_path / "out", resume=True) == report


def test_a_model_that_changes_while_it_is_planned(
  models, tmp_path, monkeypatch
):
  """Its configuration was read, and another would be what is noted."""
  real = merge_runs.plan_merge

  def change(*args):
    found = real(*args)
    os.utime(tmp_path / "c" / "config.json", ns=(0, 10**9))
    return found

  monkeypatch.setattr(merge_runs, "plan_merge", change)
  with pytest.raises(ValueError, match="c changed while"):
    run(linear(models), tmp_path / "out")
  assert not (tmp_path / "out" / MERGE).exists()


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"weight": []}, r"weight is \[\]"),
    ({"weight": "x"}, "weight is 'x'"),
    ({"weight": None}, "weight is None"),
    ({"weight": [1.0, "x"]}, r"weight is \[1.0, 'x'\]"),
    ({"weight": [{"filter": "q"}]}, "weight is .{'filter': 'q'}"),
    ({"weight": [{"filter": 3, "value": 1}]}, "weight is .{'filter': 3"),
    ({"weight": [{"value": []}]}, "weight is"),
    ({"weight": [1.0, {"value": 1}]}, "weight is"),
  ],
)
def test_settings_made_by_hand_are_checked(models, tmp_path, settings, said):
  """What `read_recipe` would say of a file."""
  recipe = linear(models)
  (part,) = recipe.slices
  first, *rest = part.inputs
  own = part._replace(inputs=(first._replace(settings=settings), *rest))
  for odd in (
    recipe._replace(settings=settings),
    recipe._replace(slices=(part._replace(settings=settings),)),
    recipe._replace(slices=(own,)),
  ):
    with pytest.raises(ValueError, match=f"^{said}.*a setting is a number"):
      run(odd, tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [(0,), (0, 1.5), (-1, 2), "01", 3, ()])
def test_layers_made_by_hand_are_checked(models, tmp_path, layers):
  part = Slice((Input(models[0], layers),))
  with pytest.raises(ValueError, match="a are .*layers are .start, end."):
    run(Recipe(jlora.merging.passthrough, (part,)), tmp_path / "out")


@pytest.mark.parametrize("slices", [(), (Slice(()),)])
def test_a_recipe_without_models_merges_nothing(tmp_path, slices):
  with pytest.raises(ValueError, match="give slices, each with some"):
    run(Recipe(jlora.merging.linear, slices), tmp_path / "out")
