# SPDX-License-Identifier: Apache-2.0
"""Tensors made in pieces are those made as a whole, bit for bit."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.arrays.sparsifiers import match_l1
from jlora.merging.arrays.spherical import products_of
from jlora.merging.arrays.task_vectors import by_mass, by_mass_or_plus
from jlora.merging.checkpoints import merger as merge_steps
from jlora.merging.checkpoints.merger import Merger
from jlora.merging.checkpoints.piecewise import (
  PIECEWISE,
  SUMS,
  is_piecewise,
  whole_sums_of,
)
from jlora.merging.checkpoints.planning import InputTensor, Job
from jlora.pairing.pairs import TensorPart

SHAPE = (37, 100)
# Method -> its settings, and how many models; every one of PIECEWISE.
SETTINGS = {
  "linear": (jlora.merging.linear, {"weights": (0.7, 0.2, -0.4)}),
  "sum": (
    functools.partial(jlora.merging.linear, normalize=False),
    {"weights": (0.3, 0.6)},
  ),
  "nearswap": (jlora.merging.nearswap, {"weights": (1.0,), "t": 0.02}),
  "passthrough": (jlora.merging.passthrough, {"weights": (0.3,)}),
  "copy": (jlora.merging.passthrough, {"weights": (1.0,)}),
  "slerp": (jlora.merging.slerp, {"weights": (1.0, 1.0), "t": 0.3}),
  "slerp by weights": (jlora.merging.slerp, {"weights": (1.0, 3.0)}),
  "task_arithmetic": (
    functools.partial(jlora.merging.task_arithmetic, normalize=True),
    {"weights": (0.7, 0.3), "scale": 0.8},
  ),
  "dare": (jlora.merging.dare, {"weights": (0.7, 0.3, 1.0), "density": 0.4}),
  "dare ties": (
    functools.partial(
      jlora.merging.dare, elect=by_mass_or_plus, normalize=True
    ),
    {"weights": (0.7, 0.3), "density": (0.4, 0.6)},
  ),
  "dare matched": (
    functools.partial(jlora.merging.dare, rescale=match_l1),
    {"weights": (0.7, 0.3), "density": (0.4, 0.6)},
  ),
}
NEEDS_BASE = (
  jlora.merging.nearswap,
  jlora.merging.task_arithmetic,
  jlora.merging.dare,
)
MEASURED = ["slerp", "slerp by weights", "dare matched"]
SLERPS = MEASURED[:2]


def plain(name):
  method = SETTINGS[name][0]
  return getattr(method, "func", method)


@pytest.fixture
def merger_of(tmp_path, monkeypatch):
  """(name of SETTINGS, the models' dtypes) -> the method's Merger and a job."""
  monkeypatch.setattr(merge_steps, "_PIECE", 1024)
  monkeypatch.setattr(merge_steps, "_SMALL", 256)
  monkeypatch.setattr(merge_steps, "_ROW", 128)

  def make(name, dtypes=(np.float32,), nan=False, on_host=False):
    method, settings = SETTINGS[name]
    rng, models = np.random.default_rng(0), {}
    base = rng.standard_normal(SHAPE, np.float32)
    for at, model in enumerate(("base", "a", "b", "c")):
      w = base + rng.standard_normal(SHAPE, np.float32) * (0.1 * (at > 0))
      w[3, 5] = np.nan if nan and at == 1 else w[3, 5]
      file = tmp_path / f"{model}.safetensors"
      write_safetensors(file, {"w": w.astype(dtypes[at % len(dtypes)])})
      models[model] = open_checkpoint(file)
    sources = [
      InputTensor(m, TensorPart("w")) for m in "abc"[: len(settings["weights"])]
    ]
    job = Job(
      "w", SHAPE, np.dtype(dtypes[0]), tuple(sources),
      InputTensor("base", TensorPart("w"))
      if plain(name) in NEEDS_BASE
      else None,
      tuple(sorted(settings.items())),
    )  # fmt: skip
    return Merger(method, models, None, [job] if on_host else []), job

  return make


def in_pieces(merger, job):
  pieces, sums = merger.pieces(job), ()
  assert len(pieces) == 4
  if merger.is_measured(job):
    sums = [merger.measure(job, piece) for piece in pieces]
  parts = [merger(job, piece, sums).reshape(-1) for piece in pieces]
  return np.concatenate(parts).reshape(job.shape), sums


def check_same_bits(one, two):
  assert one.dtype == two.dtype
  np.testing.assert_array_equal(one.view(np.uint8), two.view(np.uint8))


def test_all_methods_of_the_table_are_here():
  assert {plain(name) for name in SETTINGS} == set(PIECEWISE)
  assert {plain(name) for name in MEASURED} == set(SUMS)


@pytest.mark.parametrize(
  "dtypes",
  [(np.float32,), (ml_dtypes.bfloat16,), (np.float16, np.float32)],
  ids=["float32", "bfloat16", "mixed"],
)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("on_host", [False, True], ids=["compiled", "numpy"])
def test_pieces_are_the_whole_bit_for_bit(name, dtypes, on_host, merger_of):
  merger, job = merger_of(name, dtypes, on_host=on_host)
  assert merger.is_on_host(job) == on_host
  found, sums = in_pieces(merger, job)
  if sums:  # the whole is told the same sums: its own are rounded otherwise
    total = np.sum(sums, axis=0, dtype=np.float64).astype(np.float32)
    told = {SUMS[plain(name)].setting: total}
    job = job._replace(settings=tuple({**dict(job.settings), **told}.items()))
  check_same_bits(found, merger(job))


@pytest.mark.parametrize("name", SLERPS)
def test_sums_of_pieces_are_those_of_the_whole(name, merger_of):
  merger, job = merger_of(name)
  found, sums = in_pieces(merger, job)
  models = [np.float64(merger._models[one.model]["w"]) for one in job.sources]
  left, right = models
  exact = [(x * y).sum() for x, y in ((left,) * 2, models, (right,) * 2)]
  np.testing.assert_allclose(np.sum(sums, 0, np.float64), exact, rtol=1e-6)
  np.testing.assert_allclose(found, merger(job), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SLERPS)
def test_sums_that_are_given_are_not_taken(name, merger_of):
  merger, job = merger_of(name)
  stack = jnp.stack([merger._models[one.model]["w"] for one in job.sources])
  given = tuple(np.asarray(products_of(stack)).tolist())
  told = job._replace(settings=(("products", given), *job.settings))
  assert not merger.is_measured(told)
  found, _ = in_pieces(merger, told)
  np.testing.assert_allclose(found, merger(job), rtol=1e-5, atol=1e-6)


def test_matched_lengths_are_those_of_the_whole(merger_of):
  merger, job = merger_of("dare matched")
  found, sums = in_pieces(merger, job)
  stack, base = (
    np.float64([merger._models[name]["w"] for name in names])
    for names in ("ab", ("base",))
  )
  whole, kept = np.sum(sums, 0, np.float64).T
  np.testing.assert_allclose(whole, abs(stack - base).sum((1, 2)), rtol=1e-6)
  np.testing.assert_allclose(kept / whole, [0.4, 0.6], atol=0.03)
  np.testing.assert_allclose(found, merger(job), rtol=1e-5, atol=1e-6)


def test_dare_by_options_that_need_a_whole_tensor_is_not_cut(merger_of):
  def rescale(delta, kept, probability):
    return kept

  for options in ({"elect": by_mass}, {"rescale": rescale}):
    assert not is_piecewise(functools.partial(jlora.merging.dare, **options))
  assert is_piecewise(jlora.merging.dare)
  assert whole_sums_of(jlora.merging.dare) is None
  told = functools.partial(jlora.merging.dare, rescale=match_l1, lengths=1)
  assert whole_sums_of(told) is None
  merger, job = merger_of("dare")
  with pytest.raises(ValueError, match="w: its method needs no sums"):
    merger.measure(job, merger.pieces(job)[0])


@pytest.mark.parametrize("name", [*SLERPS, "linear", "task_arithmetic", "dare"])
def test_nan_of_a_model_is_an_error_in_pieces_and_in_the_whole(name, merger_of):
  merger, job = merger_of(name, nan=True)
  for make in (merger, lambda job: in_pieces(merger, job)):
    with pytest.raises(ValueError, match="^w of a: 1 of .* are NaN or infini"):
      make(job)


def test_a_result_is_not_the_memory_that_is_used_again(tmp_path):
  """Nor where a method returns an input as it is."""
  for name, value in (("a", 1.0), ("b", 2.0)):
    tensors = {key: np.full((64, 64), value * at, np.float32)
               for at, key in enumerate("wv", 1)}  # fmt: skip
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  models = {n: open_checkpoint(tmp_path / f"{n}.safetensors") for n in "ab"}

  def unchanged(stack, weights, base, *, key):
    return base

  merger = Merger(unchanged, models, None)
  jobs = [
    Job(name, (64, 64), np.dtype(np.float32),
        (InputTensor("b", TensorPart(name)),),
        InputTensor("a", TensorPart(name)), (("weights", (1.0,)),))
    for name in "wv"
  ]  # fmt: skip
  first, second = [merger(job) for job in jobs]
  assert (first == 1).all()
  assert (second == 2).all()


def test_thresholds_that_are_given_are_not_looked_for(tmp_path):
  for name, values in (("a", [0, 0, 0]), ("b", [1, 2, 3])):
    w = np.float32(values)
    write_safetensors(tmp_path / f"{name}.safetensors", {"w": w})
  models = {n: open_checkpoint(tmp_path / f"{n}.safetensors") for n in "ab"}
  job = Job(
    "w", (3,), np.dtype(np.float32), (InputTensor("b", TensorPart("w")),),
    InputTensor("a", TensorPart("w")),
    (("threshold", 2.0), ("weights", (1.0,))),
  )  # fmt: skip
  assert Merger(jlora.merging.ties, models, None)(job).tolist() == [0, 2, 3]
  given = functools.partial(jlora.merging.ties, threshold=3.0)
  job = job._replace(settings=(("weights", (1.0,)),))
  assert Merger(given, models, None)(job).tolist() == [0, 0, 3]
