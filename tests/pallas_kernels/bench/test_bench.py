# SPDX-License-Identifier: Apache-2.0
"""The bench adds up what the compiler says; no compiler is needed here."""

import json
import pickle

import jax
import numpy as np
import pytest

from pallas_kernels.aot.compiling import Compiled
from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import measurements, programs, shapes
from pallas_kernels.bench.programs import FORWARD, STEP, Sizes

SIZES = Sizes(64, 256, 128, 8)
TILE = "{1,0:T(8,128)(2,1)}"
TEXT = f"""HloModule jit_f, is_scheduled=true

ENTRY %main.1 (x: bf16[64,256], w: bf16[256,128]) -> bf16[64,128] {{
  %x = bf16[64,256]{TILE} parameter(0)
  %w = bf16[256,128]{TILE} parameter(1)
  ROOT %f = bf16[64,128]{TILE} fusion(%x, %w), kind=kOutput, calls=%fused
}}
"""
MOVED = 2 * (64 * 256 + 256 * 128 + 64 * 128)


@pytest.fixture
def compiler(monkeypatch):
  """A compiler that knows one program; what it is asked is kept."""
  asked = []

  def compile_apart(function, arguments, chip, *, profile=False, limit=0):
    asked.append((function, chip, profile))
    if chip == "v4":
      return Compiled("RESOURCE_EXHAUSTED: too much\nand more")
    cycles = {"f": 7} if profile else None
    return Compiled(None, 1.0, TEXT, (), 5, 9, cycles)

  monkeypatch.setattr(measurements, "compile_apart", compile_apart)
  measurements.measure_program.cache_clear()
  yield asked
  measurements.measure_program.cache_clear()


def test_a_row_says_what_the_schedule_says(compiler):
  row = measurements.measure_program("base", False, "v5e", SIZES)
  assert (row.moved, row.least, row.by) == (MOVED, MOVED, "memory")
  assert row.estimated == pytest.approx(MOVED / 819e9)
  assert (row.temporaries, row.code, row.cycles, row.vmem) == (5, 9, None, 0)
  assert compiler == [(programs.base, "v5e", False)]


def test_no_instruction_is_faster_than_its_bytes(compiler):
  row = measurements.measure_program("base", False, "v5e", SIZES, cycles=True)
  assert row.cycles == 7
  clock = 197e12 / (4 * 2 * 128 * 128)
  assert row.paced == pytest.approx(MOVED / 819e9 * clock)


def test_the_table_has_a_line_for_each_matrix_and_chip(
  compiler, capsys, tmp_path
):
  out = tmp_path / "rows.jsonl"
  bench.main(
    "--matrices SmolLM2 --regimes decode --chips v5e v4 "
    f"--programs base merging --out {out}".split()
  )
  printed = capsys.readouterr()
  lines = printed.out.splitlines()
  matrices = [m for m in shapes.MATRICES if "SmolLM2" in m.model]
  assert len(lines) == 2 + 2 * len(matrices)
  assert lines[2].startswith(
    "| SmolLM2-135M q, o | 576 x 576 | 64 | 16 | v5e | base / merging | 0.1 / "
  )
  assert "| refused / refused |" in lines[3]
  assert "base: RESOURCE_EXHAUSTED: too much" in printed.err
  assert {line.count("|") for line in lines} == {lines[0].count("|")}
  kept = [json.loads(line) for line in out.read_text().splitlines()]
  assert [row["name"] for row in kept[:2]] == ["base", "merging"]
  assert kept[0]["sizes"] == {"m": 64, "k": 576, "n": 576, "r": 16}


def test_a_step_has_a_line_of_its_own(compiler, capsys):
  only = "--matrices 70B --regimes training --chips v5e"
  bench.main([*only.split(), "--step"])
  lines = capsys.readouterr().out.splitlines()[2:]
  assert len(lines) == 2 * 3
  assert "| base / unfused / fused step |" in lines[1]


def test_goals_are_held_or_not(compiler, capsys):
  bench.main(["--goals", "--chips", "v5e"])
  lines = capsys.readouterr().out.splitlines()[2:]
  assert len(lines) == 6
  assert "1.000 <= 1.1" in lines[1]
  assert "1.000 > 0.9" in lines[2]


def test_a_goal_without_an_estimate_says_so():
  assert bench.verdict(None, 1.1) == "no estimate"


def test_rooflines_need_no_compiler(capsys):
  bench.main(["--rooflines", "--regimes", "training"])
  assert "| v5e | 8192 | 1395.3 | compute |" in capsys.readouterr().out


def test_times_are_ratios_of_neighbours():
  found = measurements.measure_cpu(SIZES, repeats=3)
  low, dense = 2 * 64 * 8 * (256 + 128), 2 * 64 * 256 * 128
  assert found.share == pytest.approx(1 + low / dense)
  assert found.allowed == pytest.approx(1.1 * found.share)
  assert found.ratio > 0
  assert found.base_ms > 0


@pytest.mark.parametrize("name", ["base", "unfused", "merging"])
def test_operations_are_those_xla_counts(name):
  arguments = programs.arguments(name, False, SIZES)
  cost = jax.jit(FORWARD[name]).lower(*arguments).cost_analysis()
  counted = programs.operations(name, False, SIZES)
  # XLA counts sums and roundings of the results as well.
  assert counted <= cost["flops"] <= counted * 1.1


def test_a_step_is_three_times_the_change_and_twice_the_base():
  m, k, n, r = SIZES
  arguments = programs.arguments("unfused", True, SIZES)
  cost = jax.jit(STEP["unfused"]).lower(*arguments).cost_analysis()
  counted = programs.operations("unfused", True, SIZES)
  assert counted == 4 * m * k * n + 6 * m * r * (k + n)
  assert counted <= cost["flops"] <= counted * 1.1


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("name", FORWARD)
def test_least_bytes_are_those_of_all_arrays(name, step):
  if step and name not in STEP:
    pytest.skip("no such program")
  arguments = programs.arguments(name, step, SIZES)
  size = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in arguments)
  m, k, n, r = SIZES
  low = r * (k + n)
  if not step:
    assert programs.least_bytes(name, step, SIZES) == size + 2 * m * n
    return
  # dy is among the arguments; w and the adapter are read again, x for da.
  more = k * n + m * n + m * k
  if name != "base":
    more += low + m * k + low
  assert programs.least_bytes(name, step, SIZES) == size + 2 * more


def test_children_can_be_told_of_every_program():
  for function in [*FORWARD.values(), *STEP.values()]:
    assert pickle.loads(pickle.dumps(function)) is function
