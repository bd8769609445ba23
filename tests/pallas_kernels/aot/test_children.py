# SPDX-License-Identifier: Apache-2.0
"""What a child reports, and that one without a compiler says so."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot.child import cycles_in
from pallas_kernels.aot.compiling import compile_apart
from pallas_kernels.aot.gpus import Resources, resources

PROFILE = """llo_profile {{
  hlo_op_name: "{name}"
  estimated_cycles: {cycles}
  region {{ estimated_cycles: 3 }}
}}
"""
REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_cycles_are_those_of_the_whole_instruction(tmp_path):
  for name, cycles in (("fusion.1", 100), ("lora_dot.1", 2000)):
    text = PROFILE.format(name=name, cycles=cycles)
    (tmp_path / f"{name}.textproto").write_text(text)
  (tmp_path / "empty.textproto").write_text("llo_profile {}")
  assert cycles_in(tmp_path) == {"fusion.1": 100, "lora_dot.1": 2000}


def test_no_profile_is_no_estimate(tmp_path):
  assert cycles_in(tmp_path) is None


def test_registers_and_spills_of_each_kernel():
  text = REPORT.format(name="f_mosaic_gpu_kernel", spilled=0)
  text += REPORT.format(name="g", spilled=24)
  assert resources(text) == {"f": Resources(168, 0), "g": Resources(168, 24)}
  assert resources("") == {}


def sine(x):
  return jnp.sin(x)


@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is not None,
  reason="the CUDA compiler is installed",
)
def test_without_a_compiler_the_answer_is_a_refusal():
  found = compile_apart(sine, [jax.ShapeDtypeStruct((8,), "float32")], "h100")
  assert found.refused is not None
  assert found.text == ""
