# SPDX-License-Identifier: Apache-2.0
"""Changes of float64 models below the weights' steps in float32 are changes."""

import io
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.extraction import module as modules
from jlora.factoring import svd
from jlora.factoring.deltas import difference, survey
from jlora.factoring.rounding import ulp_histogram
from jlora.pairing.comparison import check_finite, is_equal

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
# Steps of float32 at 1 are 1.2e-7, so that nothing of these would be left.
SMALL = 1e-9


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  change = SMALL * np.outer(rng.normal(size=8), rng.normal(size=6))
  base = {Q: rng.uniform(1, 2, (8, 6)), NORM: np.ones(6)}
  finetuned = {Q: base[Q] + change, NORM: base[NORM] + SMALL}
  assert np.array_equal(base[Q].astype("f4"), finetuned[Q].astype("f4"))
  return base, finetuned, finetuned[Q] - base[Q]


def change_of(lora):
  return np.asarray(lora.scale * (lora.a.T @ lora.b)).T


def test_trees_keep_it(pair):
  base, finetuned, change = pair
  with warnings.catch_warnings(action="error"):
    found = jlora.extract(base, finetuned, rank=1, shifts=True)
  np.testing.assert_allclose(change_of(found[Q]), change, atol=1e-5 * SMALL)
  shift = finetuned[NORM] - base[NORM]
  np.testing.assert_allclose(found[NORM].delta, shift, rtol=1e-6)
  with pytest.warns(UserWarning, match="norm.weight"):
    jlora.extract(base, finetuned, rank=1)


def test_one_side_is_enough(pair):
  base, finetuned, _ = pair
  below = {name: value.astype("f4") for name, value in base.items()}
  change = finetuned[Q] - below[Q].astype("f8")
  chosen = lambda path, _: path == Q  # noqa: E731
  with pytest.warns(UserWarning, match="more numbers than their weights"):
    found = jlora.extract(below, finetuned, rank=6, select=chosen)
  np.testing.assert_allclose(change_of(found[Q]), change, atol=1e-13)


def test_compare_keeps_it(pair):
  base, finetuned, change = pair
  loras = jlora.extract(
    base, finetuned, rank=1, select=lambda path, _: path == Q
  )
  found = jlora.compare(base, finetuned, loras)
  whole = np.hypot(np.linalg.norm(change), np.linalg.norm(finetuned[NORM] - 1))
  np.testing.assert_allclose(found.totals["norm"], whole, rtol=1e-5)
  np.testing.assert_allclose(
    found.rows[Q]["norm"], np.linalg.norm(change), 1e-5
  )
  assert found.rows[Q]["relative_error"] < 1e-5
  assert found.totals["left_out"] == 1


def test_checkpoints_keep_it(pair, tmp_path):
  base, finetuned, change = pair
  for name, tensors in (("base", base), ("finetuned", finetuned)):
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  report = jlora.extract_checkpoint(
    tmp_path / "base.safetensors", tmp_path / "finetuned.safetensors",
    tmp_path / "out", rank=1, log=io.StringIO(),
  )  # fmt: skip
  (row,) = report.modules
  np.testing.assert_allclose(row["norm"], np.linalg.norm(change), rtol=1e-5)
  assert row["unchanged"] == 0
  assert report.totals["ledger"]["kept whole"] == 1
  found = jlora.load_peft(tmp_path / "out")
  np.testing.assert_allclose(
    change_of(found.loras[Q]), change, atol=1e-5 * SMALL
  )
  np.testing.assert_array_equal(found.full[NORM], finetuned[NORM].astype("f4"))
  stored = open_checkpoint(tmp_path / "out" / "adapter_model.safetensors")
  kept = stored[f"base_model.model.{NORM}"]
  np.testing.assert_array_equal(kept, finetuned[NORM])  # as it was


def test_on_devices_it_is_done_on_the_host(pair):
  """There JAX would have rounded both sides before the difference."""
  base, finetuned, change = pair
  step = modules.Extractor(svd, np.float32, None, on_host=False)
  job = modules.ModuleJob(
    jlora.pairing.pairs.Pair(
      Q, (8, 6), *[jlora.pairing.pairs.TensorPart(Q)] * 2
    ),
    jlora.views.LINEAR, 1, 768,
  )  # fmt: skip
  outcome = step(job, base, finetuned)
  assert outcome.status == "extracted"
  assert not step.compilations
  np.testing.assert_allclose(
    outcome.figures["norm"], np.linalg.norm(change), rtol=1e-5
  )


def test_traced_arrays_follow_jax(pair):
  base, finetuned, change = pair
  run = jax.jit(lambda *sides: jlora.extract(*sides, rank=1))
  assert not np.asarray(run(base, finetuned)[Q].b).any()
  with jax.enable_x64(True):
    found = change_of(run(base, finetuned)[Q])
    np.testing.assert_allclose(found, change, atol=1e-5 * SMALL)


def test_what_float32_has_no_number_for_is_told():
  base = {"w": np.full((3, 4), 1e-40)}
  finetuned = {"w": base["w"] + 1e-60}
  job = modules.ModuleJob(
    jlora.pairing.pairs.Pair(
      "w", (3, 4), *[jlora.pairing.pairs.TensorPart("w")] * 2
    ),
    jlora.views.LINEAR, 1, 192,
  )  # fmt: skip
  if np.array_equal(base["w"], finetuned["w"]):
    finetuned = {"w": np.nextafter(base["w"], 1)}
  outcome = modules.Extractor(svd, np.float32, None)(job, base, finetuned)
  assert outcome.status == "not representable"
  assert "smaller than any number of float32" in outcome.why


def test_the_parts_that_see_both_sides():
  one = np.float64([1, 2, 3, 0])
  two = one + [SMALL, 0, SMALL, 0]
  assert not is_equal(one, two)
  assert is_equal(one, one.astype("f4"))
  np.testing.assert_allclose(difference(one, two), (two - one).astype("f4"))
  delta, found = survey(one, two, np.float64)
  np.testing.assert_array_equal(delta, difference(one, two))
  assert found.unchanged == 0.5
  assert ulp_histogram(one, two, np.float64)[2].sum() > 0
  check_finite("w", np.float64([1e300]))
  with jax.enable_x64(True):
    delta, found = survey(jnp.asarray(one), jnp.asarray(two), np.float64)
    np.testing.assert_array_equal(delta, difference(one, two))
    assert found.unchanged == 0.5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_factors_that_their_dtype_does_not_hold(dtype, tmp_path):
  large = 1e12 if dtype == jnp.float16 else 1e30
  base = {Q: np.zeros((8, 6), "f4")}
  finetuned = {Q: np.full((8, 6), large, "f4")}
  for name, tensors in (("base", base), ("finetuned", finetuned)):
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  paths = [tmp_path / f"{name}.safetensors" for name in ("base", "finetuned")]
  if dtype == jnp.bfloat16:  # a square root of any float32 fits
    found = jlora.extract(base, finetuned, rank=1, dtype=dtype)
    assert np.isfinite(np.asarray(found[Q].b, np.float32)).all()
    return
  with pytest.raises(
    ValueError, match=f"{Q}: the factors are larger than float"
  ):
    jlora.extract(base, finetuned, rank=1, dtype=dtype)
  with pytest.raises(
    ValueError, match=f"{Q}: the factors are larger than float"
  ):
    jlora.extract_checkpoint(
      *paths, tmp_path / "out", rank=1, dtype=dtype, log=io.StringIO()
    )
  run = jax.jit(lambda *sides: jlora.extract(*sides, rank=1, dtype=dtype))
  assert np.isnan(run(base, finetuned)[Q].scale)
