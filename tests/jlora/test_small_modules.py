# SPDX-License-Identifier: Apache-2.0
"""Small matrices on the host against the compiled step: the same figures."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora.factoring import svd
from jlora.loras import dense
from jlora.modules import measure_parameter
from jlora.small_modules import is_small, measure_small
from jlora.views import KERNEL, LINEAR, STACKED
from tests.matrices import SPECTRA, matrix

M, N, RANK = 24, 40, 5


def both(base, finetuned, view, dtype=np.float32):
  options = {"view": view, "rank": RANK, "dtype": dtype}
  stored = finetuned.dtype
  host = measure_small(base, finetuned, stored=stored, **options)
  step = functools.partial(
    measure_parameter, factor=svd, stored=stored, **options
  )
  return host, jax.jit(step)(base, finetuned, jax.random.key(0))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("view", [KERNEL, LINEAR])
@pytest.mark.parametrize("spectrum", ["flat", "power_law", "low_rank"])
def test_the_figures_are_those_of_the_compiled_step(spectrum, view, dtype):
  base = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
  delta = np.asarray(matrix(SPECTRA[spectrum](M), M, N))
  host, step = both(base, base + delta, view, dtype)
  assert host.lora.a.dtype == step.lora.a.dtype == dtype
  norm = float(host.certificate.norm)
  for field in ("norm", "mean_abs", "errors", "changes", "projections"):
    np.testing.assert_allclose(
      getattr(host.certificate, field),
      getattr(step.certificate, field),
      rtol=1e-4,
      atol=1e-4 * norm,  # units of value 0 are other noise on either side
      err_msg=field,
    )
  np.testing.assert_allclose(host.sigma, step.sigma, atol=1e-5 * norm)
  np.testing.assert_allclose(host.base_norm, step.base_norm, rtol=1e-5)
  np.testing.assert_allclose(host.noise_std, step.noise_std, rtol=1e-5)
  floors, errors = host.certificate.floors, host.certificate.errors
  assert (floors <= errors).all()
  # What lies between them is the rounding to storage.
  slack = (1e-3 if dtype == np.float32 else 4e-3) * norm
  np.testing.assert_allclose(floors, errors, rtol=1e-3, atol=slack)
  # Signs are fixed on both sides, but not within equal singular values.
  jnp_lora = jax.tree.map(jnp.asarray, host.lora)
  np.testing.assert_allclose(
    np.linalg.norm(dense(jnp_lora)), np.linalg.norm(dense(step.lora)), rtol=1e-3
  )


def test_experts_are_a_batch():
  rng = np.random.default_rng(1)
  base, finetuned = (
    rng.normal(size=(3, M, N)).astype(np.float32) for _ in range(2)
  )
  host, step = both(base, finetuned, STACKED)
  assert host.certificate.errors.shape == (3, RANK + 1)
  np.testing.assert_allclose(
    host.certificate.errors, step.certificate.errors, rtol=1e-4
  )
  alone = both(base[1], finetuned[1], KERNEL)[0]
  np.testing.assert_array_equal(host.lora.a[1], alone.lora.a)


def test_zero_and_not_finite():
  base = np.ones((M, N), np.float32)
  host, _ = both(base, base, KERNEL)
  assert host.certificate.norm == 0
  assert not host.lora.a.any()
  bad = base.copy()
  bad[3, 4] = np.inf
  assert np.isnan(both(base, bad, KERNEL)[0].certificate.norm)


def test_what_counts_as_small_hangs_on_the_shape_alone():
  assert is_small((1, 4096))
  assert is_small((20, 64, 64))
  assert not is_small((2048, 2048))
  assert not is_small((512, 512, 512))
