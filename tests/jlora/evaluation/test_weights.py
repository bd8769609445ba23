# SPDX-License-Identifier: Apache-2.0
"""Figures of given Loras against float64 NumPy, optax and the run's report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.checkpoints.safetensors import write_safetensors
from jlora.evaluation.weights import compare, spectral_norm
from jlora.loras import Lora, dense
from tests.helpers.matrices import SPECTRA, matrix

SIGMA = np.array([4.0, 2.0, 1.0, 0.5, 0.25])


def pair(dtype=np.float32, like=np.asarray):
  """A model of two matrices, one of them three experts, and a bias."""
  rng = np.random.default_rng(0)
  base = {
    "w": {"kernel": rng.standard_normal((40, 24)), "bias": np.zeros(24)},
    "experts": rng.standard_normal((3, 24, 32)),
  }
  changes = {
    "w": {"kernel": matrix(SIGMA, 40, 24), "bias": np.zeros(24)},
    "experts": np.stack([matrix(SIGMA * k, 24, 32, k) for k in (1, 2, 3)]),
  }
  tuned = jax.tree.map(lambda w, d: w + d, base, changes)
  cast = lambda x: like(np.asarray(x, dtype))  # noqa: E731
  return jax.tree.map(cast, base), jax.tree.map(cast, tuned)


def flat(tree):
  return {"w/kernel": tree["w"]["kernel"], "experts": tree["experts"]}


@pytest.mark.parametrize(
  ("like", "dtype"),
  [
    (np.asarray, np.float32),
    (np.asarray, jnp.bfloat16),
    (jnp.asarray, jnp.bfloat16),
  ],
)
def test_figures_of_given_loras(like, dtype):
  base, ft = pair(dtype, like)
  loras = jlora.extract(base, ft, rank=3, factor=jlora.factoring.svd)
  rows = compare(base, ft, loras).rows
  json.dumps(rows, allow_nan=False)
  assert list(rows) == list(loras)
  for path, row in rows.items():
    w, v = (np.asarray(flat(tree)[path], np.float64) for tree in (base, ft))
    delta, change = v - w, np.asarray(dense(loras[path]), np.float64)
    rest = delta - change
    norm = np.linalg.norm(delta)
    expected = {
      "relative_error": np.linalg.norm(rest) / norm,
      "mse": np.mean(rest**2),
      "mean_abs_delta": np.abs(delta).mean(),
      "relative_change": norm / np.linalg.norm(w),
      "norm": norm,
      "unchanged": np.mean(delta == 0),
    }
    for name, value in expected.items():
      assert row[name] == pytest.approx(value, rel=1e-4), name
    # The study's measure, by the study's library.
    cosine = optax.losses.cosine_distance(
      jnp.asarray(delta.ravel(), jnp.float32),
      jnp.asarray(change.ravel(), jnp.float32),
    )
    assert row["cosine_distance"] == pytest.approx(float(cosine), abs=1e-6)
    spectral = np.linalg.norm(rest, ord=2, axis=(-2, -1)).max()
    assert row["spectral_error"] == pytest.approx(spectral, rel=1e-3)
    assert row["spectral_bound"] >= spectral * (1 - 1e-5)
    assert row["rank"] == 3
    assert row["bytes"] == loras[path].nbytes
    values = np.linalg.svd(delta, compute_uv=False)[..., :3].reshape(-1, 3)
    np.testing.assert_allclose(
      row["singular_values"], np.sqrt((values**2).sum(0)), rtol=1e-3
    )


def test_rows_agree_with_the_run_that_made_the_adapter(tmp_path):
  """`compare` on the files is `report.json` over again."""
  base, ft = pair(jnp.bfloat16)
  for name, tree in (("base", base), ("ft", ft)):
    weights = {
      "m.q.weight": np.ascontiguousarray(tree["w"]["kernel"].T),
      "m.k.weight": tree["experts"][0],
    }
    write_safetensors(tmp_path / f"{name}.safetensors", weights)
  files = [tmp_path / f"{name}.safetensors" for name in ("base", "ft")]
  with open(tmp_path / "log", "w") as log:
    report = jlora.extract_checkpoint(*files, tmp_path / "out", rank=4, log=log)
  like = jlora.open_checkpoint(files[0]).spec
  loras = jlora.load_peft(tmp_path / "out", like=like).loras
  rows = compare(*map(jlora.open_checkpoint, files), loras).rows
  assert len(rows) == len(report.modules) == 2
  for told in report.modules:
    row = rows[told["path"]]
    assert set(told) <= {*row, "path", "parameter_bytes"}
    for name in set(told) & set(row):
      assert row[name] == pytest.approx(told[name], rel=2e-4, abs=2e-6), name
  assert 0 <= report.totals["unchanged"] < 0.1
  for row in rows.values():
    assert 0 < row["rounding_share"] < 0.01
    assert row["learnt_norm"] == pytest.approx(row["norm"], rel=1e-2)


def test_a_lora_of_another_size_is_measured_as_it_is():
  """At half its scale half of the change is missing; its delta stays."""
  base, ft = pair()
  whole = jlora.extract(base, ft, rank=5, factor=jlora.factoring.svd)
  half = {p: Lora(x.a, x.b, 0.5 * x.scale) for p, x in whole.items()}
  for path, row in compare(base, ft, half).rows.items():
    assert row["relative_error"] == pytest.approx(0.5, rel=1e-4)
    assert row["cosine_distance"] == pytest.approx(0, abs=1e-6)
    other = compare(base, ft, whole).rows[path]
    assert row["stable_rank"] == pytest.approx(other["stable_rank"], rel=1e-5)
    assert (row["rank_90"], other["rank_90"]) == (None, 2)


@pytest.mark.parametrize("name", sorted(SPECTRA))
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_the_spectral_norm_is_from_below_and_near(name, shape):
  sigma = SPECTRA[name](64)
  delta = matrix(sigma, *shape)
  lora = Lora(
    np.zeros((1, shape[0]), np.float32),
    np.zeros((1, shape[1]), np.float32),
    np.float32(1),
  )
  found = float(spectral_norm(delta, lora))
  assert 0.98 * sigma[0] <= found <= sigma[0] * (1 + 1e-5)


def test_no_change_and_no_lora():
  base = {"w": np.ones((4, 6), np.float32)}
  nothing = Lora(
    np.zeros((2, 4), np.float32), np.zeros((2, 6), np.float32), np.float32(1)
  )
  row = compare(base, base, {"w": nothing}).rows["w"]
  assert (row["norm"], row["unchanged"], row["spectral_error"]) == (0, 1, 0)
  assert (row["rank_90"], row["relative_error"]) == (0, 0)
  # Updates under half an ulp would have left no trace either.
  assert (row["learnt_norm"], row["rounding_share"]) == (None, None)


@pytest.mark.parametrize("like", [np.asarray, jnp.asarray])
def test_totals_count_what_has_no_factors(like):
  base, ft = pair(np.float32, like)
  shift = np.linspace(-1, 1, 24, dtype=np.float32)
  ft["w"]["bias"] = base["w"]["bias"] + like(shift)
  deltas = {
    path: np.asarray(x, np.float64) - np.asarray(flat(base)[path])
    for path, x in flat(ft).items()
  }
  whole = np.sqrt(sum((x**2).sum() for x in [*deltas.values(), shift]))
  with pytest.warns(UserWarning, match=r"1 changed.*w/bias \(24,\)"):
    loras = jlora.extract(base, ft, rank=5)
  found = compare(base, ft, loras)
  left = np.linalg.norm(shift) / whole
  json.dumps(found, allow_nan=False)
  assert found.totals["norm"] == pytest.approx(whole, rel=1e-5)
  assert found.totals["relative_error"] == pytest.approx(left, rel=1e-3)
  assert found.totals["left_out_share"] == pytest.approx(left, rel=1e-3)
  assert (found.totals["left_out"], found.totals["programs"]) == (1, 2)

  programs = jlora.extract(base, ft, rank=5, shifts=True)
  found = compare(base, ft, programs)
  assert list(found.rows) == list(programs)
  assert found.rows["w/bias"]["error"] == 0
  assert found.totals["relative_error"] < 1e-5
  assert (found.totals["left_out"], found.totals["programs"]) == (0, 3)
  half = {**programs, "w/bias": jlora.Shift(like(shift / 2))}
  row = compare(base, ft, half).rows["w/bias"]
  assert row["relative_error"] == pytest.approx(0.5, rel=1e-5)


def test_what_is_refused():
  base, ft = pair()
  loras = jlora.extract(base, ft, rank=2)
  with pytest.raises(
    ValueError, match="1 of 3 programs have no pair.*: nowhere;"
  ):
    compare(base, ft, {**loras, "nowhere": loras["w/kernel"]})
  with pytest.raises(ValueError, match=r"fit: experts \(3, 24, 32\) for a"):
    compare(base, ft, {"experts": loras["w/kernel"]})
  with pytest.raises(ValueError, match="give at least one"):
    compare(base, ft, {})
  with pytest.raises(ValueError, match=r"w/bias \(24,\) for Shift \(23,\)"):
    compare(base, ft, {"w/bias": jlora.Shift(jnp.ones(23))})
  lora = loras["w/kernel"]
  broken = Lora(lora.a, lora.b, lora.scale * jnp.nan)
  with pytest.raises(
    ValueError, match="w/kernel: NaN or infinity in scale of the Lora"
  ):
    compare(base, ft, {"w/kernel": broken})
  ft["w"]["kernel"][3, 3] = np.inf
  with pytest.raises(ValueError, match="w/kernel: NaN or infinity in the chan"):
    compare(base, ft, {"w/kernel": lora})


@pytest.mark.parametrize("like", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("only", ["base", "finetuned", "both"])
def test_a_complex_change_is_missing_from_the_totals(like, only):
  w, c = np.zeros((4, 5), np.float32), np.zeros((3, 3), np.complex64)
  base, ft = {"w": w, "c": c}, {"w": w + 1, "c": c + (3 + 4j)}
  if only == "base":
    base["c"], ft["c"] = base["c"] + 4j, np.full((3, 3), 3, np.float32)
  elif only == "finetuned":
    base["c"] = base["c"].real
  base, ft = jax.tree.map(like, (base, ft))
  loras = {"w": Lora(np.ones((1, 4)), np.ones((1, 5)), np.float32(1))}
  totals = compare(base, ft, loras).totals
  assert totals["left_out"] == 1
  assert totals["error"] == pytest.approx(15, rel=1e-5)
  assert totals["norm"] == pytest.approx(np.hypot(15, np.sqrt(20)), rel=1e-5)


def test_programs_of_complex_parameters_are_refused():
  base = {"c": np.zeros((3, 3), np.complex64)}
  for program in (
    Lora(np.ones((1, 3)), np.ones((1, 3)), np.float32(1)),
    jlora.Shift(np.ones((3, 3), np.float32)),
  ):
    with pytest.raises(ValueError, match=r"complex parameters: c \(3, 3\)"):
      compare(base, base, {"c": program})
