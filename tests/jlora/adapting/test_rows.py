# SPDX-License-Identifier: Apache-2.0
"""One batch, an adapter of its own for each row; and decoding with adapters."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora import models
from jlora.adapting.banks import make_bank
from jlora.adapting.binding import bind
from jlora.adapting.rows import adapt_rows
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora
from jlora.training import init_lora
from tests.jlora.adapting.test_models import CONFIGS, TOKENS, loras_for

KEY = jax.random.key(0)
COUNT = 3
IDS = jnp.array([2, -1, 0, 2])
ROWS = jax.random.randint(jax.random.key(1), (4, 7), 0, 23)


@functools.cache
def small():
  """A model, adapters of ranks 1, 2 and 4, the second with fewer modules."""
  run, params = models.init(CONFIGS["llama, tied"], KEY)
  adapters = [loras_for(params, 10 * i, 2**i) for i in range(COUNT)]
  adapters[1] = {p: x for p, x in adapters[1].items() if "attn" in p}
  return run, params, adapters


@functools.cache
def fast():
  """The model compiled once for rows alone and together."""
  return jax.jit(small()[0])


def test_rows_are_as_in_runs_of_their_own():
  run, params, adapters = small()
  found = jax.jit(adapt_rows(run))(params, make_bank(adapters), IDS, ROWS)
  for row, at in enumerate(IDS.tolist()):
    own = params if at < 0 else apply(params, adapters[at])
    alone = fast()(own, ROWS[row : row + 1])[0]
    np.testing.assert_allclose(found[row], alone, rtol=1e-3, atol=2e-5)


def test_no_adapter_is_the_base_bit_by_bit():
  run, params, adapters = small()
  bank = make_bank(adapters)
  rows = jax.jit(adapt_rows(run))
  base = np.asarray(fast()(params, ROWS))
  none = np.asarray(rows(params, bank, jnp.full_like(IDS, -1), ROWS))
  assert none.tobytes() == base.tobytes()
  found = np.asarray(rows(params, bank, IDS, ROWS))
  assert found[1].tobytes() == base[1].tobytes()
  assert found[0].tobytes() != base[0].tobytes()


def test_several_for_a_row_with_weights():
  run, params, adapters = small()
  ids = jnp.array([[0, 2], [1, -1], [-1, -1], [2, 1]])
  weights = jnp.array([[0.5, 2.0], [1.0, 7.0], [1.0, 1.0], [-1.0, 0.25]])
  found = jax.jit(adapt_rows(run))(
    params, make_bank(adapters), ids, ROWS, weights=weights
  )
  for row in range(4):
    used = [
      (i, w) for i, w in zip(ids[row], weights[row], strict=True) if i >= 0
    ]
    merged = apply(params, [adapters[i] for i, _ in used], [w for _, w in used])
    alone = fast()(merged, ROWS[row : row + 1])[0]
    np.testing.assert_allclose(found[row], alone, rtol=1e-3, atol=5e-5)


def test_rows_are_differentiable():
  run, params, adapters = small()
  bank, ids = make_bank(adapters), IDS[:2]

  def loss(bank):
    return jnp.sum(jnp.sin(adapt_rows(run)(params, bank, ids, ROWS[:2])))

  def alone(bank):
    own = apply(params, jax.tree.map(lambda x: x[2], bank))
    return jnp.sum(jnp.sin(run(own, ROWS[:1])))

  found, wanted = (jax.jit(jax.grad(f))(bank) for f in (loss, alone))
  for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("ids", [[3, 0, 0, 0], [-2, 0, 0, 0]])
def test_ids_that_do_not_exist_are_refused(ids):
  run, params, adapters = small()
  with pytest.raises(ValueError, match=str(ids[0])):
    adapt_rows(run)(params, make_bank(adapters), jnp.array(ids), ROWS)


def test_nothing_is_compiled_again():
  """Another adapter of that shape, scale, set of ids, or rank in a bank."""
  chex.clear_trace_counter()
  run, params, adapters = small()

  @chex.assert_max_traces(n=1)
  def once(params, tokens):
    return run(params, tokens)

  bank = make_bank(adapters[:2], rank=4)
  other = make_bank([adapters[2], adapters[0]], rank=4)
  double = {p: Lora(x.a, x.b, 2 * x.scale) for p, x in bank.items()}
  rows = jax.jit(adapt_rows(once))
  outs = [
    rows(params, each, ids, ROWS)
    for each, ids in (
      (bank, IDS % 2), (other, IDS % 2), (double, IDS % 2), (bank, 1 - IDS % 2),
    )
  ]  # fmt: skip
  assert all(np.abs(outs[0] - out).max() > 1e-3 for out in outs[1:])


def test_decoding_with_adapters_compiles_once_and_agrees_with_merged():
  chex.clear_trace_counter()
  run, params, adapters = small()

  @chex.assert_max_traces(n=1)
  def decode(params, tokens):
    return models.generate(run, params, tokens, 6)

  decode_adapted = jax.jit(adapt(decode))
  swapped = {p: Lora(-x.a, x.b, x.scale) for p, x in adapters[2].items()}
  scaled = {p: Lora(x.a, x.b, 3 * x.scale) for p, x in adapters[2].items()}
  said = []
  for loras in (adapters[2], swapped, scaled):
    found = decode_adapted(bind(params, loras), TOKENS)
    wanted = models.generate(run, apply(params, loras), TOKENS, 6)
    np.testing.assert_array_equal(found, wanted)
    said.append(np.asarray(found))
  assert any(np.any(said[0] != other) for other in said[1:])


def test_rows_decode_with_their_own():
  run, params, adapters = small()
  decode = adapt_rows(lambda p, t: models.generate(run, p, t, 5))
  found = jax.jit(decode)(params, make_bank(adapters), IDS, ROWS)
  for row, at in enumerate(IDS.tolist()):
    own = params if at < 0 else apply(params, adapters[at])
    alone = models.generate(run, own, ROWS[row : row + 1], 5)[0]
    np.testing.assert_array_equal(found[row], alone)


W = jax.random.normal(jax.random.key(5), (3, 4))
BANK = {
  "w": Lora(
    jax.random.normal(jax.random.key(6), (COUNT, 2, 3)),
    jax.random.normal(jax.random.key(7), (COUNT, 2, 4)),
    jnp.ones(COUNT),
  )
}


def own(at):
  """The matrix of a row."""
  if at < 0:
    return W
  return apply({"w": W}, {"w": jax.tree.map(lambda x: x[at], BANK["w"])})["w"]


def cached(p, cache, x, mask):
  """A scanned cache (layers, batch, time, d), an index, and a mask for all."""
  layers = lax.dynamic_update_index_in_dim(
    cache["kv"], jnp.stack([x @ p["w"], x @ p["w"] + 1]), cache["at"], 2
  )
  return layers.sum((0, 2)) * mask[None], {"kv": layers, "at": cache["at"] + 1}


X = jax.random.normal(jax.random.key(8), (4, 3))
CACHE = {
  "kv": jax.random.normal(jax.random.key(9), (2, 4, 5, 4)),
  "at": jnp.int32(1),
}
MASK = jnp.arange(4.0)
# Name -> (in_axes, out_axes) that say the same of `cached`.
SAME = {
  "trees": (({"kv": 1, "at": None}, 0, None), (0, {"kv": 1, "at": None})),
  "numbers without axes are shared": ((1, 0, None), (0, 1)),
  "a list, and from the end": ([-3, -2, None], [-2, -3]),
}


@pytest.mark.parametrize("name", SAME)
def test_rows_lie_where_the_axes_say(name):
  in_axes, out_axes = SAME[name]
  run = adapt_rows(cached, in_axes=in_axes, out_axes=out_axes, strict=True)
  out, cache = jax.jit(run)({"w": W}, BANK, IDS, CACHE, X, MASK)
  assert cache["kv"].shape == CACHE["kv"].shape
  assert cache["at"].shape == ()
  assert cache["at"] == 2
  for i, at in enumerate(IDS.tolist()):
    row = {"kv": CACHE["kv"][:, i : i + 1], "at": CACHE["at"]}
    alone, kept = cached({"w": own(at)}, row, X[i : i + 1], MASK)
    np.testing.assert_allclose(out[i], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      cache["kv"][:, i], kept["kv"][:, 0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("axes", [[0, 1], (0, 1), [-2, -1], [0, {"y": 1}]])
def test_results_in_lists_and_tuples(kind, axes):
  if kind is list and type(axes) is tuple:
    pytest.skip("as jax.vmap, a tuple of axes is for a tuple")
  tree = isinstance(axes[1], dict)

  def fn(p, x):
    y = x @ p["w"]
    return kind([y, {"y": y.T} if tree else y.T])

  found = adapt_rows(fn, out_axes=axes)({"w": W}, BANK, IDS, X)
  assert type(found) is kind
  first, second = found
  second = second["y"] if tree else second
  np.testing.assert_array_equal(first, second.T)
  wanted = adapt_rows(lambda p, x: x @ p["w"])({"w": W}, BANK, IDS, X)
  np.testing.assert_array_equal(first, wanted)


def test_keywords_and_keys():
  def run(p, x, key, *, power, scale=None, flag):
    noise = jax.random.normal(key, (1, 4))
    return x @ p["w"] ** power * scale[:, None] + (noise if flag else 0)

  key, scale = jax.random.key(0), jnp.arange(4.0)
  found = adapt_rows(run, in_axes=(0, None))(
    {"w": W}, {}, IDS, X, key, power=2, scale=scale, flag=True
  )
  wanted = run({"w": W}, X, key, power=2, scale=scale, flag=True)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_cache_of_linen_with_its_index():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.MultiHeadDotProductAttention(4, qkv_features=8, decode=True)(x)
      return nn.Dense(3)(x)

  net, x = Net(), jax.random.normal(KEY, (4, 2, 1, 8))
  variables = jax.jit(net.init)(KEY, jnp.ones((4, 5, 8)))
  params, cache = variables["params"], variables["cache"]
  adapters = [
    jax.tree.map(lambda x, i=i: x + 0.3 * i, init_lora(params, 2))
    for i in range(COUNT)
  ]

  def step(params, cache, x):
    given = {"params": params, "cache": cache}
    y, new = net.apply(given, x, mutable=["cache"])
    return y, new["cache"]

  rows = jax.jit(adapt_rows(step, strict=True))
  bank = make_bank(adapters)
  first, kept = rows(params, bank, IDS, cache, x[:, 0])
  second, kept = rows(params, bank, IDS, kept, x[:, 1])
  index = kept["MultiHeadDotProductAttention_0"]["cache_index"]
  assert index.shape == ()
  assert index == 2
  alone = jax.jit(step)
  for i, at in enumerate(IDS.tolist()):
    merged = params if at < 0 else apply(params, adapters[at])
    own = jax.tree.map(lambda x, i=i: x[i : i + 1] if x.ndim else x, cache)
    for t, found in enumerate((first, second)):
      wanted, own = alone(merged, own, x[i : i + 1, t])
      np.testing.assert_allclose(found[i], wanted[0], rtol=1e-3, atol=1e-5)


WRONG = {
  "no row for each id": (
    lambda p, x, mask: x @ p["w"] * mask[None], {}, (X, jnp.ones(3)),
    r"1 arguments have no row .*args\[1\] \(3,\) along axis 0.*in_axes"),
  "no such axis": (
    lambda p, x: x @ p["w"], {"in_axes": 2}, (X,),
    r"args\[0\] \(4, 3\) along axis 2"),
  "in_axes of another tree": (
    lambda p, x: x @ p["w"], {"in_axes": (0, 0)}, (X,), "in_axes=.0, 0. does"),
  "out_axes of another tree": (
    lambda p, x: x @ p["w"], {"out_axes": (0, 0)}, (X,), "out_axes=.0, 0. do"),
  "a mean over rows": (
    lambda p, x: {"loss": (x @ p["w"]).mean()}, {}, (X,),
    r"1 results of one row .*results\['loss'\] \(\)"),
  "rows along another axis": (
    lambda p, x: (x @ p["w"]).T, {}, (X,), r"results \(4, 1\) along axis 0"),
  "shared and yet its own": (
    lambda p, x: (x @ p["w"], x.sum()), {"out_axes": (0, None)}, (X,),
    r"1 results are not the same for all rows: results\[1\] \(\)"),
  "an index that rows change": (
    lambda p, x, at: (x @ p["w"], at + x.sum()), {}, (X, jnp.float32(0)),
    r"not the same for all rows: results\[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_of_rows_is_refused(name):
  fn, axes, args, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    adapt_rows(fn, **axes)({"w": W}, BANK, IDS, *args)


@pytest.mark.parametrize(
  "dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"]
)
def test_ids_of_any_integers(dtype):
  rows = adapt_rows(lambda p, x: x @ p["w"])
  ids = jnp.array([2, 0, 1, 2])
  wanted = rows({"w": W}, BANK, ids, X)
  given = np.asarray(ids, dtype)
  for run in (rows, jax.jit(rows)):
    np.testing.assert_array_equal(run({"w": W}, BANK, given, X), wanted)
  one = bind({"w": W}, BANK, ids=given[0])
  found = adapt(lambda p, x: x @ p["w"])(one, X[:1])
  np.testing.assert_allclose(found, wanted[:1], rtol=1e-6)


def test_an_unsigned_id_past_the_bank_is_nan_within_jit():
  rows = jax.jit(adapt_rows(lambda p, x: x @ p["w"]))
  ids = np.array([0, 2**32 - 1, 2**31, 3], np.uint32)
  found = rows({"w": W}, BANK, ids, X)
  assert np.isnan(found).all(-1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("ids", [np.ones(4, np.float32), np.ones(4, bool)])
@pytest.mark.parametrize("wrap", [jax.jit, lambda run: run])
def test_ids_that_are_no_integers_are_refused(ids, wrap):
  rows = wrap(adapt_rows(lambda p, x: x @ p["w"]))
  with pytest.raises(ValueError, match=f"ids are {ids.dtype}"):
    rows({"w": W}, BANK, ids, X)
  with pytest.raises(ValueError, match=f"ids are {ids.dtype}"):
    wrap(lambda ids: bind({"w": W}, BANK, ids=ids))(ids)


def test_ids_and_weights_of_other_shapes_are_refused():
  rows = adapt_rows(lambda p, x: x @ p["w"])
  with pytest.raises(ValueError, match=r"ids are \(\)"):
    rows({"w": W}, BANK, jnp.int32(0), X)
  with pytest.raises(ValueError, match=r"weights are \(4,\); ids \(4, 1\)"):
    rows({"w": W}, BANK, IDS[:, None], X, weights=jnp.ones(4))


def experts(p, x):
  """A layer of experts, (batch, time, 3) -> (batch, time, 4), in groups."""
  rows = x.reshape(-1, 3)
  which = (rows[:, :2] > 0).sum(1)
  order = jnp.argsort(which)
  counts = jnp.bincount(which, length=3).astype(jnp.int32)
  y = lax.ragged_dot(rows[order], p["w"], counts)
  return {"y": y[jnp.argsort(order)].reshape(*x.shape[:2], 4)}


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
def test_what_jax_cannot_map_runs_row_by_row(transform):
  keys = jax.random.split(KEY, 4)
  stack = jax.random.normal(keys[0], (3, 3, 4))
  bank = {
    "w": Lora(
      jax.random.normal(keys[1], (COUNT, 3, 2, 3)),
      jax.random.normal(keys[2], (COUNT, 3, 2, 4)),
      jnp.ones((COUNT, 3)),
    )
  }
  x = jax.random.normal(keys[3], (5, 4, 3))  # time first
  run = adapt_rows(experts, in_axes=1, out_axes={"y": 1}, strict=True)

  def loss(bank):
    return (run({"w": stack}, bank, IDS, x)["y"] ** 2).sum()

  def alone(bank):
    each = [
      experts({"w": stack}, x[:, row : row + 1])["y"]
      if at < 0
      else experts(
        apply({"w": stack}, jax.tree.map(lambda x, at=at: x[at], bank)),
        x[:, row : row + 1],
      )["y"]
      for row, at in enumerate(IDS.tolist())
    ]
    return sum((y**2).sum() for y in each)

  with pytest.warns(UserWarning, match="one after the other"):
    found, gradient = transform(jax.value_and_grad(loss))(bank)
  wanted, right = jax.value_and_grad(alone)(bank)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  chex.assert_trees_all_close(gradient, right, rtol=1e-4, atol=1e-4)


def test_no_rows_at_all_are_none():
  """Also where arguments and results are shared."""
  bank = {"w": Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 2)), jnp.ones(2))}
  params, none = {"w": jnp.zeros((3, 2))}, jnp.zeros(0, jnp.int32)
  run = adapt_rows(lambda p, x: x @ p["w"])
  assert run(params, bank, none, jnp.ones((0, 3))).shape == (0, 2)
  axes = {"in_axes": (1, None), "out_axes": (1, None)}
  run = adapt_rows(lambda p, x, at: (x @ p["w"], at + 1), **axes)
  y, at = run(params, bank, none, jnp.ones((4, 0, 3)), jnp.arange(2))
  assert (y.shape, at.tolist()) == ((4, 0, 2), [1, 2])


@pytest.mark.parametrize("axis", ["x", 1.5, True])
@pytest.mark.parametrize("which", ["in_axes", "out_axes"])
def test_axes_that_are_none_are_refused(axis, which):
  bank = {"w": Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 2)), jnp.ones(2))}
  run = adapt_rows(lambda p, x: x @ p["w"], **{which: axis})
  with pytest.raises(
    ValueError, match=f"{which} has .*; an axis is an integer"
  ):
    run(
      {"w": jnp.zeros((3, 2))}, bank, jnp.zeros(1, jnp.int32), jnp.ones((1, 3))
    )
