# SPDX-License-Identifier: Apache-2.0
"""The card's bench: what of it needs no card."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bench import gpu as bench_gpu
from pallas_kernels.bench import timings
from pallas_kernels.bench.programs import Sizes


def test_without_a_card_it_says_so_and_stops():
  with pytest.raises(SystemExit, match="no CUDA card here, jax sees cpu"):
    bench_gpu.main(["--tables", "decode"])


def test_a_function_under_two_names_is_compiled_once_and_timed_twice(
  monkeypatch,
):
  monkeypatch.setattr(timings, "_TURNS", 3)
  traced = []

  def f(x):
    traced.append(1)
    return x + 1

  sets = [(jnp.ones(4),), (jnp.zeros(4),)]
  found = timings.time_programs(
    {"f": f, "again": f}, {"f": sets, "again": sets}
  )
  assert len(traced) == 1
  for time in found.values():
    assert 0 < time.least <= time.median <= time.most


def test_arguments_are_larger_than_the_cache_and_differ(monkeypatch):
  monkeypatch.setattr(bench_gpu, "_CACHE", 1e6)
  shapes = [jax.ShapeDtypeStruct((50, 1000), jnp.float32)]
  sets = bench_gpu.drawn(shapes)
  assert len(sets) == 5
  assert not bool(jnp.all(sets[0][0] == sets[1][0]))
  assert abs(float(sets[0][0].std()) - 1000**-0.5) < 1e-3


def test_every_program_of_a_line_gets_its_arguments(monkeypatch):
  monkeypatch.setattr(timings, "_TURNS", 1)
  monkeypatch.setattr(timings, "_SECONDS", 1e-4)
  monkeypatch.setattr(bench_gpu, "_CACHE", 1.0)
  programs = {
    "base": bench_gpu.base_step,
    "three": bench_gpu.unfused_step,
    "base again": bench_gpu.base_step,
  }
  line = bench_gpu._compare(Sizes(8, 16, 24, 2), True, programs, "three")
  assert line[:2] == ["8 x 16 x 24", "2"]
