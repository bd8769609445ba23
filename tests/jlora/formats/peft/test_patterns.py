# SPDX-License-Identifier: Apache-2.0
"""Regexes of adapter_config.json match as Python's do, and always end."""

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.formats.peft import patterns
from jlora.formats.peft.patterns import is_end, is_inside, is_whole

# As PEFT asks, `utils/other.py` and `tuners/tuners_utils.py` of 0.21.2.
PEFT = {
  is_whole: lambda p, name: re.fullmatch(p, name),
  is_end: lambda p, name: re.match(rf"(.*\.)?({p})$", name),
  is_inside: lambda p, name: re.match(rf"(^|.*\.)(?:{p})($|\..*)", name),
}
ATOMS = st.sampled_from(
  ["a", "b", "c", ".", r"\.", r"\d", "[abc]", "[^a]", "[]a]", r"\w", "x", "1",
   r"\b", "^", "$", r"\s", r"\x61", r"[\d.]", r"\B", r"\A", r"\Z"]
)  # fmt: skip
REPEATS = st.sampled_from(
  ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?", "+?", "??", "{0,}?",
   "{1,2}?"]
)  # fmt: skip


def grown(inner):
  """Patterns made of others."""
  return st.one_of(
    st.tuples(inner, inner).map("".join),
    st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
    st.tuples(inner, REPEATS).map("(?:{0[0]}){0[1]}".format),
    inner.map("(?={})".format),
    inner.map("(?!{})".format),
    inner.map("(?<!a){}".format),
    inner.map("(?<=[ab]){}".format),
  )


PATTERNS = st.recursive(ATOMS, grown, max_leaves=12)


@settings(max_examples=600, deadline=None)
@given(PATTERNS, st.text("abc.1x_", min_size=1, max_size=8))
def test_patterns_match_as_those_of_python_do(pattern, name):
  try:
    with warnings.catch_warnings(action="ignore"):
      for theirs in PEFT.values():
        theirs(pattern, name)
  except re.error:  # `^*`, say
    return
  for mine, theirs in PEFT.items():
    assert mine(pattern, name) == (theirs(pattern, name) is not None), mine


NAMES = [
  f"{place}.{i}.{part}"
  for place in ("model.layers", "vision.blocks", "model.language_model.layers")
  for i in (0, 3, 11)
  for part in ("self_attn.q_proj", "mlp.down_proj", "attn.qkv", "norm")
]
# As people write them: unsloth, ms-swift, Phi-4, PEFT's own documentation.
WRITTEN = (
  r"(?:.*?(?:vision|image|patch).*?(?:self_attn|attn|mlp|ffn).*?"
  r"(?:q_proj|k_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
  r"(?:self_attn|attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))",
  r"^(model\.language_model(?=\.).*\.(q_proj|down_proj))$",
  r"(?!.*(vision|visual)).*\.(q|k|v|down)_proj",
  r"(layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj)))",
  r".*layers\.(0|3)\.self_attn\.q_proj",
  r".*\.(?P<layer>\d+)\.mlp\.\w+",
  r"model\.layers\.0\.self_attn\.q_proj|vision\.blocks\.3\.attn\.qkv",
)


@pytest.mark.parametrize("pattern", WRITTEN)
def test_patterns_that_are_in_use(pattern):
  expected = [re.fullmatch(pattern, name) is not None for name in NAMES]
  assert [is_whole(pattern, name) for name in NAMES] == expected
  for mine in (is_end, is_inside):
    found = [mine(pattern, name) for name in NAMES]
    assert found == [PEFT[mine](pattern, name) is not None for name in NAMES]


ENDLESS = (
  "(.+)+#", "((a+)+)+#", "(a|a)*#", "(a|aa)+#", "(.*)*#", "(.*.*.*.*.*.*)#",
  "(?:(?:a{1000}){1000}){1000}", "(a?){1000}#", "((((.*)*)*)*)*#",
  "(.*?,){99}#",
)  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("mine", PEFT)
def test_no_pattern_takes_long(pattern, mine):
  for name in ("a" * 64, "a" * 4000, "layers.0." * 99):
    started = time.process_time()
    with contextlib.suppress(ValueError):  # that it takes too long
      assert not mine(pattern, name)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
  "pattern",
  ["(", "a{2", "*", "[", r"(a)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)", "(?>a)b",
   "a*+", "(?i)a", "(" * 60 + ")" * 60, "a" * 2**17 + "?", "(?x: a)",
   "a{99999999999}"],
)  # fmt: skip
def test_what_is_not_read_is_told(pattern):
  if pattern == "a{2":  # a letter, to Python and to us
    assert is_whole(pattern, "a{2")
    return
  with pytest.raises(ValueError, match="is no regex that is read") as told:
    is_whole(pattern, "a")
  assert len(str(told.value)) < 300


def test_lists_of_names_are_only_looked_up(monkeypatch):
  names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3000)]
  pattern = "|".join(map(re.escape, names))
  monkeypatch.setattr(patterns, "_Reader", None)
  assert is_whole(pattern, names[2999])
  assert not is_whole(pattern, "model.layers.0.self_attn.q_prox")
  assert is_end(re.escape(names[7]), f"base.{names[7]}")
  assert not is_end("q_proj", "xq_proj")
