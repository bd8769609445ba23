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
  "a gradient inside": lambda p, x: jax.grad(
    lambda x: jnp.tanh(x @ p["w"]).sum()
  )(x),
}  # fmt: skip

# What needs the dense sum, by the primitive that says so.
DENSE = {
  "sin": (lambda p, x: x @ jnp.sin(p["w"]), "sin"),
  "product with its own": (lambda p, x: p["w"] @ p["w2"], "dot_general"),
  "custom_vjp": (lambda p, x: doubled(x, p["w"]), "custom_vjp_call"),
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
