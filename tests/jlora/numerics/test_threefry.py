# SPDX-License-Identifier: Apache-2.0
"""Keys derived on the host are JAX's."""

import jax
import numpy as np
import pytest

from jlora.numerics.backends import words_of
from jlora.numerics.threefry import fold_in, seed_words
from jlora.paths import key_for


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**32 - 1, -1, -5])
def test_seeds(seed):
  np.testing.assert_array_equal(
    seed_words(seed), words_of(jax.random.key(seed))
  )


@pytest.mark.parametrize("number", [0, 1, 12345, 2**31, 2**32 - 1])
def test_folding(number):
  key = jax.random.key(11)
  found = fold_in(words_of(key), number)
  assert type(found) is np.ndarray
  np.testing.assert_array_equal(found, words_of(fold_in(key, number)))
  np.testing.assert_array_equal(
    found, words_of(jax.random.fold_in(key, np.uint32(number)))
  )


def test_keys_of_paths():
  np.testing.assert_array_equal(
    key_for(seed_words(3), "layers/0"),
    words_of(key_for(jax.random.key(3), "layers/0")),
  )


def test_a_key_of_another_generator_is_jaxs():
  key = jax.random.key(3, impl="rbg")
  assert fold_in(key, 4) == jax.random.fold_in(key, 4)
