# SPDX-License-Identifier: Apache-2.0
"""Alignment: planted orders come back, the score never falls."""

import itertools
import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.alignment.assignments import solve
from jlora.alignment.layouts import lay_out_units
from jlora.alignment.matching import (
  match_activations,
  match_weights,
  merge_many,
)
from jlora.alignment.permutations import compose, identity, is_identity, permute
from jlora.alignment.symmetries import Row, Symmetry, chain
from jlora.paths import flatten, unflatten
from tests.helpers.unit_orders import NAMES, distance, draw, network

TWO = chain(["in", "out"])
HEADS = Symmetry(
  (Row("v", "-, head value"), Row("o", "head value, -")),
  {"value": "head"},
  {"head": 3},
)


def pair(seed, units=5, samples=3):
  rng = np.random.default_rng(seed)
  return {
    "in/kernel": rng.standard_normal((samples, units), np.float32),
    "out/kernel": rng.standard_normal((units, 2), np.float32),
  }


def quietly(function, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    return function(*args, **kwargs)


def rising(scores):
  return all(y >= x - 1e-4 * abs(x) for x, y in itertools.pairwise(scores))


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_order_is_found(name):
  _, params, _, symmetry = network(name, 0)
  layout = lay_out_units(symmetry, flatten(params))
  orders = draw(params, symmetry, 1)
  other = permute(params, orders, symmetry)
  found = match_weights(params, other, symmetry)
  aligned = permute(other, found.permutations, symmetry)
  assert distance(params, aligned) < 1e-5
  assert is_identity(compose(found.permutations, orders, layout))
  assert rising(found.scores)
  assert found.scores[-1] == pytest.approx(
    sum(float(np.sum(x**2)) for x in jax.tree.leaves(params)), rel=1e-5
  )
  if name in ("llama", "gpt2"):  # the stream first, then the rest, then nothing
    assert len(found.scores) == 3


@pytest.mark.parametrize("name", ["mlp", "llama", "mixtral", "gpt2"])
def test_strangers_come_closer(name):
  _, a, _, symmetry = network(name, 0)
  _, b, _, _ = network(name, 7)
  found = quietly(match_weights, a, b, symmetry)
  aligned = permute(b, found.permutations, symmetry)
  assert rising(found.scores)
  assert found.scores[-1] > found.scores[0]
  assert distance(a, aligned) < distance(a, b)


def test_the_numbers_of_the_paper_like_case():
  rng = np.random.default_rng(0)
  w1, w2 = rng.standard_normal((3, 2)), rng.standard_normal((2, 3))
  a = {"in/kernel": w1.T, "out/kernel": w2.T}
  b = permute(a, {"unit.0": np.array([2, 0, 1])}, TWO)
  found = match_weights(a, b, TWO).permutations["unit.0"]
  assert found.tolist() == [1, 2, 0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), units=st.integers(2, 6))
def test_one_permutation_is_the_best_of_all(seed, units):
  a, b = pair(seed, units), pair(seed + 1000, units)
  found = quietly(match_weights, a, b, TWO, tol=0.0)
  best = max(
    sum(
      float(np.vdot(a[path], moved[path]))
      for moved in [permute(b, {"unit.0": np.array(order)}, TWO)]
      for path in a
    )
    for order in itertools.permutations(range(units))
  )
  assert found.scores[-1] == pytest.approx(best, abs=1e-4)


def test_heads_with_one_thing_inside_are_matched_exactly():
  """A layer's heads and their values: all 3! x 2!^3 orders."""
  rng = np.random.default_rng(0)
  a, b = (
    {"v": rng.standard_normal((3, 6), np.float32),
     "o": rng.standard_normal((6, 2), np.float32)}
    for _ in range(2)
  )  # fmt: skip
  found = match_weights(a, b, HEADS, tol=0.0)
  best = -np.inf
  inner = list(itertools.permutations(range(2)))
  for order in itertools.permutations(range(3)):
    for rows in itertools.product(inner, repeat=3):
      orders = {"head": np.array(order), "value": np.array(rows)}
      moved = permute(b, orders, HEADS)
      best = max(best, sum(float(np.vdot(a[p], moved[p])) for p in a))
  assert found.scores[-1] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("name", ["mlp", "llama", "mixtral"])
def test_a_finetune_of_the_base_is_aligned_already(name):
  _, a, _, symmetry = network(name, 0)
  rng = np.random.default_rng(1)
  b = jax.tree.map(
    lambda x: x + np.float32(0.02) * rng.standard_normal(x.shape, np.float32), a
  )
  with pytest.warns(UserWarning, match="Alignment buys nothing"):
    found = match_weights(a, b, symmetry)
  assert is_identity(found.permutations)


def test_equal_units_and_zeros_move_nothing():
  same = {"in/kernel": np.ones((3, 4), np.float32),
          "out/kernel": np.zeros((4, 2), np.float32)}  # fmt: skip
  for a in (same, {path: 0 * x for path, x in same.items()}):
    with pytest.warns(UserWarning, match="aligned as they are"):
      found = match_weights(a, same, TWO)
    assert is_identity(found.permutations)


def test_related_networks_that_move_are_told():
  a = pair(0, 50, 60)
  b = jax.tree.map(np.copy, a)
  b["in/kernel"][:, [0, 1]] = b["in/kernel"][:, [1, 0]]
  b["out/kernel"][[0, 1]] = b["out/kernel"][[1, 0]]
  with pytest.warns(UserWarning, match="cosine of 0.9"):
    found = match_weights(a, b, TWO)
  assert found.permutations["unit.0"][:3].tolist() == [1, 0, 2]


@pytest.mark.parametrize("name", ["mlp", "llama", "mixtral", "gpt2"])
def test_many_copies_become_one(name):
  _, a, _, symmetry = network(name, 0)
  copies = [a] + [
    permute(a, draw(a, symmetry, seed), symmetry) for seed in (1, 2)
  ]
  mean, orders = merge_many(copies, symmetry)
  for copy, order in zip(copies, orders, strict=True):
    assert distance(mean, permute(copy, order, symmetry)) < 1e-5
  with pytest.raises(ValueError, match="two or more"):
    merge_many([a], symmetry)


def test_a_mean_of_strangers_is_nearer_to_them_than_the_plain_one():
  nets = [network("mlp", seed) for seed in range(3)]
  symmetry, trees = nets[0][3], [net[1] for net in nets]
  mean, orders = merge_many(trees, symmetry)
  plain = jax.tree.map(lambda *x: np.mean(x, axis=0), *trees)
  moved = [
    permute(tree, order, symmetry)
    for tree, order in zip(trees, orders, strict=True)
  ]
  spread = lambda centre, all_: sum(distance(centre, x) ** 2 for x in all_)  # noqa: E731
  assert spread(mean, moved) < spread(plain, trees)


def test_activations_give_a_planted_order_back():
  _, params, _, symmetry = network("mlp", 0)
  orders = draw(params, symmetry, 1)
  rng = np.random.default_rng(0)
  names = ("params/a/kernel", "params/b/kernel")
  acts = {n: np.maximum(rng.standard_normal((40, 2, w), np.float32), 0)
          for n, w in zip(names, (12, 13), strict=True)}  # fmt: skip
  other = {
    n: x[..., orders[f"unit.{i}"]] for i, (n, x) in enumerate(acts.items())
  }
  found = match_activations(acts, other, symmetry, params)
  layout = lay_out_units(symmetry, flatten(params))
  assert is_identity(compose(found.permutations, orders, layout))
  assert found.scores[1] > found.scores[0]
  with pytest.raises(ValueError, match="1 paths are no parameters"):
    match_activations({"x": acts[names[0]]}, {"x": acts[names[0]]}, symmetry,
                      params)  # fmt: skip
  with pytest.raises(ValueError, match="1 shapes differ"):
    match_activations(acts, {**other, names[0]: acts[names[1]]}, symmetry,
                      params)  # fmt: skip


def test_activations_of_heads_and_experts():
  for name, kernel, width in (
    ("llama", "layers/0/attn/v/kernel", 12),
    ("gpt2", "h/0/attn/c_attn/kernel", 72),
  ):
    _, params, _, symmetry = network(name, 0)
    orders = draw(params, symmetry, 1)
    # Numbered outputs tell where the network puts them.
    del orders["stream"]
    numbers = np.broadcast_to(np.arange(width), (24, width))
    index = flatten(permute(
      unflatten({**flatten(params), kernel: numbers}, params), orders, symmetry
    ))[kernel][0]  # fmt: skip
    x = np.random.default_rng(0).standard_normal((30, width), np.float32)
    found = match_activations(
      {kernel: x}, {kernel: x[:, index]}, symmetry, params
    )
    layout = lay_out_units(symmetry, flatten(params))
    seen = layout.places[kernel].names() - {"stream"}
    back = compose(found.permutations, {**identity(layout), **orders}, layout)
    assert is_identity({name: back[name] for name in seen})


def test_a_start_is_kept():
  _, a, _, symmetry = network("llama", 0)
  other = permute(a, draw(a, symmetry, 1), symmetry)
  found = match_weights(a, other, symmetry).permutations
  again = match_weights(a, other, symmetry, start=found, sweeps=2)
  jax.tree.map(np.testing.assert_array_equal, again.permutations, found)


def test_jax_agrees_with_numpy_in_bfloat16_too():
  rng = np.random.default_rng(0)
  a = {"v": rng.standard_normal((5, 6), np.float32),
       "o": rng.standard_normal((6, 5), np.float32)}  # fmt: skip
  other = permute(a, draw(a, HEADS, 1), HEADS)
  found = match_weights(a, other, HEADS).permutations
  on_device = match_weights(
    jax.tree.map(jax.numpy.asarray, a),
    jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.bfloat16), other),
    HEADS,
  )
  jax.tree.map(np.testing.assert_array_equal, on_device.permutations, found)
  assert not is_identity(found)


def test_sharded_networks_are_matched_and_permuted_as_whole_ones():
  a = pair(0, 8, 4)
  b = permute(a, {"unit.0": np.roll(np.arange(8), 3)}, TWO)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  spec = {"in/kernel": P(None, "x"), "out/kernel": P("x")}
  left, right = (
    {path: jax.device_put(x, NamedSharding(mesh, spec[path]))
     for path, x in tree.items()}
    for tree in (a, b)
  )  # fmt: skip
  found = match_weights(left, right, TWO).permutations
  moved = permute(right, found, TWO)
  jax.tree.map(np.testing.assert_array_equal, moved, a)
  assert len(moved["in/kernel"].sharding.device_set) == 8


def test_networks_must_be_alike_and_finite():
  a = pair(0)
  with pytest.raises(ValueError, match="1 shapes differ: in/kernel"):
    match_weights(a, {**a, "in/kernel": np.ones((3, 6), np.float32)}, TWO)
  with pytest.raises(ValueError, match="only in a: out/kernel"):
    match_weights(a, {"in/kernel": a["in/kernel"]}, TWO)
  with pytest.raises(ValueError, match="NaN or infinity: in/kernel of b"):
    match_weights(a, {**a, "in/kernel": np.nan * a["in/kernel"]}, TWO)


def test_units_that_are_never_active_stay_where_they_are():
  scores = np.zeros((6, 6))
  scores[0, 1] = scores[1, 0] = 1.0
  assert solve(scores, 1e-6)[0].tolist() == [1, 0, 2, 3, 4, 5]
  assert solve(scores, 1e-6)[1] == pytest.approx(2)


def test_ties_keep_the_present_order():
  assert solve(np.ones((4, 4)))[0].tolist() == [0, 1, 2, 3]
  assert solve(np.eye(3)[::-1])[0].tolist() == [2, 1, 0]
