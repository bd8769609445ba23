# SPDX-License-Identifier: Apache-2.0
"""Pairs factored one at a time: rooms and devices used again, split tensors."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.extraction.module import Extractor, measure_parameter
from jlora.extraction.planning import ModuleJob
from jlora.extraction.workers import share_out
from jlora.factoring.factorisers import krylov, svd
from jlora.loras import dense
from jlora.numerics.meshes import place_array
from jlora.pairing.pairs import Pair, TensorPart
from jlora.views import KERNEL, LINEAR, STACKED
from tests.helpers.matrices import SPECTRA, matrix

M, N, RANK = 24, 40, 5


def job_of(name, shape, view, rank):
  pair = Pair(name, shape, TensorPart(name), TensorPart(name))
  return ModuleJob(pair, view, rank, nbytes=0)


def test_memory_used_again_changes_nothing():
  """Large, small and large again, by one thread: its delta's room is kept."""
  rng = np.random.default_rng(0)
  step = Extractor(krylov, np.float32, None, on_host=True)
  shapes = {"a": (M, N), "b": (7, 5), "c": (N, M)}
  base = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
  ft = {
    n: w + rng.normal(size=w.shape).astype(np.float32) for n, w in base.items()
  }

  def run(step, name):
    return step(job_of(name, shapes[name], KERNEL, 3), base, ft).arrays

  for name in "abcab":
    alone = run(Extractor(krylov, np.float32, None, on_host=True), name)
    for one, two in zip(run(step, name).values(), alone.values(), strict=True):
      np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("piece", [1, 100, 2**19])
def test_tensors_of_files_read_into_memory_used_again(
  tmp_path, monkeypatch, piece
):
  """By rows, and of two dtypes: the same as tensors that were read anew."""
  monkeypatch.setattr("jlora.pairing.pairs._PIECE", piece)
  rng = np.random.default_rng(0)
  shapes = {"a": (M, N), "b": (7, 5), "c": (N, M)}
  sides = []
  for dtype in (ml_dtypes.bfloat16, np.float32):
    w = {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}
    write_safetensors(tmp_path / f"{dtype.__name__}.safetensors", w)
    file = open_checkpoint(tmp_path / f"{dtype.__name__}.safetensors")
    sides.append((w, file))
  step = Extractor(krylov, np.float32, None, on_host=True)
  for name in "abcab":
    job = job_of(name, shapes[name], KERNEL, 3)
    new, again = (step(job, base, ft) for base, ft in zip(*sides, strict=True))
    for key in ("a", "b"):
      np.testing.assert_array_equal(new.arrays[key], again.arrays[key])
    assert new.figures == again.figures


def compiled(name, shape, view, device=None):
  """A pair's outcome on one device, from arrays."""
  left, right = sides_of(shape)
  step = Extractor(svd, np.float32, jax.random.key(3), on_host=False)
  if device is not None:
    step.use(device)
  return step(job_of(name, shape, view, 4), {name: left}, {name: right})


def sides_of(shape):
  base = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  delta = np.asarray(matrix(SPECTRA["power_law"](min(M, N)), M, N))
  return base, base + np.resize(delta, shape)


def test_every_device_gives_the_same():
  first = compiled("w", (M, N), KERNEL)
  for device in jax.local_devices()[::7]:
    other = compiled("w", (M, N), KERNEL, device)
    np.testing.assert_array_equal(first.arrays["a"], other.arrays["a"])
    assert first.figures == other.figures


@pytest.mark.parametrize(
  ("shape", "view", "parts"),
  [
    ((M, N), KERNEL, 8),
    ((M - 1, N), KERNEL, 8),  # along its other axis
    ((21, 25), LINEAR, 7),  # not over all devices
    ((4, M, N), STACKED, 8),  # the experts' rows
  ],
)
def test_a_tensor_on_many_devices_gives_the_same(shape, view, parts):
  left, right = sides_of(shape)
  sharding = share_out(shape)
  assert len(sharding.mesh.devices) == parts
  sides = [
    place_array(shape, sharding, side.__getitem__) for side in (left, right)
  ]
  assert not sides[0].sharding.is_fully_replicated
  step = Extractor(svd, np.float32, jax.random.key(3))
  job = job_of("w", shape, view, 4)
  split = step.split(job, sides, np.dtype(np.float32))
  whole = compiled("w", shape, view)
  assert split.status == whole.status == "extracted"
  for name in ("a", "b"):
    np.testing.assert_allclose(
      split.arrays[name], whole.arrays[name], rtol=2e-4, atol=2e-5
    )
  for name in ("norm", "errors", "singular_values", "noise_floor"):
    np.testing.assert_allclose(
      split.figures[name], whole.figures[name], rtol=1e-4, atol=1e-5
    )


def test_damage_is_found_on_many_devices():
  left, right = sides_of((M, N))
  right[M - 1, 0] = np.nan
  sharding = share_out((M, N))
  sides = [
    place_array((M, N), sharding, side.__getitem__) for side in (left, right)
  ]
  step = Extractor(svd, np.float32, None)
  job = job_of("w", (M, N), KERNEL, 4)
  with pytest.raises(ValueError, match="w: 1 of 960 values of the finetuned"):
    step.split(job, sides, np.dtype(np.float32))


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
