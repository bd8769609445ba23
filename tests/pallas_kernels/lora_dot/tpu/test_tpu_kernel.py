# SPDX-License-Identifier: Apache-2.0
"""The kernel in the TPU interpreter, and whether that would see a mistake.

The interpreter fills memory with NaN, runs parallel coordinates in random
order, and watches for races and for blocks that are visited again. Each mistake
below is planted into the kernel's own source.
"""

import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lora_dot import Scaled
from pallas_kernels.lora_dot.quantised import quantise_nf4
from pallas_kernels.lora_dot.tpu import block, kernel
from pallas_kernels.lora_dot.tpu.tilings import MIB, Tiling
from tests.pallas_kernels.lora_dot.products import Case, error, operands, truth

STREAMED = Tiling(128, 128, 128, MIB)
RESIDENT = Tiling(128, 128, 128, 4 * MIB, resident=True)
RAGGED = Case((136,), 150, 140, 3)
EVEN = Case((136,), 128, 256, 3)
TALL = Case((500,), 128, 256, 3)
SEEDS = (0, 1, 2)


def interpreter(seed):
  return pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", random_seed=seed
  )


def run(lora_matmul, case, tiling, interpret, transpose_w=False):
  """(relative error of y and u, whether a race was seen)."""
  (x, w, a, b, _), _ = operands(case, jnp.float32)
  gate = jax.random.normal(jax.random.key(0), (case.r, case.lead[0]))
  y, u = lora_matmul(
    *(x, w.T if transpose_w else w, a, b, gate),
    transpose_w=transpose_w,
    tiling=tiling,
    interpret=interpret,
    return_u=True,
  )
  wanted = truth((x, w, a, b, gate.T), None, False)["value"]
  off = error(y, wanted) + error(u, truth_of_u(x, a))
  races = interpret_pallas_call.races
  return off, bool(interpret is not True and races.races_found)


def truth_of_u(x, a):
  return np.asarray(a, np.float64) @ np.asarray(x, np.float64).T


@pytest.mark.parametrize(
  ("case", "tiling", "transpose_w"),
  [
    (RAGGED, STREAMED, True),
    (EVEN, RESIDENT, False),
  ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_right_and_without_races(case, tiling, transpose_w, seed):
  off, raced = run(
    kernel.lora_matmul, case, tiling, interpreter(seed), transpose_w
  )
  assert off < 2e-6
  assert not raced


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_and_a_known_u(seed):
  (x, w, a, b, _), _ = operands(RAGGED, jnp.float32)
  w = Scaled(jnp.round(w * 20).astype(jnp.int8), jnp.full((RAGGED.k, 1), 0.05))
  y, u = kernel.lora_matmul(
    *(x, w, None, b, None),
    transpose_w=False,
    tiling=STREAMED,
    interpret=interpreter(seed),
    u=jnp.asarray(truth_of_u(x, a), jnp.float32),
  )
  assert u is None
  assert error(y, truth((x, w, a, b, None), None, False)["value"]) < 2e-6
  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("seed", SEEDS)
def test_four_bits_that_stay(seed):
  (x, w, a, b, _), _ = operands(TALL, jnp.float32)
  w = quantise_nf4(w)
  y, _ = kernel.lora_matmul(
    *(x, w, a, b, None),
    transpose_w=False,
    tiling=RESIDENT,
    interpret=interpreter(seed),
  )
  assert error(y, truth((x, w, a, b, None), None, False)["value"]) < 2e-6
  assert not interpret_pallas_call.races.races_found


# what is wrong: (file, source, in its place, case, tiling, seen by plain mode)
MISTAKES = {
  "accumulator never zeroed": (
    block,
    "jnp.where(k == 0, 0.0, acc[...])",
    "acc[...]",
    *(RAGGED, STREAMED, True),
  ),
  "u never zeroed": (
    block,
    "jnp.where(k == 0, 0.0, u[...])",
    "u[...]",
    *(RAGGED, STREAMED, True),
  ),
  "padding of the edge summed": (
    block,
    "if not s.depth:",
    "if True:",
    *(RAGGED, STREAMED, True),
  ),
  "u carried over a parallel axis": (
    kernel,
    '(rows, "arbitrary", "arbitrary")',
    '(rows, "parallel", "arbitrary")',
    *(RAGGED, STREAMED, False),
  ),
  "w carried over a parallel axis": (
    kernel,
    '"arbitrary" if s.resident else "parallel"',
    '"parallel"',
    *(TALL, RESIDENT, False),
  ),
  "w read before it arrives": (
    block,
    "fetch(j).wait()",
    "pass",
    *(EVEN, RESIDENT, False),
  ),
  "w fetched from beyond its end": (
    block,
    "pl.multiple_of(c * bn, bn)",
    "pl.multiple_of(c * bn + bn, bn)",
    *(EVEN, RESIDENT, True),
  ),
  "blocks of y visited again later": (
    kernel,
    '"y": pl.BlockSpec((bm, bn), lambda i, j, k: (i, j))',
    '"y": pl.BlockSpec((bm, bn), lambda i, j, k: (0, j))',
    *(RAGGED, STREAMED, True),
  ),
}


def planted(module, old, new, monkeypatch):
  """lora_matmul with one piece of its source replaced."""
  source = inspect.getsource(module)
  assert source.count(old) == 1
  changed = types.ModuleType(module.__name__)
  changed.__file__ = module.__file__
  monkeypatch.setitem(sys.modules, module.__name__, changed)
  exec(
    compile(source.replace(old, new), module.__file__, "exec"), vars(changed)
  )
  if module is kernel:
    return changed.lora_matmul
  monkeypatch.setattr(kernel, "lora_block", changed.lora_block)
  return kernel.lora_matmul


def seen(lora_matmul, case, tiling, interpret):
  """Whether a run goes wrong: another number, NaN, a race or an exception."""
  try:
    off, raced = run(lora_matmul, case, tiling, interpret)
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    return True
  return raced or not off < 2e-6


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
  module, old, new, case, tiling, plainly = MISTAKES[mistake]
  lora_matmul = planted(module, old, new, monkeypatch)
  assert any(
    seen(lora_matmul, case, tiling, interpreter(seed)) for seed in SEEDS
  )
  assert seen(lora_matmul, case, tiling, True) == plainly
