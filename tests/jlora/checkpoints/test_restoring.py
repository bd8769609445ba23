# SPDX-License-Identifier: Apache-2.0
"""Sharded checkpoints, written on one mesh and put back on another."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.restoring import restore, restore_loras
from jlora.checkpoints.safetensors import write_safetensors
from jlora.loras import Lora
from tests.helpers import orbax_writer

ROOT = pathlib.Path(__file__).parents[3]


def mesh_of(*shape, kind=AxisType.Auto):
  return jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)


def assert_same(found, shardings, whole):
  leaves = jax.tree.leaves
  for array, own, expected in zip(
    leaves(found), leaves(shardings), leaves(whole), strict=True
  ):
    assert array.sharding == own
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8), (2, 2)])
def test_what_one_mesh_wrote_lies_on_another(shape, kind, tmp_path):
  written = orbax_writer.places(mesh_of(4, 2))
  trees = orbax_writer.PARAMS, orbax_writer.LORAS
  for name, tree, own in zip(("params", "loras"), trees, written, strict=True):
    save_orbax(tmp_path / name, orbax_writer.put(tree, own))
  wanted = orbax_writer.places(mesh_of(*shape, kind=kind))
  params, loras = (open_checkpoint(tmp_path / n) for n in ("params", "loras"))
  assert_same(restore(params, wanted[0]), wanted[0], trees[0])
  assert_same(restore_loras(loras, wanted[1]), wanted[1], trees[1])


def test_processes_write_together_and_one_reads(tmp_path):
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "PYTHONPATH": str(ROOT),
  }
  started = [
    subprocess.Popen(
      [sys.executable, orbax_writer.__file__, str(port), "2", index, tmp_path],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in ("0", "1")
  ]
  said = [process.communicate(timeout=120)[1] for process in started]
  assert [process.returncode for process in started] == [0, 0], said
  places = orbax_writer.places(mesh_of(2, 2))
  params, loras = (open_checkpoint(tmp_path / n) for n in ("params", "loras"))
  assert_same(restore(params, places[0]), places[0], orbax_writer.PARAMS)
  assert_same(restore_loras(loras, places[1]), places[1], orbax_writer.LORAS)


def test_a_device_reads_its_own_rows_of_a_file(tmp_path):
  file = tmp_path / "x.safetensors"
  write_safetensors(file, {"w": np.arange(4096.0).reshape(64, 64)})
  own = jax.NamedSharding(mesh_of(8, 1), jax.P("x"))
  checkpoint = open_checkpoint(file)
  before, regions = checkpoint.bytes_read, []
  real = checkpoint.read

  def read(name, index):
    regions.append(index)
    return real(name, index)

  checkpoint.read = read
  restore(checkpoint, {"w": own})
  assert len(regions) == 8
  assert checkpoint.bytes_read - before == 4096 * 8


def test_without_shardings_all_comes_on_one_device(tmp_path):
  save_orbax(tmp_path / "c", orbax_writer.LORAS)
  found = restore_loras(open_checkpoint(tmp_path / "c"))
  assert found["layer/kernel"].a.devices() == {jax.devices()[0]}


def test_what_is_not_there_is_named(tmp_path):
  save_orbax(tmp_path / "c", {"w": np.ones(2)})
  checkpoint = open_checkpoint(tmp_path / "c")
  own = jax.NamedSharding(mesh_of(8, 1), jax.P())
  with pytest.raises(ValueError, match="lacks v; it has w"):
    restore(checkpoint, {"v": own})
  with pytest.raises(ValueError, match="Paths differ"):
    restore_loras(checkpoint)
  save_orbax(tmp_path / "d", orbax_writer.LORAS)
  with pytest.raises(ValueError, match="only in the shardings: q"):
    restore_loras(open_checkpoint(tmp_path / "d"), {"q": Lora(own, own, own)})
