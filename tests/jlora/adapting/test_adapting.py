# SPDX-License-Identifier: Apache-2.0
"""Adapted functions against the same functions of merged parameters.

One table of programs: values, and gradients by every factor, must agree, and
nothing may have needed the dense sum unless the table says so.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora
from jlora.views import FLAX_VIEWS, view_of

RANK = 3
SHAPES = {
  "w": (6, 8),
  "w2": (8, 6),
  "square": (6, 6),
  "stack": (4, 6, 6),
  "heads/query/kernel": (6, 2, 4),
  "heads/out/kernel": (2, 4, 6),
  "experts": (4, 6, 8),
  "table": (11, 6),
  "conv/kernel": (3, 3, 6, 8),
  "conv_grouped/kernel": (3, 3, 2, 9),
  "conv_depthwise/kernel": (3, 3, 1, 12),
}


def draw(shape, seed):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def some_params():
  return {
    name: draw(shape, i) / 3 for i, (name, shape) in enumerate(SHAPES.items())
  }


def lora_for(path, shape, seed=0, rank=RANK):
  view = view_of(path, shape, FLAX_VIEWS)
  assert view is not None
  *batch, inputs, outputs = view.shape(shape)
  return Lora(
    draw((*batch, rank, inputs), 100 + seed) / 3,
    draw((*batch, rank, outputs), 200 + seed) / 3,
    jnp.full(batch, 0.7, jnp.float32),
  )


def some_loras(seed=0):
  return {
    path: lora_for(path, shape, seed + i)
    for i, (path, shape) in enumerate(SHAPES.items())
  }


X = draw((5, 6), 50)


@jax.custom_vjp
def doubled(x, w):
  return x @ w


doubled.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda kept, dy: (2 * dy @ kept[1].T, 2 * kept[0].T @ dy),
)


@jax.custom_vjp
def by_kernel(x, w):
  """A product by Pallas, which takes the weight itself."""
  return pl.pallas_call(
    lambda x, w, y: y.__setitem__(..., x[...] @ w[...]),
    jax.ShapeDtypeStruct((5, 8), jnp.float32),
    interpret=True,
  )(x, w)


by_kernel.defvjp(
  lambda x, w: (by_kernel(x, w), (x, w)),
  lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy),
)


@jax.custom_vjp
def gated_heads(x, w, out, count):
  """Keeps the weights themselves, and a product with one of them."""
  return jnp.tanh(x @ w) @ out * count


def gated_heads_forward(x, w, out, count):
  hidden = jnp.tanh(x @ w)
  return hidden @ out * count, (x, w, out, hidden, count)


def gated_heads_backward(kept, dy):
  x, w, out, hidden, count = kept
  inner = (dy * count @ out.T) * (1 - hidden**2)
  return inner @ w.T, x.T @ inner, hidden.T @ dy * count, None


gated_heads.defvjp(gated_heads_forward, gated_heads_backward)


def attention(p, x):
  q = jnp.einsum("td,dhk->thk", x, p["heads/query/kernel"])
  scores = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, q))
  mixed = jnp.einsum("hts,shk->thk", scores, q)
  return jnp.einsum("thk,hkd->td", mixed, p["heads/out/kernel"])


def scanned(p, x):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["stack"])


def shared_in_scan(p, x):
  body = lambda x, t: (jnp.tanh(x @ p["square"]) + t, None)  # noqa: E731
  return lax.scan(body, x, jnp.arange(3.0))[0]


def while_loop(p, x):
  def step(state):
    i, x = state
    return i + 1, jnp.tanh(x @ p["square"])

  return lax.fori_loop(0, 3, lambda i, s: step(s), (0, x))[1]


def branched(p, x):
  return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ p["w2"].T, x)


def convolved(p, x):
  image = jnp.tile(x[None, :, None], (1, 1, 5, 1))
  return lax.conv_general_dilated(
    image, p["conv/kernel"], (1, 2), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


def in_groups(name, groups):
  def run(p, x):
    image = jnp.tile(x[None, :, None], (1, 1, 5, 1))
    return lax.conv_general_dilated(
      image, p[name], (1, 2), "SAME", feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  return run


SIZES = jnp.array([2, 0, 1, 2], jnp.int32)


def as_experts(p, x):
  return lax.ragged_dot(x, p["experts"], SIZES)


def experts_twice(p, x):
  inner = jnp.tanh(lax.ragged_dot(x, p["experts"], SIZES))
  return lax.ragged_dot(inner, p["experts"].swapaxes(1, 2), SIZES)


def residual(p, x):
  """A stream with a learned position, read by weights without a norm."""
  x = x + p["square"][:5]
  for _ in range(3):
    x = x + jnp.tanh(x @ p["square"])
    x = x + jnp.tanh(x @ p["w"]) @ p["w2"]
  return x


def normed(x):
  return (x - x.mean(-1, keepdims=True)) / (1e-3 + x.std(-1, keepdims=True))


def with_tokens(p, x):
  """Learned tokens beside those of the input, as in ViT or Perceiver."""
  x = jnp.concatenate([p["table"][:2], x])
  return normed(x) @ p["w"]


def generated(p, x):
  """Parameters in the carry of a loop, which hands them on."""
  step = lambda i, s: (s[0], jnp.tanh(s[1] @ s[0]["square"]))  # noqa: E731
  p, x = lax.fori_loop(0, 3, step, (p, x))
  (p, x), sums = lax.scan(
    lambda s, t: ((s[0], jnp.tanh(s[1] @ s[0]["square"]) + t), s[1].sum()),
    (p, x), jnp.arange(2.0),
  )  # fmt: skip
  return x @ p["w"], sums


def fused_qkv(p, x):
  w = jnp.concatenate([p["w"], p["square"], p["w2"].T], axis=1)
  q, k, v = jnp.split(x @ w, [8, 14], axis=-1)
  return q.sum() + (k**2).sum() + v.prod(), jnp.split(w, [8, 14], axis=1)[
    1
  ].T @ x.T


PLAIN = {
  "x @ w": lambda p, x: x @ p["w"],
  "w as left operand": lambda p, x: p["w"].T @ x.T,
  "w2.T": lambda p, x: x @ p["w2"].T,
  "a vector": lambda p, x: x[0] @ p["w"],
  "wᵀ and a vector": lambda p, x: p["w"].T @ x[0],
  "three axes": lambda p, x: jnp.stack([x, 2 * x]) @ p["w"],
  "contract the first axis": lambda p, x: jnp.einsum("tx,tk->xk", x.T, p["w"]),
  "einsum, swapped": lambda p, x: jnp.einsum("kn,tk->nt", p["w"], x),
  "attention by heads": attention,
  "both axes contracted": lambda p, x: jnp.tensordot(
    jnp.einsum("tk,tn->tkn", x, jnp.cos(x @ p["w"])), p["w"], 2
  ),
  "stopped gradient": lambda p, x: x @ lax.stop_gradient(p["w"])
  + x @ p["w2"].T,
  "a square's last axis": lambda p, x: jnp.einsum(
    "kn,tn->tk", p["square"], x
  ),
  "heads by reshape": lambda p, x: jnp.einsum(
    "td,dhk->htk", x, p["w"].reshape(6, 2, 4)
  ),
  "heads reshaped back": lambda p, x: x @ p["w"].reshape(6, 2, 4).reshape(6, 8),
  "vmap over experts": lambda p, x: jax.vmap(lambda w: x @ w)(p["experts"]),
  "vmap over both": lambda p, x: jax.vmap(jnp.dot)(
    x[:4, None], p["experts"]
  ),
  "vmap over out": lambda p, x: jax.vmap(lambda w: x @ w, 1)(p["w"]),
  "one of a stack": lambda p, x: x @ p["stack"][2] + x @ p["stack"][-1],
  "stacks in a row": lambda p, x: jax.vmap(lambda w: x @ w)(
    jnp.concatenate([p["stack"], jnp.stack([p["square"], 2 * p["square"]])])
  ),
  "chosen of a stack": lambda p, x: x @ jnp.take(p["stack"], 1, axis=0),
  "experts gathered": lambda p, x: jnp.einsum(
    "td,tdk->tk", x, p["experts"][jnp.array([0, 1, 1, 3, 0])]
  ),
  "scan over a stack": scanned,
  "scan from the last": lambda p, x: lax.scan(
    lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["stack"], reverse=True
  ),
  "a weight shared in scan": shared_in_scan,
  "fori_loop": while_loop,
  "cond": branched,
  "remat": jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w2"]),
  "nested jit": jax.jit(lambda p, x: jax.jit(jnp.dot)(x, p["w"])),
  "embedding": lambda p, x: p["table"][jnp.array([[0, 3], [10, 3]])],
  "jnp.take": lambda p, x: jnp.take(p["table"], jnp.array([0, 3]), axis=0),
  "tied head": lambda p, x: p["table"][jnp.array([1, 2])] @ p["table"].T,
  "convolution": convolved,
  "cast, scaled, negated": lambda p, x: x @ (-p["w"] * 3 / 2).astype("float32"),
  "sum of two": lambda p, x: x @ (p["w"] + p["w2"].T - 0.5 * p["w"]),
  "a part": lambda p, x: x[:, 1:4] @ p["w"][1:4, ::2],
  "dynamic part": lambda p, x: x
  @ lax.dynamic_slice(p["w"], (0, 2), (6, 3)),
  "one axis more": lambda p, x: jnp.matmul(x[None], p["w"][None]),
  "fused q, k, v": fused_qkv,
  "precision": lambda p, x: jnp.dot(x, p["w"], precision="highest"),
  "custom_vjp": lambda p, x: doubled(x, p["w"]),
  "custom_vjp that keeps weights": lambda p, x: gated_heads(
    x, p["w"], p["w2"], 2
  ),
  "custom_vjp under vmap": lambda p, x: jax.vmap(doubled, (None, 0))(
    x, p["experts"]
  ),
  "a residual stream": residual,
  "a position, then a norm": lambda p, x: normed(x + p["table"][3:8])
  @ p["w"],
  "position and batch": lambda p, x: normed(
    jnp.stack([x, 2 * x]) + p["table"][None, :5]
  )
  @ p["w"],
  "tokens beside the input": with_tokens,
  "gated by a table": lambda p, x: normed(x * p["table"][:5]) @ p["w"],
  "one row of a table": lambda p, x: jnp.sin(p["table"][2])
  * jnp.cos(p["table"][jnp.int32(4)]),
  "noise on a weight": lambda p, x: x
  @ (p["w"] + 0.1 * jnp.sin(jnp.arange(48.0).reshape(6, 8) + x.sum())),
  "a weight and a constant": lambda p, x: x @ (p["w"] + jnp.ones((6, 8))),
  "modulated by the input": lambda p, x: x @ (p["w"] * jnp.sin(x[0])[:, None]),
  "parameters carried": generated,
  "ragged_dot": as_experts,
  "ragged_dot twice": experts_twice,
  "convolution in groups": in_groups("conv_grouped/kernel", 3),
  "depthwise convolution": in_groups("conv_depthwise/kernel", 6),
  "rows and columns scaled": lambda p, x: x
  @ (p["w"] * jnp.arange(8.0)[None] / (1 + jnp.arange(6.0)[:, None])),
  "experts scaled": lambda p, x: jnp.einsum(
    "td,edk->etk", x, p["experts"] * jnp.arange(4.0)[:, None, None]
  ),
  "heads repeated": lambda p, x: jnp.einsum(
    "td,dnh->tnh", x, jnp.repeat(p["heads/query/kernel"], 2, axis=1)
  ),
  "inputs repeated": lambda p, x: jnp.repeat(x, 2, 1)
  @ jnp.repeat(p["w"], 2, axis=0),
  "repeated out of order": lambda p, x: x
  @ jnp.repeat(p["w"], jnp.arange(8), axis=1, total_repeat_length=28),
  "padded": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))) + jnp.pad(
    x, ((0, 0), (2, 0))
  ) @ jnp.pad(p["w"], ((2, 0), (3, 0))),
  "padded and cut": lambda p, x: x[:, 1:]
  @ lax.pad(p["w"], 0.5, ((-1, 0, 0), (2, -3, 1))),
  "a layer of padding": lambda p, x: jnp.einsum(
    "td,edk->etk", x, jnp.pad(p["experts"], ((1, 0), (0, 0), (0, 0)))
  ),
  "flipped": lambda p, x: x @ jnp.flip(p["w"], 0)
  + x @ jnp.flip(p["stack"], (0, 2))[1] @ p["w"],
  "rolled": lambda p, x: x @ jnp.roll(p["w"], 3, 1),
  "tiled": lambda p, x: jnp.tile(x, (1, 3)) @ jnp.tile(p["w"], (3, 2)),
  "tables under vmap": lambda p, x: jax.vmap(lambda t, i: t[i])(
    p["stack"], jnp.array([[0, 5], [1, 1], [2, 0], [3, 4]])
  ),
  "rows under vmap": lambda p, x: jax.vmap(lambda i: p["table"][i])(
    jnp.array([3, 10, 0])
  ),
  "experts under vmap": lambda p, x: jax.vmap(lambda i, x: x @ p["experts"][i])(
    jnp.array([3, 1, 0, 0, 2]), x
  ),
  "one table of a stack each": lambda p, x: jax.vmap(
    lambda t, i: jnp.take(t, i, axis=1), (0, None)
  )(p["experts"], jnp.array([0, 7, 2])),
  "columns chosen": lambda p, x: x @ p["w"][:, jnp.array([3, 0, 0, 5])],
  "entries": lambda p, x: p["w"][jnp.array([0, 5]), jnp.array([7, 1])],
  "look-up with a fill": lambda p, x: p["table"]
  .at[jnp.array([1, 20, 10])].get(mode="fill", fill_value=0.0),
  "look-up, clipped": lambda p, x: p["table"].at[jnp.array([1, 20])].get(
    mode="clip"
  ),
  "a gradient inside": lambda p, x: jax.grad(
    lambda x: jnp.tanh(x @ p["w"]).sum()
  )(x),
}  # fmt: skip

# What needs the dense sum, by the primitive that says so.
DENSE = {
  "sin": (lambda p, x: x @ jnp.sin(p["w"]), "sin"),
  "product with its own": (lambda p, x: p["w"] @ p["w2"], "dot_general"),
  "a Pallas kernel": (lambda p, x: by_kernel(x, p["w"]), "pallas_call"),
  "a mask": (lambda p, x: x @ (p["w"] * jnp.tril(jnp.ones((6, 8)))), "mul"),
  "reshape across": (lambda p, x: x @ p["w"].reshape(-1)[:6], "reshape"),
}


def agree(function, params, loras, x):
  """Values and gradients of both, quietly."""

  def by(combine, run):
    def loss(loras, x):
      out = run(combine(params, loras), x)
      leaves = jax.tree.leaves(out)
      return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(loras, x)

  (_, out), grads = by(bind, adapt(function))
  (_, expected), expected_grads = by(apply, function)
  for found, wanted in zip(
    jax.tree.leaves(out), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
  for found, wanted in zip(
    jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_agrees_with_merged_and_sums_nothing(name):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    agree(PLAIN[name], some_params(), some_loras(), X)


@pytest.mark.parametrize("name", DENSE)
def test_falls_back_to_the_dense_sum_and_says_so(name):
  function, primitive = DENSE[name]
  with pytest.warns(UserWarning, match=f"{primitive} .of w.?.?: the dense sum"):
    agree(function, some_params(), some_loras(), X)
  strict = adapt(function, strict=True)
  with pytest.raises(ValueError, match=primitive):
    strict(bind(some_params(), some_loras()), X)


def test_parameters_in_the_carry_of_a_while_loop():
  def run(p, x):
    step = lambda s: (s[0] + 1, s[1], jnp.tanh(s[2] @ s[1]["square"]))  # noqa: E731
    state = lax.while_loop(lambda s: s[0] < 3, step, (0, p, x))
    return state[2] @ state[1]["w"]

  params, loras = some_params(), some_loras()
  found = adapt(run, strict=True)(bind(params, loras), X)
  wanted = run(apply(params, loras), X)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "name", ["x @ w", "attention by heads", "embedding", "convolution"]
)
def test_bfloat16_beside_factors_of_float32(name):
  small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), some_params())
  loras, x = some_loras(), X.astype(jnp.bfloat16)
  found = jax.jit(adapt(PLAIN[name]))(bind(small, loras), x)
  exact = PLAIN[name](apply(some_params(), loras), X)
  rounded = PLAIN[name](apply(small, loras), x)
  assert found.dtype == rounded.dtype == jnp.bfloat16
  size = np.abs(exact).max()
  own, other = (
    np.abs(y.astype(jnp.float32) - exact).max() / size for y in (found, rounded)
  )
  assert own < 2 * other + 2**-8


EMPTY_SLICES = {
  "rows": lambda p, x: x[:, :0] @ p["w"][:0],
  "columns": lambda p, x: x @ p["w"][:, :0],
  "both": lambda p, x: x[:, :0] @ p["w"][:0, :0],
  "transposed": lambda p, x: p["w"][:, :0].T @ x.T,
  "look-up": lambda p, x: p["w"][jnp.zeros((0,), int)],
  "no examples": lambda p, x: x[:0] @ p["w"],
}


@pytest.mark.parametrize("name", EMPTY_SLICES)
def test_slices_without_entries(name):
  params, loras = {"w": draw((6, 8), 0)}, {"w": lora_for("w", (6, 8))}
  fn, x = EMPTY_SLICES[name], draw((3, 6), 1)
  found = adapt(fn)(bind(params, loras), x)
  np.testing.assert_allclose(found, fn(apply(params, loras), x), atol=1e-5)
