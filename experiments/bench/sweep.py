# SPDX-License-Identifier: Apache-2.0
"""What does a sweep over ranks cost beside one rank, as ranks are nested?

  python -m experiments.bench.sweep

Takes under a minute on two cores. Expect at most 1.3 times one factorisation
with its figures at one rank.
"""

import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

import jlora
from experiments.bench.arrays import Row
from experiments.lib.data import pairs
from jlora.factoring import row_of, summarise

_SHAPE = flags.DEFINE_list("shape", ["2048", "5632"], "rows, columns")
_REPEATS = flags.DEFINE_integer("repeats", 2, "of each, taken in turn")

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


def measure_sweep(
  shape: tuple[int, int], ranks: tuple[int, ...], repeats: int
) -> Iterator[Row]:
  """Times a sweep over ranks, over the time of its largest rank alone.

  Args:
    shape: of the matrix, a NumPy array.
    ranks: of the sweep.
    repeats: of the whole; medians are told.

  Yields:
    Two rows: the factorisation and the figures at all ranks over the
    factorisation and the figures at the largest, and the same over the
    factorisation alone.

  Example:
    >>> rows = list(measure_sweep((64, 96), (4, 8), 1))
    >>> [row.unit for row in rows]
    ['x', 'x']
  """
  delta = pairs.change(shape, np.random.default_rng(0), pairs.Noise(0))
  times = np.array([_once(delta, ranks) for _ in range(repeats)])
  factoring, certifying, one, every = np.median(times, axis=0)
  single, sweep = factoring + certifying + one, factoring + certifying + every
  note = (
    f"{shape[0]} x {shape[1]}, ranks {ranks[0]} to {ranks[-1]}: factoring "
    f"{factoring:.2f} s, certificate of all ranks {certifying:.2f} s, figures "
    f"at one rank {one * 1e3:.2f} ms, at all {every * 1e3:.2f} ms"
  )
  goal = "<= 1.3"
  yield Row("sweep", "all ranks over one rank", sweep / single, "x", goal, note)
  what = "all ranks and figures over the factorisation alone"
  yield Row("sweep", what, sweep / factoring, "x", "", note)


def _once(delta: np.ndarray, ranks: tuple[int, ...]) -> list[float]:
  """Times factoring, the certificate, and figures at one rank and at all."""
  marks = [time.perf_counter()]
  factors = jlora.factoring.krylov(delta, ranks[-1])
  marks.append(time.perf_counter())
  certificate = jlora.factoring.certificate(
    delta, jlora.loras.from_factors(factors)
  )
  marks.append(time.perf_counter())
  for wanted in (ranks[-1:], ranks):
    found = summarise(
      certificate,
      np.asarray(factors.s),
      delta.shape,
      base_norm=1.0,
      noise_std=0.0,
      unchanged=0.0,
    )
    for rank in wanted:
      row_of({"shape": list(delta.shape), **found}, rank)
    marks.append(time.perf_counter())
  return np.diff(marks).tolist()


def main(argv: list[str]) -> None:
  """Prints the rows."""
  del argv
  rows, columns = map(int, _SHAPE.value)
  for row in measure_sweep((rows, columns), RANKS, _REPEATS.value):
    print(f"{row.part}: {row.what}: {row.value:.3f} {row.unit} {row.goal}")
    print(f"  {row.note}")


if __name__ == "__main__":
  app.run(main)
