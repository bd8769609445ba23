# SPDX-License-Identifier: Apache-2.0
"""Measures the factorisers' errors over the optimum, and their speed."""

import functools
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
from experiments.lib.data import pairs
from jlora import commands
from jlora.factoring import cheapest


class Row(NamedTuple):
  """A row of the benchmark's table.

  Attributes:
    part: part of the benchmark.
    what: what was measured.
    value: as measured; None if it was not run.
    unit: "x" for a ratio within this run.
    goal: what it must reach, "" if there is no goal.
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
  """Measures errors over the Eckart-Young optimum, in float64.

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
  factors = (jlora.factoring.krylov, jlora.factoring.gram)
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
      if factor is jlora.factoring.krylov:
        note += f", through {cheapest((m, n), rank).__name__}"
      what = f"{factor.__name__}, {name}"
      yield Row("errors", what, error / best, "x", "<= 1.001", note)


def _synthetic(shape: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields matrices of a flat, a spiked and a power-law spectrum."""
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
  """Finds the real pair that experiments.finetune left in the cache."""
  for tuned in sorted(commands.cache_folder().glob("*-kjv-*")):
    base = tuned.with_name(tuned.name.split("-kjv-")[0])
    if base.exists():
      return str(base), str(tuned)
  return None


def _one_of_each_type(
  base: str, finetuned: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the delta of one changed matrix of each type, with its name."""
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
  """Times factoring, over the time of the bare products it needs.

  Args:
    shape: of the matrix.
    rank: triplets kept.
    repeats: of each, taken in turn.

  Yields:
    A row for NumPy arrays on the host, which runs use on CPUs: one with every
    pass made, one as krylov stops by itself, each over its own products; and
    one compiled, with every pass made.
  """
  rng = np.random.default_rng(0)
  delta = pairs.change(shape, rng, pairs.Noise(0))
  width = rank + 16
  block = rng.standard_normal((width, shape[0]), np.float32)
  full = functools.partial(
    jlora.factoring.krylov, rank=rank, oversample=16, passes=6
  )
  every = functools.partial(full, tol=0.0)
  taken = count_products(delta, full)
  cases = {
    "krylov over its bare products": (every, 11, False),
    "the same, free to stop early": (full, taken, False),
    "compiled, over its bare products": (every, 11, True),
  }
  for what, (factor, count, is_compiled) in cases.items():
    products = functools.partial(multiply, count)
    if is_compiled:
      run = _compiled(factor, products, delta, block)
    else:
      run = [lambda f=factor: f(delta), lambda f=products: f(delta, block)]
    ours, bare = _in_turn(run, repeats)
    note = (
      f"{shape[0]} x {shape[1]}, rank {rank}: {ours:.3f} s over {bare:.3f} s "
      f"of {count} products of width {width}, one thread of BLAS"
    )
    goal = "" if is_compiled else "<= 1.6"
    yield Row("factoring", what, ours / bare, "x", goal, note)


def multiply(count: int, delta: Any, block: Any) -> Any:
  """Multiplies a block by a matrix and its transpose in turn.

  Args:
    count: of products.
    delta: (m, n).
    block: (w, m).

  Returns:
    (w, n), or (w, m) if the count is even.

  Example:
    >>> multiply(2, np.full((1, 1), 3.0), np.ones((2, 1))).tolist()
    [[9.0], [9.0]]
  """
  for turn in range(count):
    block = block @ (delta.T if turn % 2 else delta)
  return block


def count_products(delta: np.ndarray, factor: Callable[..., Any]) -> int:
  """Counts the wide products that a factoriser makes with a NumPy array.

  Args:
    delta: (m, n).
    factor: one argument, the array.

  Returns:
    The count.

  Example:
    >>> count_products(np.eye(3), lambda x: (np.eye(3)[:2] @ x) @ x.T)
    2
  """

  class Counted(np.ndarray):
    """An array that counts the products where it is on the right."""

    made = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
      plain = [
        x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs
      ]
      if ufunc is np.matmul:
        Counted.made += 1
      return getattr(ufunc, method)(*plain, **options)

  factor(delta.view(Counted))
  return Counted.made


def _compiled(factor, products, delta, block):
  """Compiles both as functions without arguments."""
  delta, block = jnp.asarray(delta), jnp.asarray(block)
  with jax.default_matmul_precision("highest"):
    first = jax.jit(factor).lower(delta).compile()
    second = jax.jit(products).lower(delta, block).compile()
  return [
    lambda: jax.block_until_ready(first(delta)),
    lambda: jax.block_until_ready(second(delta, block)),
  ]


def _in_turn(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
  """Times functions in turns; returns the median seconds of each.

  The median is of the ratios to the last function within each turn.
  """
  times = []
  with threadpool_limits(1, user_api="blas"):
    for _ in range(repeats + 1):
      turn = []
      for run in functions:
        began = time.perf_counter()
        run()
        turn.append(time.perf_counter() - began)
      times.append(turn)
  seconds = np.array(times[1:])
  ratios = np.median(seconds / seconds[:, -1:], axis=0)
  return list(map(float, ratios * np.median(seconds[:, -1])))
