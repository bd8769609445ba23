# SPDX-License-Identifier: Apache-2.0
"""One parameter's step: on the host as compiled, batches, damaged values."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from jlora.factoring import krylov, svd
from jlora.loras import dense
from jlora.steps import measure_parameter
from jlora.views import KERNEL, LINEAR, STACKED
from tests.matrices import SPECTRA, matrix

M, N, RANK = 24, 40, 5


def both(base, finetuned, view, dtype=np.float32, factor=svd):
  """The step's figures from NumPy arrays and compiled."""
  step = functools.partial(
    measure_parameter,
    view=view,
    rank=RANK,
    factor=factor,
    dtype=dtype,
    stored=finetuned.dtype,
  )
  host = step(base, finetuned, np.zeros(2, np.uint32))
  assert all(
    isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(host)
  )
  return host, jax.jit(step)(base, finetuned, jax.random.key(0))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("view", [KERNEL, LINEAR])
@pytest.mark.parametrize("spectrum", ["flat", "power_law", "low_rank"])
def test_the_host_gives_the_figures_of_the_compiled_step(spectrum, view, dtype):
  base = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
  delta = np.asarray(matrix(SPECTRA[spectrum](M), M, N))
  host, step = both(base, base + delta, view, dtype)
  assert host.lora.a.dtype == step.lora.a.dtype == dtype
  norm = float(host.certificate.norm)
  for field in host.certificate._fields:
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
  # Signs are fixed on both sides, but not within equal singular values.
  np.testing.assert_allclose(
    np.linalg.norm(dense(host.lora)),
    np.linalg.norm(dense(step.lora)),
    rtol=1e-3,
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


def test_a_factoriser_that_knows_only_jax_works_on_the_host():
  def foreign(delta, rank, key):
    del key
    return svd(jax.numpy.asarray(delta), rank)

  w = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
  plain, _ = both(w, 2 * w, KERNEL)
  host, _ = both(w, 2 * w, KERNEL, factor=foreign)
  np.testing.assert_allclose(
    host.certificate.errors, plain.certificate.errors, rtol=1e-5
  )


def test_a_factoriser_that_takes_sums_is_given_those_of_a_single_matrix():
  given = []

  def asking(delta, rank, key, *, sums=None):
    given.append(sums)
    return krylov(delta, rank, key, sums=sums)

  rng = np.random.default_rng(0)
  w = rng.normal(size=(2, 96, 70)).astype(np.float32)
  change = rng.normal(size=w.shape).astype(np.float32)
  for view, at in ((STACKED, slice(2)), (KERNEL, 0)):
    measure_parameter(
      w[at],
      w[at] + change[at],
      np.zeros(2, np.uint32),
      view=view,
      rank=2,
      factor=functools.partial(asking),
      dtype=np.float32,
      stored=w.dtype,
    )
  assert given[0] is None
  norm = given[1].unit * given[1].squares ** 0.5
  assert norm == pytest.approx(np.linalg.norm(change[0]), rel=1e-5)
