# SPDX-License-Identifier: Apache-2.0
"""Paths: round trips for every kind of tree, rules, selectors and keys."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jlora
from jlora import paths

NAMES = st.text("abcxyz", min_size=1, max_size=3)
TREES = st.recursive(
  st.integers(),
  lambda children: (
    st.dictionaries(NAMES, children, min_size=1, max_size=3)
    | st.lists(children, min_size=1, max_size=3)
    | st.tuples(children, children)
  ),
  max_leaves=12,
)


@given(TREES)
def test_unflatten_inverts_flatten(tree):
  flat = paths.flatten(tree)
  assert list(flat.values()) == jax.tree.leaves(tree)
  assert paths.unflatten(flat, like=tree) == tree


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name="down")(nn.Dense(3, name="up")(x))


class NnxMlp(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(4, 3, rngs=rngs)
    self.down = nnx.Linear(3, 2, rngs=rngs)


MLP_PATHS = {"up/kernel", "up/bias", "down/kernel", "down/bias"}


def test_linen_variables():
  params = Mlp().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
  flat = paths.flatten(params)
  assert set(flat) == MLP_PATHS
  assert flat["up/kernel"] is params["up"]["kernel"]
  doubled = paths.unflatten({p: 2 * x for p, x in flat.items()}, like=params)
  same = jax.tree.map(lambda a, b: bool((a == 2 * b).all()), doubled, params)
  assert all(jax.tree.leaves(same))


def test_nnx_state_has_the_same_paths_as_linen():
  model = NnxMlp(nnx.Rngs(0))
  state = nnx.state(model, nnx.Param)
  flat = paths.flatten(state)
  assert set(flat) == MLP_PATHS
  assert flat["up/kernel"].shape == (4, 3)
  doubled = paths.unflatten({p: 2 * x for p, x in flat.items()}, like=state)
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  nnx.update(model, doubled)
  assert bool((model.up.kernel[...] == 2 * flat["up/kernel"]).all())


def test_a_flat_dict_keeps_its_names():
  flat = {"model.q.weight": 1, "model.k.weight": 2}
  assert paths.flatten(flat) == flat


def test_a_lazy_mapping_keeps_its_names_and_order():
  lazy = types.MappingProxyType({"b.weight": 1, "a.weight": 2})
  assert list(paths.flatten(lazy).items()) == [("b.weight", 1), ("a.weight", 2)]


def test_flatten_refuses_leaves_that_share_a_path():
  with pytest.raises(ValueError, match="1 leaves of the tree share a path"):
    paths.flatten({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize(
  ("flat", "message"),
  [
    ({"a": 1}, "only in the tree: b/0"),
    ({"a": 1, "b/0": 2, "c": 3}, "only in the given leaves: c"),
    ({"x": 1}, "only in the tree: a, b/0; only in the given leaves: x"),
  ],
)
def test_unflatten_refuses_other_paths(flat, message):
  with pytest.raises(ValueError, match=message):
    paths.unflatten(flat, like={"a": 0, "b": [0]})


def test_check_same_names_three_and_counts_the_rest():
  paths.check_same_paths("ab", "ba", "left", "right")
  with pytest.raises(ValueError, match="only in left: a, b, c and 2 more"):
    paths.check_same_paths("edcba", [], "left", "right")


RULES = [(r".*/q", 1), (r".*", 2), (r"never", 3)]


def test_the_first_rule_that_matches_the_whole_path_wins():
  assert paths.first_match(RULES, "layers/q") == 1
  assert paths.first_match(RULES, "layers/q/kernel") == 2
  assert paths.first_match(RULES, "never") == 2
  assert paths.first_match(RULES[:1], "k") is None
  assert paths.first_match(RULES[:1], "k", default=7) == 7
  assert paths.first_match([(".*", 0)], "k", default=7) == 0


def test_matching_includes_then_excludes():
  everything = paths.matching()
  assert everything("any/thing", None)
  select = paths.matching(include=r".*mlp.*", exclude=r".*/0/.*")
  assert select("layers/1/mlp/up", None) is True
  assert select("layers/0/mlp/up", None) is False
  assert select("layers/1/attn/q", None) is False
  assert paths.matching(include="mlp")("mlp/up", None) is False
  assert paths.matching(exclude="mlp")("mlp/up", None) is True


def test_keys_depend_on_the_path_alone():
  key = jax.random.key(7)
  names = ["q", "k", "v", "layers/0/q"]
  forward = {name: paths.key_for(key, name) for name in names}
  backward = {name: paths.key_for(key, name) for name in names[::-1]}
  for name in names:
    assert forward[name] == backward[name]
  data = {tuple(jax.random.key_data(k).tolist()) for k in forward.values()}
  assert len(data) == len(names)
  assert paths.key_for(None, "q") == paths.key_for(jax.random.key(0), "q")
  assert paths.key_for(key, "q") != paths.key_for(None, "q")


def test_keys_are_the_same_in_every_process():
  """crc32, not Python's salted hash: the number itself is the promise."""
  expected = jax.random.fold_in(jax.random.key(0), 0x1864E57C)
  assert paths.key_for(None, "layers/0/q") == expected


class Tied(nnx.Module):
  """Two names of one layer; dropouts share their streams of random numbers."""

  def __init__(self, rngs):
    self.a = nnx.Linear(6, 6, rngs=rngs)
    self.b = self.a
    self.rngs, self.more = rngs, rngs


def test_a_parameter_of_nnx_at_two_paths_is_refused():
  module = Tied(nnx.Rngs(0))
  loras = jlora.init_lora(nnx.state(module, nnx.Param), 2)
  assert list(loras) == ["a/kernel"]
  for door in (
    lambda: jlora.init_lora(module, 2),
    lambda: jlora.extract(module, module, rank=2),
    lambda: jlora.compare(module, module, loras),
    lambda: jlora.apply(module, loras),
    lambda: jlora.bind(module, loras),
    lambda: paths.flatten({"model": module}),
  ):
    with pytest.raises(ValueError, match=r"a/kernel and (model/)?b/kernel"):
      door()


def test_random_streams_of_nnx_may_be_shared():
  module = Tied(nnx.Rngs(0))
  module.b = nnx.Linear(6, 6, rngs=module.rngs)
  assert list(jlora.init_lora(module, 2)) == ["a/kernel", "b/kernel"]
