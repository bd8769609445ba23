# SPDX-License-Identifier: Apache-2.0
"""Exchanges read from program texts: of all backends' forms, and of CPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.lib.machines.collectives import (
  collective_bytes,
  find_collectives,
  largest_gathered,
)

# As XLA writes them for TPUs, GPUs and CPUs: (instruction, op, entries, bytes).
FORMS = {
  "plain": (
    "%g.1 = f32[8,4]{1,0} all-gather(f32[2,4]{1,0} %x), dimensions={0}",
    ("all-gather", 32, 128),
  ),
  "tiled": (
    "ROOT %s = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), "
    "replica_groups=[2,4]<=[8], to_apply=%add",
    ("all-reduce", 2048, 4096),
  ),
  "start": (
    "%s = (f32[2,4]{1,0:T(4,128)}, f32[8,4]{1,0:T(4,128)}) "
    "all-gather-start(%x), dimensions={0}",
    ("all-gather", 32, 128),
  ),
  "start of two": (
    "%s = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0})) "
    "all-gather-start(%x, %y), dimensions={0}",
    ("all-gather", 12, 80),
  ),
  "sum of two": (
    "%s = (f32[2]{0}, f32[3]{0}) all-reduce-start(%x, %y), to_apply=%add",
    ("all-reduce", 3, 20),
  ),
  "permute": (
    "%p = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) "
    "collective-permute-start(%x), source_target_pairs={{0,1}}",
    ("collective-permute", 4, 16),
  ),
  "several results": (
    "%a = (s8[2,3]{1,0}, s8[2,3]{1,0}) all-to-all(%x, %y)",
    ("all-to-all", 6, 12),
  ),
  "scattered sum": (
    "%r = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, "
    "dimensions={0}",
    ("reduce-scatter", 4, 64),
  ),
  "scattered over a shape": (
    "%r = f32[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]",
    ("reduce-scatter", 4, 64),
  ),
  "scattered over a mesh": (
    "%r = f32[4]{0} reduce-scatter(%x), "
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}",
    ("reduce-scatter", 4, 64),
  ),
  "less than bytes": (
    "%g = (s4[5]{0}, pred[3]{0}) all-gather(%x, %y)",
    ("all-gather", 5, 6),
  ),
  "bounded": ("%g = f32[<=8,2] all-gather(%x)", ("all-gather", 16, 64)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
  line, wanted = FORMS[form]
  (found,) = find_collectives(f"HloModule m\n\n  {line}\n")
  assert (found.op, found.entries, found.bytes) == wanted


def test_what_only_names_an_exchange_is_none():
  text = """
  %d = f32[8] all-gather-done(%all-gather-start.1)
  %f = f32[8] fusion(%all-gather.1), kind=kLoop, calls=%all-gather-fusion
  """
  assert not find_collectives(text)
  assert largest_gathered(text) == 0


PROGRAM = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}

%more (p: (s32[], f32[8])) -> pred[] {
  ROOT %q = pred[] all-reduce(%y), to_apply=%or
}

%large (p: f32[8]) -> f32[64] {
  ROOT %g = f32[64]{0} all-gather(%p), dimensions={0}
}

%small (p: f32[8]) -> f32[64] {
  ROOT %g = f32[16]{0} all-to-all(%p), dimensions={0}
}

%wrapped (p: f32[8]) -> f32[2] {
  ROOT %g = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}
}

ENTRY %main.5_spmd (p: f32[8]) -> f32[64] {
  %w = (s32[], f32[8]) while(%t), condition=%more, body=%turn%TRIPS%
  %c = f32[64]{0} conditional(%i, %p, %p), branch_computations={%small, %large}
  %a = ((f32[8]), f32[2], s32[]) async-start(%p), calls=%wrapped
  ROOT %d = f32[64]{0} conditional(%b, %p, %p), true_computation=%small, \
false_computation=%small
}
"""


@pytest.mark.parametrize(
  ("trips", "turns"),
  [("", 3), (', backend_config={"known_trip_count":{"n":"5"}}', 5)],
)
def test_loops_and_branches_are_counted(trips, turns):
  program = PROGRAM.replace("%TRIPS%", trips)
  assert collective_bytes(program, trips=3) == {
    "all-gather": 256,  # the larger of two branches
    "all-reduce": turns * (32 + 1),
    "all-to-all": 64,
    "reduce-scatter": 32,
  }
  assert largest_gathered(program) == 64
  assert len(find_collectives(program)) == 5


def compiled(function, spec, out=None):
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  own = NamedSharding(mesh, PartitionSpec(*spec))
  x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=own)
  out = None if out is None else NamedSharding(mesh, PartitionSpec(*out))
  return jax.jit(function, out_shardings=out).lower(x).compile().as_text()


def test_programs_of_cpus():
  """A whole copy of an array is seen, a sum of parts is none."""
  gather = compiled(lambda x: x + 1.0, ("x",), ())
  assert largest_gathered(gather) == 128
  assert collective_bytes(gather) == {"all-gather": 512}
  gram = compiled(lambda x: x.T @ x, ("x",), ())
  assert largest_gathered(gram) == 0
  assert collective_bytes(gram) == {"all-reduce": 256}


def test_a_loop_of_a_real_program():
  def step(_, x):
    return x - x.mean(axis=0, keepdims=True)

  text = compiled(lambda x: jax.lax.fori_loop(0, 6, step, x), ("x",))
  assert collective_bytes(text) == {"all-reduce": 6 * 32}


def test_a_chain_of_pieces_is_one_exchange():
  piece = (
    "%{} = f32[8,4]{{1,0}} all-gather(%x), channel_id={}, "
    'frontend_attributes={{chain_id="3"}}'
  )
  lines = [piece.format("g.1", 25), piece.format("g.2", 25)]
  assert len(find_collectives("\n".join(lines))) == 1
  lines.append(piece.format("g.3", 26))
  assert len(find_collectives("\n".join(lines))) == 2


def test_a_loop_that_counts_its_turns_is_known_by_its_condition():
  text = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = f32[4]{0} all-reduce(%x), to_apply=%add
}
%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}
%asked (p: (pred[], f32[4])) -> pred[] {
  ROOT %not = pred[] not(%p)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  ROOT %v = (pred[], f32[4]) while(%t), condition=%asked, body=%body
}"""
  assert collective_bytes(text, trips=5) == {"all-reduce": (3 + 5) * 16}
