# SPDX-License-Identifier: Apache-2.0
"""Views that are read from a program, by kind of program."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from jlora.adapting import views_from
from jlora.adapting.uses import Atom, regroup
from jlora.paths import flatten, unflatten
from jlora.views import MatrixView

X = jnp.ones((5, 6))
IDS = jnp.arange(4)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def scanned(w, x):
  return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]


def looped(w, x):
  return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x)


def branched(w, x):
  return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: 2 * x @ w)


def on_a_mesh(w, x):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
  run = jax.shard_map(
    lambda w, x: x @ jax.lax.all_gather(w, "d", axis=1, tiled=True),
    mesh=mesh,
    in_specs=(P(None, "d"), P()),
    out_specs=P(),
    check_vma=False,
  )
  return run(w, x)


@jax.custom_vjp
def product(w, x):
  return x @ w


product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: kept)


@jax.custom_jvp
def other_product(w, x):
  return x @ w


other_product.defjvp(
  lambda values, changes: (values[1] @ values[0], values[1] @ changes[0])
)


def conv(w, x, spec, groups=1):
  return jax.lax.conv_general_dilated(
    x, w, (1,), "SAME", dimension_numbers=spec, feature_group_count=groups
  )


def V(inputs, outputs, batch=()):
  return MatrixView(batch, inputs, outputs)


NO_MATRIX = {n: V((), (), tuple(range(n))) for n in (2, 3, 4)}
FORWARD, BACKWARD = V((0,), (1,)), V((1,), (0,))
# What the program does -> (function of w and x, w's shape, x, the view).
KINDS = {
  "product": (lambda w, x: x @ w, (6, 8), X, FORWARD),
  "transposed": (lambda w, x: x @ w.T, (8, 6), X, BACKWARD),
  "cast and scaled": (
    lambda w, x: x.astype(jnp.bfloat16) @ (2 * w).astype(jnp.bfloat16),
    (6, 8), X, FORWARD,
  ),
  "negated sum": (lambda w, x: x @ -(w + jnp.ones((1, 8))), (6, 8), X, FORWARD),
  "heads kept": (
    lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (6, 2, 4), X, V((0,), (1, 2)),
  ),
  "heads summed": (
    lambda w, x: jnp.einsum("bhk,hkd->bd", x.reshape(5, 2, 3), w),
    (2, 3, 8), X, V((0, 1), (2,)),
  ),
  "heads first": (
    lambda w, x: jnp.einsum("bd,hdk->bhk", x, w), (2, 6, 4), X, V((1,), (0, 2)),
  ),
  "reshaped": (
    lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(6, 2, 4)),
    (6, 8), X, FORWARD,
  ),
  "joined": (lambda w, x: x @ w.reshape(6, 8), (6, 2, 4), X, V((0,), (1, 2))),
  "split": (lambda w, x: x @ jnp.split(w, 2, axis=1)[1], (6, 8), X, FORWARD),
  "sliced": (lambda w, x: x @ w[:, 2:4], (6, 8), X, FORWARD),
  "concatenated": (
    lambda w, x: x @ jnp.concatenate([w, w], 1), (6, 8), X, FORWARD,
  ),
  "stacked": (lambda w, x: x @ w[1], (3, 6, 8), X, V((1,), (2,), (0,))),
  "scanned": (scanned, (3, 6, 6), X, V((1,), (2,), (0,))),
  "looped": (looped, (3, 6, 6), X, V((1,), (2,), (0,))),
  "experts": (
    lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 6, 8),
    jnp.ones((3, 5, 6)), V((1,), (2,), (0,)),
  ),
  "ragged": (
    lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), (2, 6, 8), X,
    V((1,), (2,), (0,)),
  ),
  "an expert for each row": (
    lambda w, x: jnp.einsum("bd,bdf->bf", jnp.ones((4, 6)), w[x]), (3, 6, 8),
    IDS % 3, V((1,), (2,), (0,)),
  ),
  "vmap": (
    lambda w, x: jax.vmap(jnp.matmul)(x, w), (3, 6, 8), jnp.ones((3, 5, 6)),
    V((1,), (2,), (0,)),
  ),
  "jit": (jax.jit(lambda w, x: x @ w), (6, 8), X, FORWARD),
  "remat": (jax.checkpoint(lambda w, x: x @ w), (6, 8), X, FORWARD),
  "cond": (branched, (6, 8), X, FORWARD),
  "shard_map": (on_a_mesh, (6, 8), X, FORWARD),
  "custom_vjp": (product, (6, 8), X, FORWARD),
  "custom_jvp": (other_product, (6, 8), X, FORWARD),
  "rows": (lambda w, x: w[x], (9, 6), IDS, FORWARD),
  "rows of one": (lambda w, x: w[x], (9, 6), jnp.int32(3), FORWARD),
  "rows by product": (
    lambda w, x: jax.nn.one_hot(x, 9) @ w, (9, 6), IDS, FORWARD,
  ),
  "rows, scaled and normed": (
    lambda w, x: jnp.ones((6, 3)).T @ (w[x] * 2).T, (9, 6), IDS, FORWARD,
  ),
  "rows of stacked tables": (
    lambda w, x: w[1][x], (3, 9, 6), IDS, V((1,), (2,), (0,)),
  ),
  "rows of scanned tables": (
    lambda w, x: jax.lax.scan(lambda c, w: (c + w[x], None), 0 * w[0][x], w)[0],
    (3, 9, 6), IDS, V((1,), (2,), (0,)),
  ),
  "rows of tables and ids, vmap": (
    lambda w, x: jax.vmap(lambda t, i: t[i])(w, x), (4, 9, 6), IDS,
    V((1,), (2,), (0,)),
  ),
  "rows of tables and ids, vmap twice": (
    lambda w, x: jax.vmap(jax.vmap(lambda t, i: t[i]))(w, x), (2, 3, 9, 6),
    jnp.ones((2, 3, 5), jnp.int32), V((2,), (3,), (0, 1)),
  ),
  "rows of tables, one for all": (
    lambda w, x: jax.vmap(lambda t: t[x])(w), (3, 9, 6), IDS,
    V((1,), (0, 2)),
  ),
  "rows of tables, one for all, added": (
    lambda w, x: x.astype("f4")[None, :, None] + jax.vmap(lambda t: t[x])(w),
    (3, 9, 6), IDS, V((1,), (0, 2)),
  ),
  "rows by ids of a table, vmap": (
    lambda w, x: jax.vmap(lambda i: w[i])(x), (9, 6), IDS, FORWARD,
  ),
  "rows of two numbers": (
    lambda w, x: w[x, x + 1], (5, 9, 6), IDS, V((0, 1), (2,)),
  ),
  "an expert for each row, vmap": (
    lambda w, x: jax.vmap(lambda w, i: jnp.tile(i.astype("f4"), 6) @ w[i])(
      w, x
    ),
    (4, 3, 6, 8), IDS % 3, V((2,), (3,), (0, 1)),
  ),
  "an expert past reading": (
    lambda w, x: w[x].reshape(4, 16, 3), (3, 6, 8), IDS % 3, NO_MATRIX[3],
  ),
  "convolution": (
    lambda w, x: conv(w, x, ("NWC", "WIO", "NWC")), (3, 6, 8),
    jnp.ones((1, 7, 6)), V((0, 1), (2,)),
  ),
  "torch's convolution": (
    lambda w, x: conv(w, x, ("NCW", "OIW", "NCW")), (8, 6, 3),
    jnp.ones((1, 6, 7)), V((1, 2), (0,)),
  ),
  "convolution in groups": (
    lambda w, x: conv(w, x, ("NWC", "WIO", "NWC"), 2), (3, 3, 8),
    jnp.ones((1, 7, 6)), V((0, 1), (2,)),
  ),
  "depthwise convolution": (
    lambda w, x: conv(w, x, ("NWC", "WIO", "NWC"), 6), (3, 1, 6),
    jnp.ones((1, 7, 6)), V((0, 1), (2,)),
  ),
  "bias": (lambda w, x: x + w, (5, 6), X, NO_MATRIX[2]),
  "gate": (lambda w, x: x * jax.nn.softplus(w), (5, 6), X, NO_MATRIX[2]),
  "scanned bias": (
    lambda w, x: jax.lax.scan(lambda c, b: (c + b[None], None), x, w)[0],
    (3, 6), X, NO_MATRIX[2],
  ),
}  # fmt: skip


def quietly(fn, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return views_from(fn, *args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_says_what_its_axes_are(kind):
  fn, sizes, x, view = KINDS[kind]
  ((path, axes, found),) = quietly(
    lambda p, x: fn(p["w"], x), {"w": shape(*sizes)}, x
  )
  assert (path, axes, found) == ("w", len(sizes), view)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_program_say_the_same(kind):
  fn, sizes, x, view = KINDS[kind]
  if kind in ("looped",):
    pytest.skip("a loop has no gradient in reverse")

  def run(p, x):
    return jax.value_and_grad(lambda p: fn(p["w"], x).sum())(p)[0]

  ((*_, found),) = quietly(run, {"w": shape(*sizes)}, x)
  assert found == view


def test_what_is_not_clear_is_named():
  params = {"a": shape(6, 6), "b": shape(6, 6, 6), "c": shape(2), "d": shape(3)}

  def fn(p, x):
    twice = jnp.einsum("bd,def->bef", x, p["b"])
    stack = jnp.einsum("eb,ebf->ef", jnp.ones((6, 6)), p["b"])
    return (
      twice.sum() + stack.sum() + jnp.linalg.inv(p["a"]).sum() + p["c"].sum()
    )

  with pytest.warns(UserWarning, match="parameters") as caught:
    views_from(fn, params, X)
  said = " ".join(str(one.message) for one in caught)
  assert "used as different matrices; the first use counts: b (2 uses)" in said
  assert "not used by the program: d." in said
  assert "no matrices in the program: a (" in said


def test_a_tied_head_is_one_matrix():
  def fn(p, ids):
    return jnp.tanh(p["e"][ids]) @ p["e"].T

  with warnings.catch_warnings():
    warnings.simplefilter("error")
    ((*_, view),) = views_from(fn, {"e": shape(9, 6)}, IDS)
  assert view == FORWARD


def test_arguments_by_name_and_without_values():
  def fn(p, x, *, scale):
    return x @ p["w"] * scale

  ((*_, view),) = views_from(fn, {"w": shape(6, 8)}, shape(5, 6), scale=shape())
  assert view == FORWARD


def only(kind):
  """A function that works with a value of one type alone."""

  def fn(p, x, value, *, by_name):
    assert type(value) is type(by_name) is kind
    return x @ p["w"]

  return fn


@pytest.mark.parametrize(
  "value",
  [True, 3, 2.5, "mean", jnp.tanh, np.float32, jnp.float32, np.int64(3)],
)
def test_what_is_no_array_is_passed_on(value):
  params = {"w": shape(6, 8)}
  fn = only(type(value))
  ((*_, view),) = views_from(fn, params, X, value, by_name=value)
  assert view == FORWARD


def test_flags_and_sizes_are_static():
  class Drop(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      return nn.Dropout(0.5)(nn.Dense(8)(x), deterministic=not train)

  net = Drop()
  params = net.init(jax.random.key(0), X, train=False)["params"]
  rules = views_from(
    lambda p, x, n, **k: net.apply({"params": p}, x, **k).reshape(n, -1),
    params, X, 10, train=False,
  )  # fmt: skip
  assert rules == (("Dense_0/kernel", 2, FORWARD),)


def test_leaves_that_are_no_arrays_are_no_parameters():
  def fn(p, x):
    return p["act"](x @ p["w"] * p["scale"]) if p["name"] == "up" else x

  params = {"act": jnp.tanh, "name": "up", "scale": 0.5, "w": shape(6, 8)}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    rules = views_from(fn, params, X)
  assert rules == (("w", 2, FORWARD),)


class Block(nn.Module):
  """A layer to scan over."""

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2)(y, y)
    y = nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))
    return x + nn.Dense(8)(y), None


class Net(nn.Module):
  """Embeddings, scanned layers, a convolution, a tied head."""

  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(50, 8)
    x = table(ids) + nn.Embed(12, 8)(jnp.arange(ids.shape[1])[None])
    layers = nn.scan(
      nn.remat(Block),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    x, _ = layers()(x, None)
    x = nn.Conv(8, (3,))(x)
    return table.attend(nn.LayerNorm()(x))


def test_extraction_by_a_programs_views_is_exact_where_the_change_is_low():
  net, ids = Net(), jnp.ones((2, 12), int)
  params = net.init(jax.random.key(0), ids)["params"]
  views = quietly(lambda p, i: net.apply({"params": p}, i), params, ids)
  draw = np.random.default_rng(0).standard_normal
  flat = flatten(params)
  changed = dict(flat)
  for path, _, view in views:
    name = path.replace("\\", "")
    if view.inputs:
      *batch, in_, out = view.shape(flat[name].shape)
      low = draw((*batch, in_, 2)) @ draw((*batch, 2, out))
      axes = (*view.batch, *view.inputs, *view.outputs)
      low = low.reshape([flat[name].shape[a] for a in axes])
      low = low.transpose(np.argsort(axes))
      changed[name] = flat[name] + jnp.float32(0.1 * low)
  finetuned = unflatten(changed, params)
  loras = jlora.extract(params, finetuned, rank=2, views=views)
  assert len(loras) == 9
  got = flatten(jlora.apply(params, loras, views=views))
  for name, want in changed.items():
    np.testing.assert_allclose(got[name], want, atol=2e-5, err_msg=name)


def test_nnx_models_are_read_by_their_state():
  class Mlp(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(6, 8, rngs=rngs)
      self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)

    def __call__(self, x):
      return self.conv(self.up(x)[None])

  graph, state = nnx.split(Mlp(nnx.Rngs(0)))
  rules = quietly(lambda s, x: nnx.merge(graph, s)(x), state, X)
  assert [(path.replace("\\", ""), view) for path, _, view in rules] == [
    ("conv/kernel", V((0, 1), (2,))),
    ("up/kernel", FORWARD),
  ]


@pytest.mark.parametrize(
  ("old", "new", "factors"),
  [
    ((12,), (3, 4), [[(0, 3)], [(0, 4)]]),
    ((2, 6), (12,), [[(0, 2), (1, 6)]]),
    ((2, 6), (4, 3), [[(0, 2), (1, 2)], [(1, 3)]]),
    ((1, 6), (6, 1), [[(1, 6)], []]),
    ((4, 6), (6, 4), None),
  ],
)
def test_reshapes_move_factors(old, new, factors):
  dims = tuple((Atom(axis, size),) for axis, size in enumerate(old))
  found = regroup(dims, old, new)
  assert (found and [[tuple(a) for a in group] for group in found]) == factors


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_what_a_loop_hands_on_from_place_to_place_is_followed(loop):
  """The weight comes to its product in the fourth turn."""
  params = {"w": jnp.ones((3, 4))}

  def fn(p, x):
    def turn(carry):
      one, two, three, y = carry
      return two, three, p["w"], y + x @ one

    zeros = jnp.zeros((3, 4))
    begin = (zeros, zeros, zeros, jnp.zeros((5, 4)))
    if loop == "scan":
      step = lambda carry, _: (turn(carry), None)  # noqa: E731
      return jax.lax.scan(step, begin, None, length=4)[0][3]
    go_on = lambda carry: carry[3].sum() < 1  # noqa: E731
    return jax.lax.while_loop(go_on, turn, begin)[3]

  ((_, _, view),) = views_from(fn, params, jnp.ones((5, 3)))
  assert (view.inputs, view.outputs) == ((0,), (1,))
