# SPDX-License-Identifier: Apache-2.0
"""Bytes are read off schedules small enough to be counted by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.aot.pipelines import Pipeline
from pallas_kernels.aot.schedules import arrays, hbm_bytes, moves

TILE = "{1,0:T(8,128)(2,1)}"
VMEM = "{1,0:T(8,128)(2,1)S(1)}"


def schedule(*lines):
  body = "\n".join(f"  {line}" for line in lines)
  return (
    "HloModule jit_f, is_scheduled=true, entry_computation_layout={...}\n\n"
    "%fused (p: bf16[8,128]) -> bf16[8,128] {\n"
    f"  ROOT %inside = bf16[8,128]{TILE} negate(%p)\n}}\n\n"
    f"ENTRY %main.1 (x: bf16[64,256]) -> bf16[64,256] {{\n{body}\n}}\n"
  )


def parameter(name, shape="64,256", layout=TILE):
  return f"%{name} = bf16[{shape}]{layout} parameter(0)"


X = 64 * 256 * 2


@pytest.mark.parametrize(
  ("text", "nbytes", "in_hbm"),
  [
    ("bf16[64,256]{1,0:T(8,128)(2,1)}", X, True),
    ("bf16[64,256]{1,0:T(8,128)(2,1)S(1)}", X, False),
    # 16 columns fill a tile of 128 lanes, 3 rows one of 8 sublanes.
    ("bf16[64,16]{1,0:T(8,128)(2,1)}", 64 * 128 * 2, True),
    ("f32[3,128]{1,0:T(8,128)}", 8 * 128 * 4, True),
    ("f32[3,128]{1,0:T(4,128)}", 4 * 128 * 4, True),
    # Column-major: the tile's last side lies along axis 0.
    ("bf16[8192,16]{0,1:T(8,128)(2,1)}", 8192 * 16 * 2, True),
    ("f32[100]{0:T(128)}", 128 * 4, True),
    ("f32[5,3,128]{2,1,0:T(8,128)}", 5 * 8 * 128 * 4, True),
    ("s4[64,256]{1,0}", 64 * 256 // 2, True),
    ("f32[]{:S(2)}", 4, False),
    ("u32[]", 4, True),
  ],
)
def test_an_array_fills_its_tiles(text, nbytes, in_hbm):
  (found,) = arrays(text)
  assert (found.nbytes, found.in_hbm) == (nbytes, in_hbm)


@given(
  st.lists(st.integers(1, 300), min_size=2, max_size=4),
  st.sampled_from([(8, 128), (2, 128), (16, 128)]),
)
def test_padding_adds_less_than_a_tile_a_side(shape, tile):
  order = ",".join(str(i) for i in reversed(range(len(shape))))
  dims, sides = (",".join(map(str, t)) for t in (shape, tile))
  (found,) = arrays(f"f32[{dims}]{{{order}:T({sides})}}")
  rows, columns = (found.shape[-2:][i] for i in (0, 1))
  padded = found.nbytes // 4 // math.prod(shape[:-2])
  assert padded >= rows * columns
  assert padded < (rows + tile[0]) * (columns + tile[1])
  assert padded % (tile[0] * tile[1]) == 0


def test_an_unknown_element_type_is_an_error():
  with pytest.raises(ValueError, match="f3e1m1"):
    arrays("f3e1m1[8]")


def test_a_fusion_reads_its_operands_and_writes_its_result():
  text = schedule(
    parameter("x"),
    parameter("w", "256,128"),
    f"ROOT %f = bf16[64,128]{TILE} fusion(%x, %w), kind=kOutput, calls=%fused",
  )
  (move,) = moves(text)
  assert move == ("f", "fusion", X + 256 * 128 * 2, 64 * 128 * 2)


def test_on_chip_arrays_cost_nothing():
  text = schedule(
    parameter("x", layout=VMEM),
    f"%f = bf16[64,256]{VMEM} fusion(%x), kind=kLoop, calls=%fused",
    f"ROOT %g = bf16[64,256]{TILE} fusion(%f), kind=kLoop, calls=%fused",
  )
  assert moves(text) == [("g", "fusion", 0, X)]


def test_a_prefetch_counts_once_where_it_starts():
  text = schedule(
    parameter("x"),
    f"%s = (bf16[64,256]{VMEM}, bf16[64,256]{TILE}, u32[]{{:S(2)}}) "
    "copy-start(%x), cross_program_prefetch_index=0",
    f"%d = bf16[64,256]{VMEM} copy-done(%s)",
    f"ROOT %f = bf16[64,256]{TILE} fusion(%d), kind=kLoop, calls=%fused",
  )
  assert moves(text) == [("s", "copy-start", X, 0), ("f", "fusion", 0, X)]


def test_a_write_back_counts_as_written():
  text = schedule(
    parameter("x", layout=VMEM),
    f"%s = (bf16[64,256]{TILE}, bf16[64,256]{VMEM}, u32[]{{:S(2)}}) "
    "copy-start(%x)",
    f"ROOT %d = bf16[64,256]{TILE} copy-done(%s)",
  )
  assert moves(text) == [("s", "copy-start", 0, X)]


def test_a_slice_counts_the_slice_alone():
  text = schedule(
    parameter("x"),
    f"%s = ((bf16[64,256]{TILE}), bf16[16,256]{VMEM}, s32[]{{:S(2)}}) "
    "slice-start(%x), slice={[0:16], [0:256]}",
    f"ROOT %d = bf16[16,256]{VMEM} slice-done(%s)",
  )
  assert moves(text) == [("s", "slice-start", X // 4, 0)]


def test_names_for_the_same_bytes_cost_nothing():
  text = schedule(
    parameter("x"),
    f"%b = bf16[256,64]{TILE} bitcast(%x)",
    f"%t = (bf16[256,64]{TILE}) tuple(%b)",
    f"%g = bf16[256,64]{TILE} get-tuple-element(%t), index=0",
    f"%c = bf16[64,256]{VMEM} custom-call(%g), "
    'custom_call_target="ConcatBitcast"',
    f"ROOT %r = bf16[256,64]{TILE} bitcast(%g)",
  )
  assert moves(text) == []


def call(name="lora_dot.1", layout=TILE):
  return (
    f"%{name} = bf16[64,128]{TILE} custom-call(%x, %w), "
    'custom_call_target="tpu_custom_call", metadata={op_name="f(x)/y"}'
  )


def pipeline(reads=(1.0, 4.0)):
  shapes = ((64, 256), (256, 128))
  return Pipeline("lora_dot", shapes, ((64, 128),), reads, (1.0,), 0, None)


def test_a_kernel_counts_what_its_pipeline_fetches():
  text = schedule(parameter("x"), parameter("w", "256,128"), call())
  (move,) = moves(text, [pipeline()])
  assert (move.read, move.written) == (X + 4 * 256 * 128 * 2, 64 * 128 * 2)
  assert hbm_bytes(text, [pipeline()]) == move.read + move.written


def test_a_kernels_operand_on_the_chip_costs_nothing():
  text = schedule(
    parameter("x"), parameter("w", "256,128", layout=VMEM), call()
  )
  (move,) = moves(text, [pipeline()])
  assert move.read == X


def test_two_kernels_of_one_shape_take_a_pipeline_each():
  text = schedule(
    parameter("x"), parameter("w", "256,128"), call("a"), call("b")
  )
  both = moves(text, [pipeline(), pipeline((2.0, 1.0))])
  assert sum(m.read for m in both) == 3 * X + 5 * 256 * 128 * 2


def test_a_kernel_without_its_pipeline_is_an_error():
  text = schedule(parameter("x"), parameter("w", "256,128"), call())
  with pytest.raises(ValueError, match=r"%lora_dot\.1.*whose pipeline"):
    moves(text)


@pytest.mark.parametrize("operation", ["while", "conditional", "call"])
def test_what_may_run_any_number_of_times_is_an_error(operation):
  text = schedule(
    parameter("x"), f"ROOT %l = bf16[64,256]{TILE} {operation}(%x), body=%b"
  )
  with pytest.raises(ValueError, match=f"%l is a {operation}"):
    moves(text)


def test_a_program_that_is_not_scheduled_is_an_error():
  with pytest.raises(ValueError, match="not scheduled"):
    moves("HloModule jit_f\n\nENTRY %main () -> f32[] {\n}\n")
