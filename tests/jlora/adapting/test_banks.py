# SPDX-License-Identifier: Apache-2.0
"""A bank's change fetched or masked: the same sum, whichever is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.adapting.adapted import Change, dense_change, without_bank
from jlora.adapting.banks import MACHINES, chosen, costs, laned, make_bank
from jlora.loras import Lora

SHAPE = (3, 5)


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def bank_of(ids, weights=None, batch=1):
  return Change(
    draw(0, 4, 2, 3, 1),
    draw(1, 4, 2, 1, 5),
    draw(2, 4, 2, 1, 1),
    jnp.asarray(ids),
    None if weights is None else jnp.asarray(weights),
    batch=batch,
  )


@pytest.mark.parametrize(
  ("ids", "weights"),
  [
    ([2], None),
    ([-1], None),
    ([0, 3], None),
    ([1, 1], [0.5, -2.0]),
    ([-1, 2], [7.0, 0.25]),
  ],
)
def test_both_forms_are_the_weighted_sum(ids, weights):
  change = bank_of(ids, weights)
  wanted = np.zeros(SHAPE)
  for slot, i in enumerate(ids):
    if i >= 0:
      gated = change.gate[i, :, 0] * change.a[i, :, :, 0]
      weight = 1.0 if weights is None else weights[slot]
      wanted += weight * np.asarray(gated.T @ change.b[i, :, 0])
  for form in (laned, without_bank):
    found = dense_change(form(change), SHAPE)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ids", [[4], [0, -2]])
@pytest.mark.parametrize("form", [laned, without_bank])
def test_an_id_that_does_not_exist_is_nan_within_jit(form, ids):
  change = jax.jit(form)(bank_of(ids))
  assert np.isnan(dense_change(change, SHAPE)).all()


def test_few_adapters_are_masked_and_many_fetched():
  few = bank_of([1], batch=64)
  many = dataclasses.replace(
    few, **{name: jnp.zeros((4000, 2, 1, 1)) for name in ("a", "b", "gate")}
  )
  assert len(chosen(few, 1).a) == 8  # all four, rank 2
  assert len(chosen(many, 1).a) == 2  # one's own


# (rows, tokens, adapters): what both ways took more than the base alone, of
# 4 layers of 576 with adapters of rank 16, float32; medians on one x86 core.
MEASURED = {
  (2, 1, 16): (0.777, 0.168),
  (8, 1, 1): (0.064, 0.191),
  (8, 1, 4): (0.184, 0.193),
  (8, 1, 8): (0.340, 0.225),
  (8, 1, 16): (0.623, 0.244),
  (8, 1, 64): (2.478, 0.222),
  (32, 1, 16): (0.488, 1.309),
  (32, 1, 64): (1.994, 1.345),
  (8, 16, 4): (0.164, 0.326),
  (8, 16, 8): (0.258, 0.222),
  (8, 16, 16): (0.648, 0.186),
  (8, 16, 64): (2.445, 0.339),
}


@pytest.mark.parametrize("case", MEASURED)
def test_the_way_that_was_faster_is_chosen_on_cpus(case):
  rows, tokens, count = case
  masked, fetched = MEASURED[case]
  zeros = lambda *shape: jnp.zeros((count, 16, *shape))  # noqa: E731
  for n_in, n_out in ((576, 1536), (576, 576)):
    bank = Change(zeros(n_in, 1), zeros(1, n_out), zeros(1, 1),
                  jnp.zeros(1, jnp.int32), batch=rows)  # fmt: skip
    ours = costs(bank, tokens, MACHINES["cpu"])
    assert (ours[0] < ours[1]) == (masked < fetched)


def test_bytes_count_where_they_do_not_hide():
  bank = bank_of([0, 1], batch=8)
  tpu = MACHINES["tpu"]
  assert costs(bank, 1, tpu) == (4 * 4, 2 * 8 * 12)
  assert costs(bank, 4800, tpu) == (4 * 8 * 40, 2 * 8 * 40)
  slow = tpu._replace(overlaps=False, cache=2**20, cached=0.5, thin=2)
  found = costs(bank, 120, slow)
  assert found == (4 * (4 + 8), 2 * 8 * (6 + 2))
  half = dataclasses.replace(bank, a=bank.a.astype(jnp.bfloat16))
  assert costs(half, 1, tpu) == (4 * 2, 2 * 8 * 6)


def test_stacking_pads_ranks_and_fills_missing_modules():
  one = Lora(draw(3, 1, 3), draw(4, 1, 5), jnp.float32(2))
  two = Lora(draw(5, 2, 3), draw(6, 2, 5), jnp.float32(3))
  bank = make_bank([{"q": one}, {"q": two, "k": two}], rank=3)
  assert bank["q"].a.shape == (2, 3, 3)
  assert bank["k"].scale.tolist() == [0, 3]
  np.testing.assert_array_equal(bank["q"].a[0, 1:], 0)
  np.testing.assert_array_equal(bank["q"].b[1, :2], two.b)


WRONG = {
  "none": ([], None, "no adapters"),
  "rank": ([{"q": Lora(draw(0, 2, 3), draw(1, 2, 5), jnp.float32(1))}], 1,
           "rank 1 does not hold rank 2"),
  "shapes": (
    [{"q": Lora(draw(0, 1, 3), draw(1, 1, n), jnp.float32(1))} for n in (4, 5)],
    None, "do not belong to one parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_bank_is_refused(name):
  adapters, rank, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    make_bank(adapters, rank=rank)
