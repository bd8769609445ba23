# SPDX-License-Identifier: Apache-2.0
"""What adapters do to each other, where it is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.evaluation import interference
from jlora.loras import Lora, dense
from jlora.merging import truncate

SIZE = 6
PATHS = ("first", "second")


def lora_of(rng, rank=3):
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  return Lora(normal(rank, SIZE), normal(rank, SIZE), jnp.float32(0.3))


def in_series(params, x):
  return x @ params["first"] @ params["second"]


def in_parallel(params, x):
  return x @ params["first"] + x @ params["second"]


def loss(y, targets):
  return jnp.mean((y - targets) ** 2)


@pytest.fixture
def given():
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  params = {path: normal(SIZE, SIZE) for path in PATHS}
  batches = {n: ((normal(5, SIZE),), normal(5, SIZE)) for n in ("own", "other")}
  return params, batches, lora_of(rng), lora_of(rng)


def test_branches_that_are_added_do_not_interfere(given):
  params, batches, one, two = given
  adapters = {"one": {"first": one}, "two": {"second": two}}
  for row in interference(in_parallel, loss, params, adapters, batches, [1, 3]):
    for value in row.nonlinearity.values():
      assert value == pytest.approx(0, abs=1e-6)


def test_layers_in_a_row_multiply(given):
  """x δ₁ δ₂ is there only if both are."""
  params, batches, one, two = given
  adapters = {"one": {"first": one}, "two": {"second": two}}
  rows = interference(in_series, loss, params, adapters, batches, [1, 2, 9])
  for row in rows:
    own = [np.asarray(dense(truncate(x, row.rank)), float) for x in (one, two)]
    w = [np.asarray(params[path], float) for path in PATHS]
    x, targets = (
      np.asarray(y, float) for y in (batches["own"][0][0], batches["own"][1])
    )
    none = x @ w[0] @ w[1]
    together = x @ (w[0] + own[0]) @ (w[1] + own[1])
    rest = np.linalg.norm(x @ own[0] @ own[1]) / np.linalg.norm(together - none)
    np.testing.assert_allclose(row.nonlinearity["own"], rest, rtol=1e-4)
    mean = lambda y: np.mean((y - targets) ** 2)  # noqa: B023, E731
    np.testing.assert_allclose(row.none["own"], mean(none), rtol=1e-4)
    np.testing.assert_allclose(row.together["own"], mean(together), rtol=1e-4)
    alone = x @ (w[0] + own[0]) @ w[1]
    np.testing.assert_allclose(row.alone["own"]["one"], mean(alone), rtol=1e-4)
  assert rows[0].together != rows[1].together


def test_losses_are_under_the_names_of_their_adapters(given):
  """Whatever the order of the names."""
  params, batches, one, two = given
  adapters = {"b": {"first": one}, "a": {"first": two}}
  (row,) = interference(in_series, loss, params, adapters, batches, [3])
  for name, lora in (("b", one), ("a", two)):
    there = {**params, "first": params["first"] + dense(lora)}
    (x,), targets = batches["own"]
    wanted = float(loss(in_series(there, x), targets))
    assert row.alone["own"][name] == pytest.approx(wanted, rel=1e-4)


def test_an_adapter_with_itself_is_added_twice(given):
  params, batches, one, _ = given
  adapters = {"one": {"first": one}, "again": {"first": one}}
  (row,) = interference(in_series, loss, params, adapters, batches, [3])
  assert row.nonlinearity["own"] == pytest.approx(0, abs=1e-5)
  assert row.alone["own"]["one"] == row.alone["own"]["again"]
  twice = {**params, "first": params["first"] + 2 * dense(one)}
  (inputs, targets) = batches["own"]
  wanted = loss(in_series(twice, *inputs), targets)
  np.testing.assert_allclose(row.together["own"], wanted, rtol=1e-4)


def test_nothing_that_changes_has_no_share(given):
  params, batches, one, _ = given
  zero = Lora(one.a, jnp.zeros_like(one.b), one.scale)
  adapters = {"one": {"first": zero}, "two": {"first": zero}}
  (row,) = interference(in_series, loss, params, adapters, batches, [1])
  assert np.isnan(row.nonlinearity["own"])
  assert row.together == row.none


def test_what_cannot_be_compared_is_refused(given):
  params, batches, one, two = given
  adapters = {"one": {"first": one}, "two": {"first": two}}
  with pytest.raises(ValueError, match="1 adapters are given"):
    interference(in_series, loss, params, {"one": {}}, batches, [1])
  with pytest.raises(ValueError, match="at least 1, got 0"):
    interference(in_series, loss, params, adapters, batches, [0, 2])
