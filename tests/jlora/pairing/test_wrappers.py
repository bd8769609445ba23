# SPDX-License-Identifier: Apache-2.0
"""Names with wrappers inside them are those of the model, and no others are."""

import numpy as np
import pytest

from jlora.pairing.match import pair_up
from jlora.pairing.pairs import names_of, read_side
from jlora.pairing.wrappers import see_through
from tests.jlora.pairing.test_match import (
  DOWN,
  arrays,
  check_ledger,
  fuse,
  plain_model,
  single_experts,
)


def inside(model, old, new):
  return {name.replace(old, new): array for name, array in model.items()}


WRAPPED = {
  "compiled layers": ("layers.0.", "layers.0._orig_mod."),
  "checkpointed": (
    "self_attn.",
    "_checkpoint_wrapped_module.self_attn.",
  ),
  "sharded": ("self_attn.", "_fsdp_wrapped_module.self_attn."),
  "both": (
    "layers.",
    "_fsdp_wrapped_module.layers._checkpoint_wrapped_module.",
  ),
  "data parallel": ("self_attn.", "self_attn.module."),
  "of PEFT": ("q_proj.weight", "q_proj.base_layer.weight"),
}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "base_model.model."])
def test_a_wrapper_inside_on_either_side(case, prefix):
  model = plain_model()
  wrapped = inside(model, *WRAPPED[case])
  wrapped = {prefix + name: array for name, array in wrapped.items()}
  assert wrapped.keys() != model.keys()
  for base, finetuned in ((model, wrapped), (wrapped, model)):
    found = pair_up(base, finetuned)
    check_ledger(base, finetuned, found)
    assert found.only_base == found.only_finetuned == []
    assert [pair.path for pair in found.pairs] == list(base)
    for pair in found.pairs:
      assert read_side(base, pair.base) is not None
      one, two = base[pair.base.name], read_side(finetuned, pair.finetuned)
      np.testing.assert_array_equal(one, two)
      is_other = pair.finetuned.name != pair.base.name
      assert is_other == bool(pair.note)
      assert not is_other or "differs" in pair.note or "wrapper" in pair.note


def test_experts_with_a_wrapper_inside_are_fused():
  singles = inside(single_experts(), ".experts.", "._orig_mod.experts.")
  fused = fuse(singles, swap=False)
  for base, finetuned in ((singles, fused), (fused, singles)):
    found = pair_up(base, finetuned)
    check_ledger(base, finetuned, found)
    assert found.only_base == found.only_finetuned == []
  down = next(pair for pair in found.pairs if pair.path == DOWN)
  assert all("_orig_mod" in name for name in names_of(down.finetuned))


def test_a_module_of_the_models_own_stays():
  """`module` in both, and in one where nothing fits without it."""
  own = arrays({"vision.module.proj.weight": (3, 3), "module.x": (2,)})
  found = pair_up(own, own)
  assert [pair.note for pair in found.pairs] == ["", ""]
  other = arrays({"vision.head.weight": (3, 3)})
  assert see_through(own, other, str) == (
    {name: name for name in own},
    {name: name for name in other},
  )


@pytest.mark.parametrize("part", ["module", "base_layer", "_orig_mod"])
def test_two_that_would_be_one_are_not_guessed(part):
  base = arrays({"l.q.weight": (3, 3)})
  two = arrays({"l.q.weight": (3, 3), f"l.q.{part}.weight": (3, 3)})
  found = pair_up(base, two)
  assert [pair.finetuned.name for pair in found.pairs] == ["l.q.weight"]
  assert found.only_finetuned == [f"l.q.{part}.weight"]
  other = arrays({f"a.{part}.b.w": (3, 3), f"a.b.{part}.w": (3, 3)})
  found = pair_up(arrays({"a.b.w": (3, 3)}), other)
  assert found.pairs == []


def test_part_of_a_word_is_no_wrapper():
  names = ["l.my_module.w", "l.base_layers.w", "l.x_orig_mod.w"]
  assert see_through(names, ["l.w"], str)[0] == {n: n for n in names}
