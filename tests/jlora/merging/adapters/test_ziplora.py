# SPDX-License-Identifier: Apache-2.0
"""Coefficients of inputs: numbers, gradients, gauges, kinds of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import merging
from jlora.loras import Lora, dense

IN, OUT = 6, 5


@pytest.fixture(autouse=True)
def _optax_counts():
  """Adam counts its steps in int32, by numbers of no dtype."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def draw(seed, rank=2, leading=(), scale=0.5):
  rng = np.random.default_rng(seed)
  a, b = (
    rng.standard_normal((*leading, rank, n), np.float32) for n in (IN, OUT)
  )
  return Lora(a, b, np.full(leading, scale, np.float32))


def of(change):
  """A Lora of full rank of a change (out, in)."""
  change = np.float32(change)
  return Lora(
    np.eye(change.shape[1], dtype=np.float32), change.T, np.float32(1)
  )


def linear(params, x):
  return x @ params["w"]


ADAPTERS = [
  {"w": draw(at, 2 + at, scale=np.float32(1 + at))} for at in range(2)
]
PARAMS = {"w": np.random.default_rng(7).standard_normal((IN, OUT), np.float32)}
BATCHES = [
  (np.random.default_rng(at).standard_normal((8, IN), np.float32),)
  for at in range(2)
]


def test_the_numbers_of_the_specification():
  adapters = [{"w": of([[1, 2], [0, 1]])}, {"w": of([[1, 0], [1, 1]])}]
  m = np.float32([[1, 0.5], [0.5, 1]])
  merged = merging.zip_columns(adapters, {"w": m})
  np.testing.assert_allclose(dense(merged["w"]).T, [[1.5, 1], [0.5, 1.5]])
  assert float(merging.dot(jnp.asarray(m))) == 1
  assert float(merging.mean_absolute(jnp.asarray(m))) == 0.5


def test_ones_are_the_direct_sum_and_one_zero_a_subject():
  ones = merging.init_columns(ADAPTERS)
  both = merging.zip_columns(ADAPTERS, ones)["w"]
  plain = merging.concat([own["w"] for own in ADAPTERS], [1.0, 1.0])
  np.testing.assert_array_equal(dense(both), dense(plain))
  subject = merging.init_columns(ADAPTERS, [1.0, 0.0])
  init, update = merging.learn_columns(linear, optax.sgd(0.1))
  _, _, losses = update(subject, init(subject), PARAMS, ADAPTERS, BATCHES)
  assert losses.keep[0] == 0
  assert losses.keep[1] > 0
  assert losses.overlap == 0
  alone = jlora.adapt(linear)(jlora.bind(PARAMS, ADAPTERS[0]), *BATCHES[0])
  zipped = merging.zip_columns(ADAPTERS, subject)
  found = jlora.adapt(linear)(jlora.bind(PARAMS, zipped), *BATCHES[0])
  np.testing.assert_array_equal(found, alone)


def test_a_linear_layer_converges_to_halves():
  """Identity covariance: columns m_1 Δ_1 + m_2 Δ_2 near both, (½, ½).

  Gradients of the two at the start are 2 |Δ_2 col|² and 2 |Δ_1 col|² for
  orthogonal columns, here 4 and 12 over the outputs.
  """
  one, two = np.zeros((4, 1)), np.zeros((4, 1))
  one[0], two[1] = np.sqrt(6), np.sqrt(2)
  adapters = [{"w": of(one)}, {"w": of(two)}]
  params = {"w": np.zeros((1, 4), np.float32)}
  batches = [(np.ones((1, 1), np.float32),)] * 2
  whole = lambda found, wanted: jnp.sum((found - wanted) ** 2)  # noqa: E731
  init, update = merging.learn_columns(
    linear, optax.sgd(1.0), distance=whole, penalty=None
  )
  columns = merging.init_columns(adapters)
  moved, _, _ = update(columns, init(columns), params, adapters, batches)
  slope = np.asarray(columns["w"] - moved["w"])[:, 0]
  np.testing.assert_allclose(sorted(slope), [4, 12], rtol=1e-5)
  init, update = merging.learn_columns(
    linear, optax.sgd(0.05), distance=whole, penalty=None
  )
  step, state = jax.jit(update), init(columns)
  for _ in range(200):
    columns, state, losses = step(columns, state, params, adapters, batches)
  np.testing.assert_allclose(columns["w"], 0.5, atol=1e-4)
  np.testing.assert_allclose(losses.keep.sum(), (6 + 2) / 2, rtol=1e-4)


@pytest.mark.parametrize("through", ["adapt", "apply"])
def test_factored_is_dense(through):
  rng = np.random.default_rng(0)
  columns = {"w": rng.standard_normal((2, IN)).astype(np.float32)}
  merged = merging.zip_columns(ADAPTERS, columns)
  whole = PARAMS["w"] + sum(
    m[:, None] * np.asarray(dense(own["w"]))
    for m, own in zip(columns["w"], ADAPTERS, strict=True)
  )
  wanted = BATCHES[0][0] @ whole
  if through == "adapt":
    found = jlora.adapt(linear)(jlora.bind(PARAMS, merged), *BATCHES[0])
  else:
    found = linear(jlora.apply(PARAMS, merged), *BATCHES[0])
  np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_the_gradient_of_the_penalty():
  """∂penalty = λ sign(<m1, m2>) m_other; the factors have none."""
  rng = np.random.default_rng(0)
  m = rng.standard_normal((2, IN)).astype(np.float32)
  blind = lambda found, wanted: jnp.float32(0) * jnp.sum(found)  # noqa: E731
  init, update = merging.learn_columns(
    linear, optax.sgd(1.0), distance=blind, strength=0.01
  )
  columns = {"w": jnp.asarray(m)}
  moved, _, losses = update(columns, init(columns), PARAMS, ADAPTERS, BATCHES)
  inner = m[0] @ m[1]
  np.testing.assert_allclose(losses.overlap, abs(inner), rtol=1e-5)
  cosine = abs(inner) / np.linalg.norm(m[0]) / np.linalg.norm(m[1])
  np.testing.assert_allclose(losses.cosine, cosine, rtol=1e-5)
  np.testing.assert_allclose(
    columns["w"] - moved["w"], 0.01 * np.sign(inner) * m[::-1], atol=1e-6
  )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_only_changes_count(seed):
  rng = np.random.default_rng(seed)
  columns = {"w": rng.standard_normal((2, IN)).astype(np.float32)}
  turn = np.linalg.qr(rng.standard_normal((2, 2)))[0] * 3
  lora = ADAPTERS[0]["w"]
  other = Lora(
    turn.astype(np.float32) @ lora.a,
    np.linalg.inv(turn).T.astype(np.float32) @ lora.b,
    lora.scale,
  )
  found, wanted = (
    np.asarray(dense(merging.zip_columns([own, ADAPTERS[1]], columns)["w"]))
    for own in ({"w": other}, ADAPTERS[0])
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_columns_move_with_their_inputs():
  """Inputs in another order, a's columns and the coefficients alike."""
  rng = np.random.default_rng(0)
  m = rng.standard_normal((2, IN)).astype(np.float32)
  order = rng.permutation(IN)
  moved = [
    {"w": Lora(own["w"].a[:, order], own["w"].b, own["w"].scale)}
    for own in ADAPTERS
  ]
  found = merging.zip_columns(moved, {"w": m[:, order]})["w"]
  wanted = merging.zip_columns(ADAPTERS, {"w": m})["w"]
  np.testing.assert_array_equal(dense(found), np.asarray(dense(wanted))[order])


def conv(params, x):
  return jax.lax.conv_general_dilated(
    x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


KINDS = {
  "kernel (in, out)": ((IN, OUT), linear, (3, IN), None),
  "weight (out, in)": (
    (OUT, IN),
    lambda params, x: x @ params["weight"].T,
    (3, IN),
    None,
  ),
  "convolution": ((3, 3, 2, OUT), conv, (1, 4, 4, 2), None),
  "einsum (in, heads, width)": (
    (IN, 2, 3),
    lambda params, x: jnp.einsum("bi,ihd->bhd", x, params["w"]),
    (3, IN),
    "einsum",
  ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_an_input_whatever_the_kernel(kind):
  """Adapted is summed up; coefficients 0 of all inputs leave the base."""
  shape, fn, x_shape, how = KINDS[kind]
  rng = np.random.default_rng(0)
  name = "weight" if "weight" in kind else "w"
  params = {name: rng.standard_normal(shape).astype(np.float32)}
  x = rng.standard_normal(x_shape).astype(np.float32)
  views = jlora.adapting.views_from(fn, params, x)
  key = jax.random.key(0)
  adapters = []
  for at in range(2):
    own = jlora.training.init_lora(
      params, 2, jax.random.fold_in(key, at), views=views
    )
    lora = own[name]
    b = rng.standard_normal(lora.b.shape).astype(np.float32)
    adapters.append({name: Lora(lora.a, b, lora.scale)})
  width = adapters[0][name].a.shape[-1]
  m = rng.standard_normal((2, width)).astype(np.float32)
  merged = merging.zip_columns(adapters, {name: m})
  beside = jlora.adapt(fn)(jlora.bind(params, merged, views=views), x)
  wanted = fn(jlora.apply(params, merged, views=views), x)
  np.testing.assert_allclose(beside, wanted, atol=1e-4)
  if how is None and width == IN:
    # Coefficient i acts on input i: an input of zeros has no say in it.
    x = x * (np.arange(IN) != 2)
    changed = m.copy()
    changed[:, 2] = 9
    other = merging.zip_columns(adapters, {name: changed})
    np.testing.assert_allclose(
      jlora.adapt(fn)(jlora.bind(params, other, views=views), x),
      jlora.adapt(fn)(jlora.bind(params, merged, views=views), x),
      atol=1e-5,
    )


def test_three_adapters_of_which_some_lack_modules():
  one, two, three = ({"w": draw(i), "v": draw(i)} for i in range(3))
  del two["v"], three["v"]
  three["u"] = draw(5)
  adapters = [one, two, three]
  columns = merging.init_columns(adapters)
  assert {name: x.shape for name, x in columns.items()} == {"w": (3, IN)}
  merged = merging.zip_columns(adapters, columns)
  assert {path: x.rank for path, x in merged.items()} == {
    "w": 6,
    "v": 2,
    "u": 2,
  }
  np.testing.assert_array_equal(dense(merged["u"]), dense(three["u"]))
  params = {"w": PARAMS["w"], "v": PARAMS["w"], "u": PARAMS["w"]}

  def fn(params, x):
    return x @ params["w"] + x @ params["v"] + x @ params["u"]

  init, update = merging.learn_columns(fn, optax.adam(0.01))
  batches = [BATCHES[0]] * 3
  step = jax.jit(update)
  found, state, first = step(columns, init(columns), params, adapters, batches)
  assert first.keep.shape == (3,)
  assert first.overlap == 3 * IN
  for _ in range(20):
    found, state, last = step(found, state, params, adapters, batches)
  assert last.keep.sum() < first.keep.sum()


GRAINS = {
  "column": (None, {"w": (2, IN), "s": (4, 2, IN)}),
  "module": (merging.by_module, {"w": (2, 1), "s": (4, 2, 1)}),
  "layer": (merging.by_layer, {"rest": (2, 1), "4 layers": (4, 2, 1)}),
  "adapter": (merging.by_adapter, {"all": (2, 1)}),
}


@pytest.mark.parametrize("grain", GRAINS)
def test_granularities(grain):
  """A module of one layer and a stack of four, trained together."""
  granularity, shapes = GRAINS[grain]
  adapters = [{"w": draw(i), "s": draw(i, leading=(4,))} for i in range(2)]
  columns = merging.init_columns(adapters, granularity=granularity)
  assert {name: x.shape for name, x in columns.items()} == shapes
  params = {
    "w": PARAMS["w"],
    "s": np.zeros((4, IN, OUT), np.float32),
  }

  def fn(params, x):
    first = x @ params["w"]
    return first + sum(x @ params["s"][i] for i in range(4))

  views = jlora.adapting.views_from(fn, params, *BATCHES[0])
  init, update = merging.learn_columns(
    fn,
    optax.adam(0.05),
    granularity=granularity,
    bound=lambda params, own: jlora.bind(params, own, views=views),
    strength=0.0,
  )
  step, state = jax.jit(update), init(columns)
  values = []
  for _ in range(15):
    columns, state, losses = step(columns, state, params, adapters, BATCHES)
    values.append(float(losses.keep.sum()))
  assert values[-1] < values[0]
  assert losses.overlap > 0
  merged = merging.zip_columns(adapters, columns, granularity=granularity)
  assert merged["s"].a.shape == (4, 4, IN)


def test_a_zero_adapter_moves_by_the_penalty_alone():
  zero = {"w": Lora(draw(3).a, 0 * draw(3).b, np.float32(1))}
  adapters = [ADAPTERS[0], zero]
  columns = merging.init_columns(adapters)
  for strength, is_moved in ((0.0, False), (0.01, True)):
    init, update = merging.learn_columns(
      linear, optax.sgd(1.0), strength=strength
    )
    moved, _, _ = update(columns, init(columns), PARAMS, adapters, BATCHES)
    assert bool(np.any(moved["w"][1] != columns["w"][1])) == is_moved


def test_penalties_of_nothing_are_finite():
  for penalty in (
    merging.dot,
    merging.mean_absolute,
    merging.absolute_cosine,
  ):
    m = jnp.zeros((3, 4))
    assert penalty(m) == 0
    assert np.isfinite(jax.grad(penalty)(m)).all()


def test_the_published_rate_is_the_direct_sum():
  """100 steps of Adam at 5e-5 move a coefficient by .005 at most."""
  init, update = merging.learn_columns(linear, optax.adam(5e-5))
  columns = start = merging.init_columns(ADAPTERS)
  step, state = jax.jit(update), init(columns)
  for _ in range(100):
    columns, state, _ = step(columns, state, PARAMS, ADAPTERS, BATCHES)
  off = np.abs(columns["w"] - start["w"]).max()
  assert 0 < off <= 0.006


def test_the_door():
  one = ADAPTERS[0]
  columns = {"w": np.ones((2, IN), np.float32)}
  init, update = merging.learn_columns(linear, optax.sgd(1.0))
  for wrong, why in (
    (lambda: merging.init_columns([one]), "at least 2"),
    (lambda: merging.zip_columns([one], columns), "at least 2"),
    (lambda: merging.zip_columns(ADAPTERS, {}), "none for w"),
    (
      lambda: merging.zip_columns(ADAPTERS, columns | {"k": columns["w"]}),
      "for nothing: k",
    ),
    (
      lambda: merging.zip_columns(ADAPTERS, {"w": np.ones((2, 3))}),
      r"\(2, 3\), needed is \(2, 6\)",
    ),
    (
      lambda: update(columns, init(columns), PARAMS, ADAPTERS, BATCHES[:1]),
      "1 batches for 2 adapters",
    ),
    (
      lambda: merging.init_columns(
        [{"w": draw(0), "s": draw(0, leading=(3,))}] * 2,
        granularity=lambda path, leading: ("x", leading),
      ),
      "would need coefficients",
    ),
  ):
    with pytest.raises(ValueError, match=why):
      wrong()
