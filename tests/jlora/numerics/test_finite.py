# SPDX-License-Identifier: Apache-2.0
"""Whether numbers are finite, of every dtype, is what NumPy says of float64."""

import ml_dtypes
import numpy as np
import pytest

from jlora.numerics import finite
from jlora.numerics.finite import is_finite, rounded

FLOATS = ("f2", "f4", "f8", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_of_16_bits_and_some_of_others(dtype, monkeypatch):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  monkeypatch.setattr(finite, "_BLOCK", 7)
  size = min(dtype.itemsize, 2)
  codes = np.arange(2 ** (8 * size), dtype=f"u{size}")
  if dtype.itemsize > 2:  # signs, exponents and the upper bits of fractions
    codes = codes.astype(f"u{dtype.itemsize}") << (8 * (dtype.itemsize - 2))
  values = codes.view(dtype)
  with np.errstate(invalid="ignore"):
    expected = np.isfinite(values.astype(np.float64))
  for at in range(0, len(values), 997):
    part = slice(at, at + 20)
    assert is_finite(values[part]) == expected[part].all()
  assert is_finite(values[expected])
  for odd in values[~expected][:: max(1, (~expected).sum() // 9)]:
    assert not is_finite(np.append(values[expected][:30], odd))
  assert not is_finite(values.reshape(-1, 16).T)


def test_integers_and_nothing_are_finite():
  assert is_finite(np.arange(3))
  assert is_finite(np.ones(0, np.float16))
  assert is_finite(np.bool_([True]))


def test_rounding_tells_what_a_dtype_does_not_hold():
  x = np.float32([1.5, -7e4, 3])
  assert rounded("w", x, np.float32) is x
  found = rounded("w", x, ml_dtypes.bfloat16)
  assert found.dtype == ml_dtypes.bfloat16
  with pytest.raises(ValueError, match="w: 1 of 3 values, up to 7e\\+04, are"):
    rounded("w", x, np.float16)
  with pytest.raises(ValueError, match="bfloat16 holds.*store it in float32"):
    rounded("w", np.float32([3.4e38]), ml_dtypes.bfloat16)
  with pytest.raises(ValueError, match="float32 holds.*store it in float64"):
    rounded("w", np.array([1e300]), np.float32)
  with pytest.raises(ValueError, match="w: 2 of 3 values are NaN or infinite"):
    rounded("w", np.float32([np.nan, np.inf, 1e9]), np.float16)
