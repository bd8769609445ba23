# SPDX-License-Identifier: Apache-2.0
"""Pairing: every tensor of both sides once, and the values read are right."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.pairing import match, pairs
from jlora.pairing.match import common_rows, keep_whole, pair_up, same_rows
from jlora.pairing.pairs import Stack, TensorPart

VOCABULARY, WIDTH, INNER, EXPERTS = 7, 4, 3, 2
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"


def arrays(shapes, seed=0):
  """Distinct values everywhere, so a wrong slice cannot pass."""
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def plain_model():
  shapes = {EMBED: (VOCABULARY, WIDTH)}
  for layer in range(2):
    stem = f"model.layers.{layer}"
    shapes[f"{stem}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
    shapes[f"{stem}.input_layernorm.weight"] = (WIDTH,)
  return arrays({**shapes, HEAD: (VOCABULARY, WIDTH)})


def single_experts(block="mlp", names=("gate_proj", "up_proj", "down_proj")):
  gate, up, down = names
  stem = f"model.layers.0.{block}.experts"
  return arrays(
    {
      f"{stem}.{expert}.{name}.weight": shape
      for expert in range(EXPERTS)
      for name, shape in (
        (gate, (INNER, WIDTH)),
        (up, (INNER, WIDTH)),
        (down, (WIDTH, INNER)),
      )
    }
  )


def fuse(singles, swap):
  """The fused tensors of `single_experts`, gate above up."""
  rows = list(singles.values())
  gates, ups, downs = rows[0::3], rows[1::3], rows[2::3]
  both = [np.concatenate(pair) for pair in zip(gates, ups, strict=True)]
  fused = {GATE_UP: np.stack(both), DOWN: np.stack(downs)}
  turn = (lambda x: x.swapaxes(1, 2)) if swap else (lambda x: x)
  return {name: turn(array) for name, array in fused.items()}


def prefixed(model, prefix):
  return {prefix + name: array for name, array in model.items()}


def without(model, name):
  return {other: array for other, array in model.items() if other != name}


def check_ledger(base, finetuned, found):
  """Every tensor of both sides exactly once; tied tables may serve twice."""
  bases = [pair.base.name for pair in found.pairs]
  served = collections.Counter(bases)
  tied = {
    pair.base.name for pair in found.pairs if "tied in the base" in pair.note
  }
  assert all(count == 1 or name in tied for name, count in served.items())
  assert sorted([*set(bases), *found.only_base]) == sorted(base)
  others = {n for pair in found.pairs for n in pairs.names_of(pair.finetuned)}
  assert sorted([*others, *found.only_finetuned]) == sorted(finetuned)
  places = [list(base).index(name) for name in bases]
  assert places == sorted(places)


def values(found, base, finetuned):
  """Path -> both sides as read."""
  return {
    pair.path: (
      pairs.read_side(base, pair.base),
      pairs.read_side(finetuned, pair.finetuned),
    )
    for pair in found.pairs
  }


def check_same_values(found, base, finetuned):
  """Where the finetune holds the same values, both sides read the same."""
  for path, (one, two) in values(found, base, finetuned).items():
    np.testing.assert_array_equal(one, two, err_msg=path)


def test_equal_names_need_no_note():
  model = plain_model()
  found = pair_up(model, model)
  check_ledger(model, model, found)
  check_same_values(found, model, model)
  assert found.only_base == found.only_finetuned == []
  for pair in found.pairs:
    assert pair.note == ""
    assert not pair.whole
    assert pair.path == pair.base.name == pair.finetuned.name
    assert pair.shape == model[pair.path].shape


@pytest.mark.parametrize("prefix", match._PREFIXES)
def test_a_prefix_on_either_side(prefix):
  model = plain_model()
  wrapped = prefixed(model, prefix)
  for base, finetuned in ((model, wrapped), (wrapped, model)):
    found = pair_up(base, finetuned)
    check_ledger(base, finetuned, found)
    check_same_values(found, base, finetuned)
    assert [pair.path for pair in found.pairs] == list(base)
    assert all(
      pair.note == f"prefix differs: {pair.finetuned.name}"
      for pair in found.pairs
    )


def test_a_prefix_that_fits_two_is_not_guessed():
  base = arrays({"model.q.weight": (3, 3)})
  two = {"module.q.weight": (3, 3), "transformer.q.weight": (3, 3)}
  found = pair_up(base, arrays(two))
  check_ledger(base, arrays(two), found)
  assert found.pairs == []
  found = pair_up(arrays(two), base)
  assert found.pairs == []
  assert found.only_base == list(two)


def test_a_head_tied_in_the_finetune():
  base = plain_model()
  finetuned = without(base, HEAD)
  found = pair_up(base, finetuned)
  check_ledger(base, finetuned, found)
  assert found.only_base == found.only_finetuned == []
  head = next(pair for pair in found.pairs if pair.path == HEAD)
  assert head.finetuned == TensorPart(EMBED)
  assert head.note == f"tied in the finetune: compared with {EMBED}"
  one, two = values(found, base, finetuned)[HEAD]
  np.testing.assert_array_equal(one, base[HEAD])
  np.testing.assert_array_equal(two, finetuned[EMBED])


def test_a_head_tied_in_the_base():
  finetuned = plain_model()
  base = without(finetuned, HEAD)
  found = pair_up(base, finetuned)
  check_ledger(base, finetuned, found)
  assert found.only_base == found.only_finetuned == []
  head = next(pair for pair in found.pairs if pair.path == HEAD)
  assert head.base == TensorPart(EMBED)
  assert head.note == f"tied in the base: compared with {EMBED}"
  one, two = values(found, base, finetuned)[HEAD]
  np.testing.assert_array_equal(one, base[EMBED])
  np.testing.assert_array_equal(two, finetuned[HEAD])


def test_tied_on_both_sides_is_one_pair():
  model = without(plain_model(), HEAD)
  found = pair_up(model, model)
  assert [pair.path for pair in found.pairs].count(EMBED) == 1
  assert all(pair.note == "" for pair in found.pairs)


def grown(model, rows=3):
  """The finetune of a model with tokens added."""
  tables = {
    name: np.concatenate([model[name], np.ones((rows, WIDTH))])
    for name in (EMBED, HEAD)
    if name in model
  }
  return {**model, **tables}


def test_a_grown_vocabulary_is_kept_whole_by_default():
  base = plain_model()
  finetuned = grown(base)
  found = pair_up(base, finetuned)
  check_ledger(base, finetuned, found)
  whole = {pair.path: pair for pair in found.pairs if pair.whole}
  assert set(whole) == {EMBED, HEAD}
  for pair in whole.values():
    assert pair.note == (
      "vocabulary 7 in the base, 10 in the finetune: kept whole"
    )
    read = pairs.read_side(finetuned, pair.finetuned)
    np.testing.assert_array_equal(read, finetuned[pair.path])
  assert pair_up(base, finetuned, vocabulary=keep_whole) == found


@pytest.mark.parametrize("more", [True, False])
def test_common_rows_of_a_vocabulary_that_changed(more):
  small = plain_model()
  large = grown(small)
  base, finetuned = (small, large) if more else (large, small)
  found = pair_up(base, finetuned, vocabulary=common_rows)
  check_ledger(base, finetuned, found)
  assert not any(pair.whole for pair in found.pairs)
  tables = [pair for pair in found.pairs if pair.path in (EMBED, HEAD)]
  assert all("7 common rows compared" in pair.note for pair in tables)
  for path in (EMBED, HEAD):
    one, two = values(found, base, finetuned)[path]
    assert two.shape == (7, WIDTH)
    np.testing.assert_array_equal(one[:7], two)


def test_a_policy_may_refuse_a_changed_vocabulary():
  base = plain_model()
  with pytest.raises(ValueError, match=r"\(7, 4\) in the base, \(10, 4\) in"):
    pair_up(base, grown(base), vocabulary=same_rows)


def test_a_grown_vocabulary_and_a_tie_in_the_base():
  """The note tells both."""
  finetuned = grown(plain_model())
  base = without(plain_model(), HEAD)
  found = pair_up(base, finetuned)
  check_ledger(base, finetuned, found)
  head = next(pair for pair in found.pairs if pair.path == HEAD)
  assert head.whole
  assert "tied in the base" in head.note
  assert "kept whole" in head.note


def test_other_shapes_that_differ_are_refused_by_name():
  base = plain_model()
  wrong = {name: np.zeros((9, 9)) for name in base}
  with pytest.raises(ValueError, match="and 3 more") as raised:
    pair_up(base, wrong)
  assert "embed_tokens.weight (7, 4) against (9, 9)" in str(raised.value)


@pytest.mark.parametrize("swap", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize(
  "block",
  [
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ("block_sparse_moe", ("w1", "w3", "w2")),
  ],
  ids=["qwen", "mixtral"],
)
def test_fused_experts_on_either_side(block, swap):
  singles = single_experts(*block)
  fused = fuse(singles, swap)
  assert fused[GATE_UP].shape == (
    (EXPERTS, WIDTH, 2 * INNER) if swap else (EXPERTS, 2 * INNER, WIDTH)
  )
  for base, finetuned, note in (
    (singles, fused, "fused in the finetune"),
    (fused, singles, "fused in the base"),
  ):
    found = pair_up(base, finetuned)
    check_ledger(base, finetuned, found)
    check_same_values(found, base, finetuned)
    assert found.only_base == found.only_finetuned == []
    assert [pair.path for pair in found.pairs] == list(base)
    assert all(note in pair.note for pair in found.pairs)
    assert all(pair.shape == base[pair.path].shape for pair in found.pairs)


def test_fused_experts_under_a_prefix():
  singles = single_experts()
  fused = prefixed(fuse(singles, swap=False), "module.")
  found = pair_up(singles, fused)
  check_ledger(singles, fused, found)
  check_same_values(found, singles, fused)
  assert len(found.pairs) == len(singles)


def test_fused_experts_of_which_one_lacks_are_left_over():
  singles = single_experts()
  fused = fuse(singles, swap=False)
  missing = f"model.layers.0.mlp.experts.{EXPERTS - 1}.up_proj.weight"
  base = without(singles, missing)
  found = pair_up(base, fused)
  check_ledger(base, fused, found)
  assert found.only_finetuned == [GATE_UP]
  assert all("gate_proj" in n or "up_proj" in n for n in found.only_base)


def test_reads_slices_through_a_checkpoint():
  """An open checkpoint reads the slice only, not the tensor."""
  singles = single_experts()
  fused = fuse(singles, swap=True)

  class Checkpoint(dict):
    def read(self, name, index):
      asked.append((name, index))
      return self[name][index]

  asked = []
  found = pair_up(singles, fused)
  check_same_values(found, singles, Checkpoint(fused))
  assert len(asked) == len(singles)
  assert asked[0] == (GATE_UP, (0, slice(None), slice(0, INNER)))


def test_names_of_both_kinds_of_side():
  assert pairs.names_of(TensorPart("w", (1,))) == ["w"]
  stack = Stack(
    ((TensorPart("a"), TensorPart("b")), (TensorPart("c"), TensorPart("d")))
  )
  assert pairs.names_of(stack) == ["a", "b", "c", "d"]


@st.composite
def two_sides(draw):
  """A base and a finetune that lacks, renames, fuses, ties and adds."""
  experts = single_experts()
  fused = fuse(experts, swap=draw(st.booleans()))
  sides = []
  for _ in range(2):
    side = plain_model()
    side.update(draw(st.sampled_from([experts, fused, {}])))
    side = prefixed(side, draw(st.sampled_from(["", *match._PREFIXES])))
    gone = draw(st.sets(st.sampled_from(sorted(side)), max_size=4))
    side = {name: array for name, array in side.items() if name not in gone}
    extra = draw(st.sets(st.sampled_from(["x.weight", "model.x.weight", "y"])))
    side.update({name: np.zeros((2, 2)) for name in sorted(extra)})
    names = draw(st.permutations(sorted(side)))
    sides.append({name: side[name] for name in names})
  return sides


@settings(deadline=None, max_examples=300)
@given(two_sides())
def test_every_tensor_of_both_sides_is_accounted_for_once(sides):
  base, finetuned = sides
  found = pair_up(base, finetuned)
  check_ledger(base, finetuned, found)
  read = values(found, base, finetuned)
  for pair in found.pairs:
    one, two = read[pair.path]
    assert one.shape == two.shape == pair.shape
    if "tied" not in pair.note:
      np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("swap", [False, True])
def test_a_square_expert_takes_its_orientation_from_gate_and_up(swap):
  rng = np.random.default_rng(0)
  singles = {
    f"m.experts.0.{name}_proj.weight": rng.normal(size=(4, 4))
    for name in ("gate", "up", "down")
  }
  gate, up, down = singles.values()
  stored = [np.concatenate([gate, up])[None], down[None]]
  if swap:
    stored = [array.swapaxes(1, 2) for array in stored]
  names = ("m.experts.gate_up_proj", "m.experts.down_proj")
  fused = dict(zip(names, stored, strict=True))
  for pair in pair_up(singles, fused).pairs:
    found = pairs.read_side(fused, pair.finetuned)
    np.testing.assert_array_equal(found, singles[pair.path])
