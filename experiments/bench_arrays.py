# SPDX-License-Identifier: Apache-2.0
"""The factorisers against the optimum, and against the products they need."""

import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg.cython_lapack  # noqa: F401  whose threads are limited below
from threadpoolctl import threadpool_limits

import jlora
from experiments import pairs, smollm2
from jlora.factoring import cheapest


class Row(NamedTuple):
  """A line of the benchmark's table.

  Attributes:
    part: of the benchmark.
    what: was measured.
    value: as measured; None where it was not run.
    unit: "x" for a ratio within this run.
    goal: what it must reach, "" if it is only told.
    note: how it was measured.
  """

  part: str
  what: str
  value: float | None
  unit: str
  goal: str = ""
  note: str = ""


def measure_errors(
  shape: tuple[int, int], rank: int, real: tuple[str, str] | None
) -> Iterator[Row]:
  """Errors over the Eckart-Young optimum, from float64 singular values.

  Args:
    shape: of the synthetic matrices.
    rank: triplets kept.
    real: base and finetuned checkpoint, of which one matrix of each type is
      taken; None looks for the cached SmolLM2 pair.

  Yields:
    A row per matrix and factoriser.
  """
  deltas = dict(_synthetic(shape))
  real = real or _cached_pair()
  if real:
    deltas.update(_one_of_each_type(*real))
  factors = (jlora.krylov, jlora.gram)
  compiled = {f: jax.jit(f, static_argnums=1) for f in factors}
  for name, delta in deltas.items():
    m, n = delta.shape
    sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    best = float(np.linalg.norm(sigma[rank:]))
    for factor in factors:
      found = compiled[factor](jnp.asarray(delta), rank)
      u, s, vt = (np.asarray(part, np.float64) for part in found)
      error = float(np.linalg.norm(delta - (u * s) @ vt))
      note = f"{m} x {n}, rank {rank}"
      if factor is jlora.krylov:
        note += f", through {cheapest((m, n), rank).__name__}"
      what = f"{factor.__name__}, {name}"
      yield Row("errors", what, error / best, "x", "<= 1.001", note)


def _synthetic(shape: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
  """Matrices of a flat, a spiked and a power-law spectrum."""
  rng = np.random.default_rng(0)
  flat = rng.standard_normal(shape, np.float32)
  yield "flat", flat
  left, right = (
    np.linalg.qr(rng.standard_normal((side, min(shape)), np.float32))[0]
    for side in shape
  )
  spikes = np.linspace(4.0, 1.1, min(32, *shape)) * sum(np.sqrt(shape))
  low_rank = (left[:, : spikes.size] * spikes) @ right[:, : spikes.size].T
  yield "spiked", (flat + low_rank).astype(np.float32)
  sigma = np.arange(1, min(shape) + 1, dtype=np.float32) ** -0.5
  yield "power law", (left * sigma) @ right.T


def _cached_pair() -> tuple[str, str] | None:
  """The real pair where experiments.finetune has left it."""
  for tuned in sorted(smollm2.cache_folder().glob("*-kjv-*")):
    base = tuned.with_name(tuned.name.split("-kjv-")[0])
    if base.exists():
      return str(base), str(tuned)
  return None


def _one_of_each_type(
  base: str, finetuned: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Deltas of one changed matrix of each type, by the type's name."""
  left, right = map(jlora.open_checkpoint, (base, finetuned))
  label, seen = pathlib.Path(finetuned).name, set()
  for name, spec in left.spec.items():
    kind = re.sub(r"\d+", "*", name)
    if len(spec.shape) != 2 or kind in seen or name not in right.spec:
      continue
    delta = right[name].astype(np.float32) - left[name].astype(np.float32)
    if delta.any():
      seen.add(kind)
      yield f"{name} of {label}", delta


def measure_factoring(
  shape: tuple[int, int], rank: int, repeats: int
) -> Iterator[Row]:
  """Factoring time over the time of the bare products it needs.

  Args:
    shape: of the matrix.
    rank: triplets kept.
    repeats: of each, taken in turn.

  Yields:
    A row with every pass made and one with krylov's own stopping.
  """
  oversample, passes = 16, 6
  rng = np.random.default_rng(0)
  delta = jnp.asarray(pairs.change(shape, rng, pairs.Noise(0)))
  block = jnp.asarray(
    rng.standard_normal((rank + oversample, shape[0]), np.float32)
  )

  def products(delta, block):
    for _ in range(passes - 1):
      block = jnp.einsum("bn,mn->bm", block @ delta, delta)
    return block @ delta

  def every_pass(delta, block):
    del block
    options = {"oversample": oversample, "passes": passes, "tol": 0.0}
    return jlora.krylov(delta, rank, jax.random.key(0), **options)

  def as_used(delta, block):
    del block
    return jlora.krylov(delta, rank, jax.random.key(0))

  bare, full, used = _in_turn(
    [products, every_pass, as_used], (delta, block), repeats
  )
  note = (
    f"{shape[0]} x {shape[1]}, rank {rank}: {full:.3f} s over {bare:.3f} s of "
    f"{2 * passes - 1} products of width {rank + oversample}"
  )
  what = "krylov over its bare products"
  yield Row("factoring", what, full / bare, "x", "<= 1.6", note)
  note = f"{used:.3f} s over the same {2 * passes - 1} products"
  yield Row(
    "factoring", "the same, free to stop early", used / bare, "x", "", note
  )


def _in_turn(
  functions: list[Callable[..., Any]], args: tuple[jax.Array, ...], repeats: int
) -> list[float]:
  """Median seconds of each compiled function, in proportion to the first's.

  They take turns, and it is the ratio within a turn whose median is taken.
  """
  with threadpool_limits(1, user_api="blas"):
    with jax.default_matmul_precision("highest"):
      compiled = [jax.jit(f).lower(*args).compile() for f in functions]
    times = []
    for _ in range(repeats + 1):
      turn = []
      for run in compiled:
        began = time.perf_counter()
        jax.block_until_ready(run(*args))
        turn.append(time.perf_counter() - began)
      times.append(turn)
  seconds = np.array(times[1:])
  ratios = np.median(seconds / seconds[:, :1], axis=0)
  return list(map(float, ratios * np.median(seconds[:, 0])))
