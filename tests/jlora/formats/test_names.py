# SPDX-License-Identifier: Apache-2.0
"""The tables of names: each name there and back, no two alike."""

import pytest

from jlora.formats.name_rows import (
  OPEN_CLIP,
  OPEN_CLIP_PARAMETERS,
  TEXT_ROWS,
  Plan,
  spell,
)
from jlora.formats.names import (
  FAMILIES,
  fill,
  find_ours,
  find_theirs,
  flatten,
  names_of,
  original_of,
  plan_of,
)

PLAN = Plan(2, frozenset({1, 2}))


def numbers_of(pattern):
  """Numbers that occur: of a block, a layer, and further ones."""
  count = pattern.count("#")
  return [(1, 0, 3)[:count], (2, 1, 0)[:count], (0, 1, 11)[:count]]


def every_name(rows):
  for row in rows:
    for numbers in dict.fromkeys(numbers_of(row.ours[0])):
      yield row, tuple(fill(one, numbers) for one in row.ours)


TABLES = {family.name: family.rows for family in FAMILIES.values()}
TABLES |= {
  f"{family.name} parameters": family.parameters
  for family in FAMILIES.values()
  if family.parameters
}
TABLES |= {"OpenCLIP": OPEN_CLIP, "OpenCLIP parameters": OPEN_CLIP_PARAMETERS}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("flat", [False, True], ids=["dots", "flat"])
def test_every_name_comes_back(table, flat):
  seen, rows = {}, TABLES[table]
  for row, names in every_name(rows):
    spell_it = flatten if flat else str
    for part, name in enumerate(names):
      found = find_ours(spell_it(name), rows, flat)
      assert (found.row, found.part) == (row, part)
      assert names_of(found) == names
    theirs = original_of(find_ours(names[0], rows), PLAN)
    assert "#" not in theirs
    assert seen.setdefault(spell_it(theirs), names) == names
    back = find_theirs(spell_it(theirs), rows, PLAN, flat)
    assert names_of(back) == names


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
    ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
    ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
    ("mid_block.resnets.1.conv_shortcut", "middle_block.2.skip_connection"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("up_blocks.3.resnets.2.time_emb_proj", "output_blocks.11.0.emb_layers.1"),
    ("conv_in", "input_blocks.0.0"),
  ],
)
def test_blocks_of_stable_diffusion_have_their_published_numbers(ours, theirs):
  rows = FAMILIES["sd1"].rows
  plan = plan_of([f"up_blocks.{i}.attentions.0.proj_in" for i in (1, 2, 3)])
  assert original_of(find_ours(ours, rows), plan) == theirs


def test_names_that_no_row_has_are_not_found():
  rows = FAMILIES["flux"].rows
  assert find_ours("transformer_blocks.0.attn.to_x", rows) is None
  assert find_theirs("double_blocks.a.img_attn.qkv", rows, PLAN) is None
  assert (
    find_theirs("input_blocks.3.0.in_layers.2", FAMILIES["sdxl"].rows, PLAN)
    is None
  )


def test_text_encoders_have_one_spelling():
  assert all(row.ours == (row.theirs,) for row in TEXT_ROWS)
  assert list(spell("a{,_b}.{c,d}")) == ["a.c", "a.d", "a_b.c", "a_b.d"]
