# SPDX-License-Identifier: Apache-2.0
"""Routing by prototype: numbers by hand, invariances, the authors' logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapting.banks import make_bank
from jlora.adapting.binding import bind
from jlora.adapting.programs import Gated
from jlora.adapting.rows import adapt_rows
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora, dense
from jlora.merging.adapters.concatenation import concat
from jlora.routing.prototype_gates import arrow, prototypes

IN, OUT, N = 6, 5, 4


def draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def adapters_of(count=N, path="w", seed=0):
  return [
    {path: Lora(draw(seed + i, 2, IN), draw(seed + 9 + i, 2, OUT), jnp.float32(
      0.5 + i
    ))}
    for i in range(count)
  ]  # fmt: skip


def run(bank, gate, x, w=None):
  w = jnp.zeros((IN, OUT)) if w is None else w
  programs = {"w": Gated(bank["w"], gate)}
  return adapt(lambda p, x: x @ p["w"], strict=True)(
    bind({"w": w}, programs), x
  )


BY_HAND = make_bank([
  {"w": Lora(
    jnp.array([[1.0, 0, 1], [0, 1, 0]]), jnp.diag(jnp.array([1.0, 2.0])),
    jnp.float32(1),
  )},
  {"w": Lora(jnp.ones((1, 3)), jnp.array([[3.0, -1.0]]), jnp.float32(1))},
])  # fmt: skip


def test_numbers_by_hand():
  found = prototypes(BY_HAND)["w"]
  np.testing.assert_allclose(jnp.abs(found[0]), [0, 1, 0], atol=1e-6)
  np.testing.assert_allclose(jnp.abs(found[1]), [3**-0.5] * 3, atol=1e-6)
  x = jnp.array([1.0, 2.0, 3.0])
  logits = jnp.abs(found @ x)
  np.testing.assert_allclose(logits, [2, 3.464102], atol=2e-6)
  np.testing.assert_allclose(arrow(found)(x), [0.187841, 0.812159], atol=2e-6)


def test_signs_and_bases_of_adapters_change_nothing():
  bank, x = make_bank(adapters_of()), draw(40, 7, IN)
  rows = prototypes(bank)["w"]
  y = run(bank, arrow(rows), x)
  signs = jnp.array([1.0, -1.0, -1.0, 1.0])[:, None]
  np.testing.assert_allclose(run(bank, arrow(signs * rows), x), y, atol=1e-6)
  turn = draw(41, N, 2, 2) + 2 * jnp.eye(2)[None]
  lora = bank["w"]
  turned = {"w": Lora(
    turn @ lora.a, jnp.linalg.inv(turn).swapaxes(1, 2) @ lora.b, lora.scale
  )}  # fmt: skip
  other = prototypes(turned)["w"]
  np.testing.assert_allclose(jnp.abs(other), jnp.abs(rows), atol=1e-5)
  found = run(turned, arrow(other), x)
  np.testing.assert_allclose(found, y, atol=1e-6 * float(jnp.abs(y).max()) * 20)


def test_all_chosen_is_none_chosen_and_cold_is_one():
  bank, x = make_bank(adapters_of()), draw(40, 7, IN)
  rows = prototypes(bank)["w"]
  whole = arrow(rows)(x)
  np.testing.assert_array_equal(arrow(rows, chosen=N)(x), whole)
  np.testing.assert_allclose(whole.sum(-1), 1, atol=1e-6)
  one = arrow(rows, chosen=1)(x)
  np.testing.assert_allclose(arrow(rows, temperature=1e-4)(x), one, atol=1e-6)
  assert set(np.unique(one)) == {0.0, 1.0}
  two = arrow(rows, chosen=2)(x)
  assert ((two > 0).sum(-1) == 2).all()
  np.testing.assert_allclose(two.sum(-1), 1, atol=1e-6)
  kept = jnp.where(two > 0, whole, 0)
  np.testing.assert_allclose(two, kept / kept.sum(-1, keepdims=True), atol=1e-6)


def test_one_hot_gates_are_ids_and_ones_are_concat():
  adapters, x, w = adapters_of(), draw(40, 4, IN), draw(39, IN, OUT)
  bank = make_bank(adapters)
  ids = jnp.array([3, 0, 1, 1])
  fixed = lambda gates: jax.tree_util.Partial(lambda g, x: g, gates)  # noqa: E731
  by_ids = adapt_rows(lambda p, x: x @ p["w"])({"w": w}, bank, ids, x)
  found = run(bank, fixed(jax.nn.one_hot(ids, N)), x, w)
  np.testing.assert_allclose(found, by_ids, rtol=1e-5, atol=1e-5)
  together = {"w": concat([own["w"] for own in adapters], [1.0] * N)}
  wanted = adapt(lambda p, x: x @ p["w"])(bind({"w": w}, together), x)
  np.testing.assert_allclose(
    run(bank, fixed(jnp.ones(N)), x, w), wanted, rtol=1e-5, atol=1e-5
  )


def test_the_gradient_of_a_gate():
  bank, x, down = make_bank(adapters_of()), draw(40, 4, IN), draw(41, 4, OUT)
  gates = draw(42, 4, N)
  fixed = lambda gates: jax.tree_util.Partial(lambda g, x: g, gates)  # noqa: E731
  found = jax.grad(lambda g: jnp.sum(run(bank, fixed(g), x) * down))(gates)
  for n in range(N):
    own = jax.tree.map(lambda leaf, n=n: leaf[n], bank["w"])
    wanted = jnp.sum(down * (x @ dense(own)), axis=-1)
    np.testing.assert_allclose(found[:, n], wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(N)), chosen=st.integers(1, N))
def test_the_order_of_the_library_does_not_matter(order, chosen):
  adapters, x = adapters_of(), draw(40, 7, IN)
  ys = []
  for own in (adapters, [adapters[i] for i in order]):
    bank = make_bank(own)
    gate = arrow(prototypes(bank)["w"], chosen=chosen)
    ys.append(run(bank, gate, x))
  np.testing.assert_allclose(*ys, rtol=1e-4, atol=1e-5)


def mttl(a, b, x, temperature):
  """Arrow as microsoft/mttl defines it: torch's sides, any sign, no top-k."""
  rows = []
  for own_a, own_b in zip(a, b, strict=True):
    weight = own_b.T @ own_a  # (out, in), as lora_b and lora_a multiply
    _, _, vt = np.linalg.svd(weight, full_matrices=False)
    rows.append(vt[0])
  return np.abs(np.stack(rows) @ x) / temperature


@pytest.mark.parametrize("seed", range(5))
def test_logits_of_the_authors(seed):
  bank = make_bank(adapters_of(seed=100 * seed))
  lora, x = bank["w"], draw(seed, IN)
  wanted = mttl(
    np.float64(lora.a), np.float64(lora.b * lora.scale[:, None, None]),
    np.float64(x), 0.7,
  )  # fmt: skip
  rows = prototypes(bank)["w"]
  np.testing.assert_allclose(jnp.abs(rows @ x) / 0.7, wanted, rtol=1e-4)
  gates = arrow(rows, temperature=0.7)(x)
  np.testing.assert_allclose(
    gates, np.exp(wanted) / np.exp(wanted).sum(), rtol=1e-4, atol=1e-6
  )


def test_an_adapter_without_the_module_takes_no_share():
  some = adapters_of(3)
  other = {"v": Lora(draw(0, 2, IN), draw(1, 2, OUT), jnp.float32(1))}
  with_other = make_bank([*some[:1], other, *some[1:]])
  rows = prototypes(with_other)["w"]
  assert np.isnan(rows[1]).all()
  assert np.isfinite(rows[np.array([0, 2, 3])]).all()
  x = draw(40, 7, IN)
  for chosen in (None, 2, 4):
    gates = arrow(rows, chosen=chosen)(x)
    assert (gates[:, 1] == 0).all()
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)
  alone = make_bank(some)
  np.testing.assert_allclose(
    run(with_other, arrow(rows), x),
    run(alone, arrow(prototypes(alone)["w"]), x),
    rtol=1e-4,
    atol=1e-5,
  )
  none = arrow(jnp.full((2, IN), jnp.nan))(x)
  assert (none == 0).all()
  slope = jax.grad(lambda x: jnp.sum(arrow(rows, unit=True)(x)[:, 0]))(x)
  assert np.isfinite(slope).all()


def test_an_adapter_that_changes_nothing_takes_a_share():
  silent = {"w": Lora(draw(0, 2, IN), jnp.zeros((2, OUT)), jnp.float32(1))}
  rows = prototypes(make_bank([*adapters_of(2), silent]))["w"]
  assert (rows[2] == 0).all()
  gates = arrow(rows)(draw(40, 7, IN))
  assert ((gates[:, 2] > 0) & (gates[:, 2] < 1 / 3)).all()


def test_edges():
  bank = make_bank(adapters_of())
  rows = prototypes(bank)["w"]
  zero = jnp.zeros((1, IN))
  for unit in (False, True):
    gate = arrow(rows, unit=unit)
    np.testing.assert_allclose(gate(zero), jnp.full((1, N), 1 / N), atol=1e-6)
  x = draw(40, 7, IN)
  np.testing.assert_array_equal(arrow(rows[:1])(x), jnp.ones((7, 1)))
  cosine = arrow(rows, unit=True, temperature=0.1)
  np.testing.assert_allclose(cosine(100 * x), cosine(x), rtol=1e-4, atol=1e-6)
  assert np.abs(arrow(rows)(100 * x) - arrow(rows)(x)).max() > 0.1
  half = arrow(rows)(x.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  wide = make_bank(adapters_of(), rank=7)
  np.testing.assert_allclose(
    jnp.abs(prototypes(wide)["w"]), jnp.abs(rows), atol=1e-5
  )
  plain = prototypes(jax.tree.map(np.asarray, bank))["w"]
  assert isinstance(plain, np.ndarray)
  np.testing.assert_array_equal(plain, rows)
  compiled = jax.jit(prototypes)(bank)["w"]
  np.testing.assert_allclose(jnp.abs(compiled), jnp.abs(rows), atol=1e-5)


def test_layers_have_prototypes_of_their_own():
  lora = Lora(draw(0, N, 3, 2, IN), draw(1, N, 3, 2, IN), draw(2, N, 3))
  rows = prototypes({"w": lora})["w"]
  assert rows.shape == (3, N, IN)
  for layer in range(3):
    own = jax.tree.map(lambda leaf, layer=layer: leaf[:, layer], lora)
    np.testing.assert_allclose(
      jnp.abs(rows[layer]), jnp.abs(prototypes({"w": own})["w"]), atol=1e-5
    )
  w, x = draw(3, 3, IN, IN), draw(4, 5, IN)
  program = Gated(lora, arrow(rows, chosen=2))
  fn = lambda p, x: jax.lax.scan(  # noqa: E731
    lambda x, w: (jnp.tanh(x @ w), None), x, p["w"]
  )[0]
  found = adapt(fn, strict=True)(bind({"w": w}, {"w": program}), x)
  for layer in range(3):
    own = {"w": jax.tree.map(lambda leaf, layer=layer: leaf[:, layer], lora)}
    gate = dataclasses.replace(program.params, prototypes=rows[layer])
    x = jnp.tanh(run(own, gate, x, w[layer]))
  np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_equal_singular_values_are_told():
  round_ = Lora(jnp.eye(2, IN), jnp.eye(2, OUT), jnp.float32(1))
  with pytest.warns(UserWarning, match=r"react alike.*w \(1\.0000\)"):
    found = prototypes(make_bank([{"w": round_}]))["w"][0]
  np.testing.assert_allclose(jnp.linalg.norm(found[:2]), 1, atol=1e-6)


def test_what_is_wrong_is_said():
  rows = prototypes(make_bank(adapters_of()))["w"]
  with pytest.raises(ValueError, match="above zero, got -1"):
    arrow(rows, temperature=-1)
  with pytest.raises(ValueError, match="chosen is 5; of 4"):
    arrow(rows, chosen=5)
  with pytest.raises(ValueError, match="make_bank"):
    prototypes(adapters_of()[0])
  with pytest.raises(ValueError, match=r"\(6,\)"):
    arrow(rows[0])


def test_a_routed_library_is_close_to_the_adapter_that_a_token_points_to():
  """Each adapter reacts to a direction of its own; inputs lie along these."""
  eye = jnp.eye(IN)
  adapters = [
    {"w": Lora(eye[i : i + 1], draw(i, 1, OUT), jnp.float32(1))}
    for i in range(N)
  ]
  bank, which = make_bank(adapters), jnp.array([2, 0, 3, 1])
  x = 9 * eye[which]
  found = run(bank, arrow(prototypes(bank)["w"]), x)
  wanted = jnp.stack(
    [
      x[i] @ apply({"w": jnp.zeros((IN, OUT))}, adapters[n])["w"]
      for i, n in enumerate(which)
    ]
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-2)
