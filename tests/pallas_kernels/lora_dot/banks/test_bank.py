# SPDX-License-Identifier: Apache-2.0
"""Banks: places, ids and what a row takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_dot.banks.bank import (
  check_ids,
  empty_bank,
  put_adapter,
  slots_of,
)


def test_an_adapter_replaces_all_of_another():
  bank = empty_bank(2, 3, 4, 5, jnp.bfloat16)
  first = put_adapter(bank, 1, jnp.ones((3, 4)), jnp.ones((3, 5)))
  second = put_adapter(first, 1, jnp.ones((1, 4)), jnp.ones((1, 5)), 0.25)
  np.testing.assert_array_equal(second.a[1, :, 0].astype("f4"), [1, 0, 0])
  np.testing.assert_array_equal(second.b[1, :, 0].astype("f4"), [0.25, 0, 0])
  assert second.a.dtype == jnp.bfloat16
  assert not np.any(second.a[0])
  assert np.all(first.a[1] == 1)


@pytest.mark.parametrize(
  ("place", "a", "b", "message"),
  [
    (2, (1, 4), (1, 5), "place 2 is not in 0 to 1"),
    (-1, (1, 4), (1, 5), "place -1"),
    (0, (4, 4), (4, 5), "at most 3"),
    (0, (1, 5), (1, 5), "the bank takes"),
    (0, (1, 4), (2, 5), "the bank takes"),
  ],
)
def test_adapters_that_do_not_fit_are_refused(place, a, b, message):
  bank = empty_bank(2, 3, 4, 5, jnp.float32)
  with pytest.raises(ValueError, match=message):
    put_adapter(bank, place, jnp.ones(a), jnp.ones(b))


def test_ids_are_checked_on_the_host():
  assert check_ids(np.array([[0, -1]], np.int64), 1).dtype == jnp.int32
  with pytest.raises(ValueError, match=r"ids\[0, 1\] = 7, .* and 2 more: .*6"):
    check_ids(
      np.full((2, 3), 7) * (np.arange(3) > 0) + np.eye(2, 3, dtype=int) * 9, 7
    )
  with pytest.raises(ValueError, match="float32"):
    check_ids(np.zeros(2, np.float32), 3)
  with pytest.raises(ValueError, match="inside jit"):
    jax.jit(lambda ids: check_ids(ids, 3))(jnp.arange(2))


def test_what_a_row_takes():
  ids = jnp.array([[0, -1], [5, 2]])
  slots = slots_of(ids, jnp.full((2, 1), 3.0), (2,), 3)
  np.testing.assert_array_equal(slots.ids, [[0, 0], [2, 2]])
  np.testing.assert_array_equal(slots.weights[..., 0], [[3, 0], [np.nan, 3]])
