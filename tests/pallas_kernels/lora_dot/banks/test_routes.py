# SPDX-License-Identifier: Apache-2.0
"""Many adapters in a batch: one table for every route, one chooser."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.lora_dot import Scaled
from pallas_kernels.lora_dot.banks.bank import empty_bank, put_adapter
from pallas_kernels.lora_dot.banks.grouped import grouped_dot
from pallas_kernels.lora_dot.banks.routes import (
  Many,
  choose_route,
  count_work,
  lora_dot_many,
)
from tests.pallas_kernels.lora_dot.many_products import (
  KERNEL,
  ROUTES,
  Case,
  measure,
  operands,
  truth,
)
from tests.pallas_kernels.lora_dot.products import bound, error

CASES = [
  Case((1,), 3, 2, 1, 1),
  Case((40,), 130, 30, 5, 3, gate=(40, 3)),
  Case((3, 7), 20, 24, 4, 2, 2, (3, 1, 2, 1), transpose_w=True),
  Case((50,), 16, 140, 3, 4, 3, (50, 1, 4)),
]
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


@functools.cache
def measured(name, case, dtype):
  arrays, ids, dy = operands(case, dtype)
  run = functools.partial(
    measure, ROUTES[name], transpose_w=case.transpose_w, ids=ids
  )
  return jax.jit(lambda arrays, dy: run(arrays, dy=dy))(arrays, dy)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize(
  ("case", "dtype"),
  [*((case, jnp.float32) for case in CASES), (CASES[1], jnp.bfloat16)],
)
def test_value_and_gradients(name, case, dtype):
  arrays, ids, dy = operands(case, dtype)
  wanted = truth(arrays, ids, dy, case.transpose_w)
  found, of_xla = measured(name, case, dtype), measured("laned", case, dtype)
  assert found.keys() == wanted.keys()
  for quantity, t in found.items():
    assert t.dtype == dtype
    assert t.shape == wanted[quantity].shape
    if np.any(wanted[quantity]):
      allowed = bound(error(of_xla[quantity], wanted[quantity]), dtype)
      assert error(t, wanted[quantity]) <= allowed, quantity
    else:
      assert not np.any(t), quantity


@every_route
def test_four_rows_and_two_adapters(route):
  f32 = functools.partial(jnp.array, dtype=jnp.float32)
  a = f32([[[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [0, 0, 0]]])
  b = f32([[[1, 0], [0, 2]], [[3, -1], [0, 0]]])
  x = f32([[1, 2, 3], [1, 1, 1], [4, 4, 4], [0, 1, 0]])
  ids = jnp.array([0, 1, -1, 0])
  y = lora_dot_many(x, jnp.zeros((3, 2)), a, b, ids, route=route)
  np.testing.assert_array_equal(y, [[4, 4], [9, -3], [0, 0], [0, 2]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_route
def test_rows_of_no_adapter_are_the_base_product_bit_by_bit(route, dtype):
  (x, w, a, b, _), ids, _ = operands(Case((33,), 150, 70, 4, 5), dtype)
  y = jax.jit(functools.partial(lora_dot_many, route=route))(x, w, a, b, ids)
  base = jax.jit(jnp.matmul)(x, w)
  if route is ROUTES["laned-tpu"]:  # sums the depth block by block
    base = KERNEL(x, w, a[0], b[0], jnp.zeros(1))
  none = ids == -1
  assert 3 < none.sum() < 30
  np.testing.assert_array_equal(y[none], base[none])
  assert np.all(np.any(y[~none] != base[~none], axis=1))


@every_route
def test_ids_out_of_range(route):
  (x, w, a, b, _), _, _ = operands(Case((4,), 6, 5, 3, 2), jnp.float32)
  ids = jnp.array([2, 3, -2, -1])
  y = jax.jit(functools.partial(lora_dot_many, route=route))(x, w, a, b, ids)
  np.testing.assert_array_equal(np.isnan(y).all(1), [False, True, True, False])
  assert np.isfinite(y[0]).all()
  assert np.isfinite(y[3]).all()
  with pytest.raises(ValueError, match=r"ids\[1\] = 3, ids\[2\] = -2"):
    lora_dot_many(x, w, a, b, ids, route=route)


@pytest.mark.parametrize("route", [None, *ROUTES.values()])
def test_other_adapters_and_ids_run_the_same_program(route):
  (x, w, *_), _, _ = operands(Case((4,), 6, 5, 3, 2), jnp.float32)
  traces = []

  @jax.jit
  def run(x, w, bank, ids):
    traces.append(ids)
    return lora_dot_many(x, w, *bank, ids, route=route)

  base = jax.jit(jnp.matmul)(x, w)

  bank = empty_bank(3, 2, 6, 5, jnp.float32)
  np.testing.assert_array_equal(run(x, w, bank, jnp.arange(4) % 3), base)
  for place, rank in [(0, 1), (2, 2), (0, 2)]:
    a, b = jnp.full((rank, 6), place + 1.0), jnp.ones((rank, 5))
    bank = put_adapter(bank, place, a, b, scale=0.5)
    y = run(x, w, bank, jnp.array([place, -1, 1, -1]))
    np.testing.assert_array_equal(y[1:], base[1:])
    np.testing.assert_allclose(
      y[0], (x @ w + (x @ a.T) @ b * 0.5)[0], rtol=1e-5
    )
  assert len(traces) == 1


@hypothesis.given(
  m=st.integers(1, 40),
  adapters=st.integers(1, 6),
  r=st.integers(1, 9),
  seed=st.integers(0, 99),
  name=st.sampled_from(["laned", "grouped", "gathered"]),
)
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
def test_order_of_rows_and_room_for_rank_change_nothing(
  m, adapters, r, seed, name
):
  case = Case((m,), 12, 7, adapters, r, gate=(m, 1))
  (x, w, a, b, gate), ids, dy = operands(case, jnp.float32, seed)
  run = jax.jit(ROUTES[name])
  y = run(x, w, a, b, ids, gate)
  wanted = truth((x, w, a, b, gate), ids, dy, False)["value"]
  assert error(y, wanted) < 1e-6
  order = np.random.default_rng(seed).permutation(m)
  at = lambda t: np.asarray(t)[order]  # noqa: E731
  moved = run(at(x), w, a, b, at(ids), at(gate))
  assert error(moved, wanted[order]) < 1e-6
  room = ((0, 1), (0, 3), (0, 0))
  wider = run(x, w, np.pad(a, room), np.pad(b, room), ids, gate)
  assert error(wider, wanted) < 1e-6


@every_route
def test_a_mixture_of_all_adapters(route):
  case = Case((6,), 8, 5, 3, 2)
  (x, w, a, b, _), _, _ = operands(case, jnp.float32)
  share = jax.nn.softmax(x[:, :3])
  y = lora_dot_many(
    x, w, a, b, jnp.arange(3)[None], share[..., None], route=route
  )
  u = np.einsum("mk,nrk->mnr", x, a) * np.asarray(share)[..., None]
  assert error(y, x @ w + np.einsum("mnr,nrj->mj", u, b)) < 1e-6


@every_route
def test_ids_of_sequences_and_of_a_single_row(route):
  (x, w, a, b, _), _, _ = operands(Case((2, 3), 8, 5, 3, 2), jnp.float32)
  run = functools.partial(lora_dot_many, route=route)
  y = run(x, w, a, b, jnp.array([[2], [-1]]))
  assert error(y[0], run(x[0], w, a, b, jnp.full(3, 2))) < 1e-6
  assert error(run(x[0, 1], w, a, b, jnp.array(2)), y[0, 1]) < 1e-6


def test_rows_in_ascending_order_are_not_moved():
  case = Case((30,), 8, 5, 3, 2, gate=(30, 2))
  arrays, ids, dy = operands(case, jnp.float32)
  run = functools.partial(grouped_dot, ascending=True)
  ids = jnp.sort(ids)
  found = measure(run, arrays, ids, dy)
  wanted = truth(arrays, ids, dy, False)
  for quantity, t in found.items():
    assert error(t, wanted[quantity]) < 1e-6
  assert np.isnan(run(*arrays[:4], ids[::-1])).all()
  with pytest.raises(ValueError, match="one adapter each, not 2"):
    run(*arrays[:4], jnp.zeros((30, 2), int))


@every_route
def test_codes_with_scales(route):
  (x, w, a, b, _), ids, dy = operands(Case((9,), 16, 8, 3, 2), jnp.float32)
  held = Scaled(jnp.round(w * 30).astype(jnp.int8), jnp.full((1, 8), 0.03))
  wanted = truth((x, held, a, b, None), ids, dy, False)["value"]
  assert error(route(x, held, a, b, ids), wanted) < 1e-6


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(a=jnp.ones((3, 2, 7))), "needed"),
    (dict(a=jnp.ones((2, 2, 6))), "a bank is"),
    (dict(a=jnp.ones((3, 0, 6)), b=jnp.ones((3, 0, 5))), "at least"),
    (dict(ids=jnp.zeros(3, int)), "ids .* for x"),
    (dict(ids=jnp.zeros((1, 4, 2), int)), "ids .* for x"),
    (dict(ids=jnp.zeros(4)), "integers"),
    (dict(gate=jnp.ones((4, 3))), "gate .* does not broadcast"),
  ],
)
def test_what_does_not_fit_is_refused(wrong, message):
  (x, w, a, b, _), ids, _ = operands(Case((4,), 6, 5, 3, 2), jnp.float32)
  given = dict(x=x, w=w, a=a, b=b, ids=ids) | wrong
  with pytest.raises(ValueError, match=message):
    lora_dot_many(**given)


# rows, adapters, rank -> the route on a TPU and off it
CHOICES = [
  ((64, 8, 16), "laned_dot", "laned_dot"),
  ((8192, 2, 16), "laned_dot", "laned_dot"),
  ((8192, 64, 64), "grouped_dot", "laned_dot"),
  ((4, 1000, 16), "grouped_dot", "gathered_dot"),
]


@pytest.mark.parametrize(("sizes", "on_tpu", "elsewhere"), CHOICES)
def test_the_route_with_the_least_work(sizes, on_tpu, elsewhere):
  rows, adapters, r = sizes
  many = Many(rows, 4096, 4096, adapters, r, 1, 2)
  for ragged, name in [(True, on_tpu), (False, elsewhere)]:
    choice = choose_route(many, ragged=ragged, local=True)
    assert choice.route.__name__ == name
  spread = choose_route(many, ragged=True, local=False)
  assert spread.route.__name__ != "grouped_dot"


def test_work_is_counted():
  many = Many(8, 4, 6, 3, 2, 1, 2)
  for name, work in count_work(many, ragged=True).items():
    adapted = {"laned_dot": 24, "grouped_dot": 8, "gathered_dot": 8}[name]
    assert work.operations == 2 * adapted * 2 * (4 + 6)
    assert work.bytes_moved > 2 * (8 * 4 + 2 * 8 * 6)
  more = count_work(many._replace(adapters=30), ragged=True)
  less = count_work(many, ragged=True)
  same = [name for name in more if more[name] == less[name]]
  assert same == ["gathered_dot"]
