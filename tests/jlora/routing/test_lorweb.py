# SPDX-License-Identifier: Apache-2.0
"""A basis mixed by a query: numbers by hand, identities, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import models
from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora, dense
from jlora.routing.lorweb import (
  Basis,
  adapt_basis,
  as_basis,
  as_programs,
  coefficients,
  fold,
  init_basis,
  kaiming_of_stack,
  mixed,
)
from jlora.selection import is_linear
from jlora.training.trainer import train
from jlora.views import STACKED
from tests.jlora.adapting.test_models import CONFIGS, TOKENS


@pytest.fixture
def standard_promotion():
  """Optax counts in int32 and multiplies by floats."""
  with jax.numpy_dtype_promotion("standard"):
    yield


IN, OUT, N, R, DQ, DK = 6, 5, 4, 2, 3, 8
PARAMS = {"up": jnp.ones((IN, OUT)) / 3, "down": jnp.ones((OUT, IN)) / 4}


def draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def model(params, x):
  return jnp.tanh(x @ params["up"]) @ params["down"]


def basis_of(params=PARAMS, seed=0, n=N, rank=R, views=None):
  """A basis whose b is not zero."""
  basis = init_basis(
    params,
    jax.random.key(seed),
    n=n,
    rank=rank,
    d_query=DQ,
    d_key=DK,
    views=views,
  )
  loras = {
    path: dataclasses.replace(
      lora, b=draw(i, *lora.b.shape), scale=draw(i + 5, *lora.scale.shape)
    )
    for i, (path, lora) in enumerate(basis.loras.items())
  }
  return basis._replace(loras=loras)


QUERY, X = draw(1, 7, DQ), draw(2, 7, IN)
BY_HAND = Basis(
  {"w": Lora(
    jnp.array([[[1.0, 0]], [[0, 1]], [[1, 1]]]),
    jnp.array([[[1.0, 0]], [[0, 1]], [[1, 1]]]), jnp.ones(3),
  )},
  {"w": jnp.array([[1.0, 0], [0, 1], [1, 1]])},
  {"w": jnp.eye(2)},
)  # fmt: skip


def test_a_new_basis_is_the_base_bit_by_bit():
  basis = init_basis(PARAMS, n=N, rank=R, d_query=DQ)
  found = jax.jit(adapt_basis(model))(PARAMS, basis, QUERY, X)
  wanted = jax.jit(model)(PARAMS, X)
  np.testing.assert_array_equal(found, wanted)
  again = init_basis({"up": PARAMS["up"]}, n=N, rank=R, d_query=DQ)
  np.testing.assert_array_equal(again.keys["up"], basis.keys["up"])


def test_numbers_by_hand():
  query = jnp.array([[2.0, 0.0]])
  c = coefficients(BY_HAND, query)["w"][0]
  np.testing.assert_allclose(c, [0.445808, 0.108383, 0.445808], atol=1e-6)
  change = dense(fold(BY_HAND, query[0])["w"])
  np.testing.assert_allclose(
    change, [[0.891617, 0.445808], [0.445808, 0.554192]], atol=1e-6
  )
  lora = BY_HAND.loras["w"]
  sums = jnp.einsum("n,nri->ri", c, lora.a), jnp.einsum("n,nro->ro", c, lora.b)
  product = sums[0].T @ sums[1]
  np.testing.assert_allclose(
    product, [[0.794980, 0.494127], [0.494127, 0.307128]], atol=1e-6
  )
  assert np.abs(product - change).max() > 0.05
  run = adapt_basis(lambda p, x: x @ p["w"], strict=True)
  found = run({"w": jnp.zeros((2, 2))}, BY_HAND, query, jnp.ones((1, 2)))
  np.testing.assert_allclose(found[0], change.sum(0), atol=1e-6)


@pytest.mark.parametrize(
  "mix",
  [
    coefficients,
    functools.partial(coefficients, heads=2),
    functools.partial(coefficients, activation=jnp.tanh),
  ],
)
def test_folding_is_mixing_and_a_batch_is_its_rows(mix):
  basis = basis_of()
  found = jax.jit(adapt_basis(model, mix=mix, strict=True))(
    PARAMS, basis, QUERY, X
  )
  for i in range(len(X)):
    loras = fold(basis, QUERY[i], mix=mix)
    assert loras["up"].rank == N * R
    alone = adapt(model)(bind(PARAMS, loras), X[i : i + 1])
    np.testing.assert_allclose(found[i], alone[0], rtol=1e-4, atol=1e-5)
    merged = model(apply(PARAMS, loras), X[i : i + 1])
    np.testing.assert_allclose(found[i], merged[0], rtol=1e-3, atol=1e-5)
    one = adapt_basis(model, mix=mix)(
      PARAMS, basis, QUERY[i : i + 1], X[i : i + 1]
    )
    np.testing.assert_allclose(found[i], one[0], rtol=1e-4, atol=1e-5)
  assert np.abs(found - model(PARAMS, X)).max() > 1e-2


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(N)))
def test_the_order_of_the_basis_does_not_matter(order):
  basis, order = basis_of(), np.array(order)
  mixed_up = Basis(
    jax.tree.map(lambda leaf: leaf[order], basis.loras),
    jax.tree.map(lambda leaf: leaf[order], basis.keys),
    basis.query,
  )
  run = adapt_basis(model)
  np.testing.assert_allclose(
    run(PARAMS, basis, QUERY, X), run(PARAMS, mixed_up, QUERY, X),
    rtol=1e-4, atol=1e-5,
  )  # fmt: skip


def test_weights_sum_to_one_also_over_heads():
  basis = basis_of()
  for heads in (1, 2, 4, 8):
    for c in coefficients(basis, 5 * QUERY, heads=heads).values():
      np.testing.assert_allclose(c.sum(-1), 1, atol=1e-6)
  two = coefficients(basis, QUERY, heads=2)["up"]
  q = (QUERY @ basis.query["up"]).reshape(-1, 2, 4)
  k = basis.keys["up"].reshape(N, 2, 4)
  each = jax.nn.softmax(jnp.einsum("bhk,nhk->bhn", q, k) / 2)
  np.testing.assert_allclose(two, each.mean(1), rtol=1e-5, atol=1e-6)


def test_the_basis_of_each_item_does_not_matter():
  basis = basis_of()
  turns = {path: draw(i + 40, N, R, R) + 2 * jnp.eye(R)[None]
           for i, path in enumerate(basis.loras)}  # fmt: skip
  turned = basis._replace(loras={
    path: dataclasses.replace(
      lora, a=turns[path] @ lora.a,
      b=jnp.linalg.inv(turns[path]).swapaxes(1, 2) @ lora.b,
    )
    for path, lora in basis.loras.items()
  })  # fmt: skip
  run = adapt_basis(model)
  np.testing.assert_allclose(
    run(PARAMS, basis, QUERY, X), run(PARAMS, turned, QUERY, X),
    rtol=1e-3, atol=1e-4,
  )  # fmt: skip


def test_gradients_against_finite_differences_in_float64():
  """By a central difference of the definition, in NumPy's float64."""
  basis = basis_of()
  down = draw(8, 7, IN)

  def exact(basis):
    """The definition, in NumPy."""
    h = np.float64(X)
    for path in ("up", "down"):
      lora = basis.loras[path]
      scores = (np.float64(QUERY) @ basis.query[path]) @ basis.keys[path].T
      scores = scores / np.sqrt(DK)
      c = np.exp(scores - scores.max(1, keepdims=True))
      c /= c.sum(1, keepdims=True)
      u = np.einsum("bi,nri->bnr", h, lora.a)
      more = np.einsum("bnr,bn,n,nro->bo", u, c, lora.scale, lora.b)
      h = h @ np.float64(PARAMS[path]) + more
      h = np.tanh(h) if path == "up" else h
    return (h * np.float64(down)).sum()

  def total(basis):
    return jnp.sum(adapt_basis(model)(PARAMS, basis, QUERY, X) * down)

  slopes = jax.jit(jax.grad(total))(basis)
  wide = jax.tree.map(np.float64, basis)
  rng = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(wide)
  for at, slope in enumerate(jax.tree.leaves(slopes)):
    for _ in range(3):
      place = tuple(rng.integers(0, size) for size in leaves[at].shape)
      ends = []
      for step in (1e-5, -1e-5):
        own = [np.array(leaf) for leaf in leaves]
        own[at][place] += step
        ends.append(exact(jax.tree.unflatten(tree, own)))
      wanted = (ends[0] - ends[1]) / 2e-5
      np.testing.assert_allclose(slope[place], wanted, rtol=2e-3, atol=2e-4)


def test_equal_keys_are_one_lora_of_rank_n_r():
  basis = basis_of()
  ones = jax.tree.map(lambda lora_scale: jnp.ones_like(lora_scale),
                      {p: x.scale for p, x in basis.loras.items()})  # fmt: skip
  loras = {
    p: dataclasses.replace(x, scale=ones[p]) for p, x in basis.loras.items()
  }
  basis = basis._replace(
    loras=loras,
    keys={p: jnp.broadcast_to(k[:1], k.shape) for p, k in basis.keys.items()},
  )
  one = {
    path: Lora(
      lora.a.reshape(N * R, -1), lora.b.reshape(N * R, -1),
      jnp.float32(1 / N),
    )
    for path, lora in basis.loras.items()
  }  # fmt: skip
  found = adapt_basis(model)(PARAMS, basis, QUERY, X)
  wanted = adapt(model)(bind(PARAMS, one), X)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_one_item_and_a_query_of_zeros():
  basis = basis_of(n=1)
  for c in coefficients(basis, QUERY).values():
    np.testing.assert_array_equal(c, 1)
  for c in coefficients(basis_of(), jnp.zeros((2, DQ))).values():
    np.testing.assert_allclose(c, 1 / N, rtol=1e-6)


def test_a_basis_on_some_modules_of_a_model_with_layers():
  run, params = models.init(CONFIGS["llama, tied"], jax.random.key(0))
  only = lambda path, leaf: "mlp" in path and is_linear(path, leaf)  # noqa: E731
  basis = init_basis(params, n=3, rank=2, d_query=DQ, d_key=DK, paths=only)
  assert all("mlp" in path for path in basis.loras)
  loras = {
    path: dataclasses.replace(lora, b=0.1 * draw(i, *lora.b.shape))
    for i, (path, lora) in enumerate(basis.loras.items())
  }
  basis = basis._replace(loras=loras)
  found = jax.jit(adapt_basis(run))(params, basis, QUERY[:2], TOKENS)
  for i in range(2):
    wanted = run(apply(params, fold(basis, QUERY[i])), TOKENS[i : i + 1])
    np.testing.assert_allclose(found[i], wanted[0], rtol=1e-3, atol=1e-4)

  stacked = {"w": draw(3, 3, IN, IN)}
  views = [("w", 3, STACKED)]
  basis = basis_of(stacked, views=views)
  scanned = lambda p, x: jax.lax.scan(  # noqa: E731
    lambda x, w: (jnp.tanh(x @ w), None), x, p["w"]
  )[0]
  assert coefficients(basis, QUERY)["w"].shape == (7, 3, N)
  found = jax.jit(adapt_basis(scanned, views=views))(stacked, basis, QUERY, X)
  whole = apply(stacked, fold(basis, QUERY[2]), views=views)
  wanted = scanned(whole, X)
  np.testing.assert_allclose(found[2], wanted[2], rtol=1e-3, atol=1e-4)


def test_inits():
  for init, bound in ((None, IN**-0.5), (kaiming_of_stack, (IN * R) ** -0.5)):
    given = {} if init is None else {"init": init}
    basis = init_basis(
      {"up": PARAMS["up"]}, n=50, rank=R, d_query=DQ, alpha=6, **given
    )
    lora = basis.loras["up"]
    top = float(jnp.abs(lora.a).max())
    assert 0.95 * bound < top <= bound
    assert (lora.scale == 3).all()
    assert not np.array_equal(lora.a[0], lora.a[1])
  np.testing.assert_allclose(basis.keys["up"].std(), 1, atol=0.1)


@pytest.mark.usefixtures("standard_promotion")
def test_training_moves_all_parts_and_learns_from_the_query():
  rng = np.random.default_rng(0)
  changes = rng.standard_normal((4, IN, IN)) / 2

  def batch(size):
    which = rng.integers(0, 4, size)
    query = np.eye(4)[which] * 2
    x = rng.standard_normal((size, IN))
    y = np.einsum("bi,bio->bo", x, changes[which])
    return tuple(map(jnp.float32, (query, x, y)))

  params = {"w": jnp.zeros((IN, IN))}
  loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)  # noqa: E731
  start = init_basis(params, n=4, rank=4, d_query=4, d_key=8, alpha=16)
  init, update = train(loss, optax.adam(1e-2), through=mixed)
  programs = as_programs(start)
  state, step = init(programs), jax.jit(update)
  for _ in range(400):
    programs, state, value = step(programs, state, params, *batch(32))
  basis = as_basis(programs)
  query, x, y = batch(256)
  run = jax.jit(adapt_basis(lambda p, x: x @ p["w"]))

  def error(query):
    return float(jnp.mean((run(params, basis, query, x) - y) ** 2))

  right, other = error(query), error(jnp.roll(query, 1, axis=0))
  assert right < 0.3 * float(jnp.mean(y**2))
  assert other > 2 * right
  for old, new in (
    (start.loras["w"].a, basis.loras["w"].a),
    (start.keys["w"], basis.keys["w"]),
    (start.query["w"], basis.query["w"]),
  ):  # fmt: skip
    assert np.abs(old - new).max() > 1e-2
  assert np.array_equal(start.loras["w"].scale, basis.loras["w"].scale)


def test_what_does_not_fit_is_refused():
  basis = basis_of()
  run = adapt_basis(model)
  with pytest.raises(ValueError, match=r"Queries are \(7, 2\); 2 modules"):
    run(PARAMS, basis, QUERY[:, :2], X)
  with pytest.raises(ValueError, match=r"args\[0\] \(6, 6\)"):
    run(PARAMS, basis, QUERY, X[:6])
  with pytest.raises(ValueError, match="3 heads do not divide keys of 8"):
    coefficients(basis, QUERY, heads=3)
  with pytest.raises(ValueError, match=r"fold makes one"):
    fold(basis, QUERY)
  with pytest.raises(ValueError, match="n=0"):
    init_basis(PARAMS, n=0, rank=1, d_query=1)
  with pytest.raises(ValueError, match="No parameter is selected"):
    init_basis(PARAMS, n=1, rank=1, d_query=1, paths=lambda *_: False)
  with pytest.raises(ValueError, match="through adapt_basis"):
    adapt(model)(bind(PARAMS, as_programs(basis)), X)
  with pytest.raises(ValueError, match="of no basis: w"):
    as_basis({"w": Lora(draw(0, 1, 2), draw(1, 1, 2), jnp.float32(1))})
