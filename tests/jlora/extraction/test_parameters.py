# SPDX-License-Identifier: Apache-2.0
"""Eager arrays on a CPU: no program is compiled, and the bits of a run."""

import functools
import io
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora.checkpoints.safetensors import write_safetensors
from jlora.extraction.parameters import is_on_host
from jlora.factoring.factorisers import gram, krylov, svd
from jlora.loras import dense
from jlora.paths import matching

SHAPES = {
  "m.layers.0.q_proj.weight": (48, 40),
  "m.layers.0.up_proj.weight": (150, 40),
  "m.layers.0.down_proj.weight": (40, 150),
  "m.layers.0.mlp.experts.gate_up_proj": (3, 24, 40),
  "m.embed_tokens.weight": (90, 40),
}


def sides(dtype, like=np.asarray):
  """A base and a finetune of a few matrices, under Hugging Face's names."""
  rng = np.random.default_rng(0)
  base, finetuned = {}, {}
  for path, shape in SHAPES.items():
    base[path] = rng.normal(size=shape).astype(dtype)
    change = 0.1 * rng.normal(size=shape)
    finetuned[path] = (base[path].astype(float) + change).astype(dtype)
  return jax.tree.map(like, (base, finetuned))


def compiled(caplog, run):
  """How many programs a call compiles."""
  caplog.clear()
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    run()
  return sum("Compiling" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("factor", [krylov, gram, svd])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_bits_are_those_of_a_run_from_disk_to_disk(tmp_path, dtype, factor):
  base, finetuned = sides(dtype)
  write_safetensors(tmp_path / "base.safetensors", base)
  write_safetensors(tmp_path / "ft.safetensors", finetuned)
  files = [tmp_path / f"{side}.safetensors" for side in ("base", "ft")]
  key = jax.random.key(3)
  jlora.extract_checkpoint(
    *files, tmp_path / "out", rank=6, factor=factor, key=key,
    select=matching(exclude=".*experts.*"), log=io.StringIO(),
  )  # fmt: skip
  like = jlora.open_checkpoint(files[0]).spec
  theirs = jlora.load_peft(tmp_path / "out", like=like).loras
  assert len(theirs) == 4
  trees = jax.tree.map(jnp.asarray, (base, finetuned))
  ours = jlora.extract(*trees, rank=6, factor=factor, key=key)
  for path, lora in theirs.items():
    np.testing.assert_array_equal(ours[path].a, lora.a)
    np.testing.assert_array_equal(ours[path].b, lora.b)
    assert isinstance(ours[path].a, jax.Array)
  # Of open checkpoints and of NumPy arrays alike.
  for pair in ((base, finetuned), map(jlora.open_checkpoint, files)):
    again = jlora.extract(*pair, rank=6, factor=factor, key=key)
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_nothing_is_compiled_for_eager_arrays_on_a_cpu(caplog):
  pair = sides(np.float32, jnp.asarray)
  run = functools.partial(jlora.extract, *pair, rank=5, factor=krylov)
  assert compiled(caplog, run) == 0
  assert compiled(caplog, functools.partial(run, shifts=True)) == 0
  jitted = jax.jit(functools.partial(jlora.extract, rank=5))
  assert compiled(caplog, lambda: jitted(*pair)) > 0


@pytest.mark.parametrize("factor", [krylov, gram, svd])
def test_host_and_compiled_agree(factor):
  pair = sides(np.float32, jnp.asarray)
  run = functools.partial(jlora.extract, rank=40, factor=factor)
  with pytest.warns(UserWarning, match="hold more numbers"):
    eager = run(*pair)
  with pytest.warns(UserWarning, match="hold more numbers"):
    traced = jax.jit(run)(*pair)
  assert jax.tree.structure(eager) == jax.tree.structure(traced)
  for path, lora in eager.items():
    np.testing.assert_allclose(dense(lora), dense(traced[path]), atol=1e-4)


def test_what_is_on_the_host():
  here = jnp.ones(2)
  one = jax.make_mesh((1,), ("x",))
  eight = jax.make_mesh((8,), ("x",))
  cut = jax.device_put(jnp.ones(8), NamedSharding(eight, PartitionSpec("x")))
  on_one = jax.device_put(here, NamedSharding(one, PartitionSpec()))
  assert is_on_host(here, np.ones(2), None, jax.random.key(0))
  assert not is_on_host(here, cut)
  assert not is_on_host(on_one)
  assert not is_on_host(jax.ShapeDtypeStruct((2,), np.float32))
  seen = []
  jax.jit(lambda x: seen.append(is_on_host(here, x)))(here)
  assert seen == [False]


def test_factors_lie_where_the_parameters_are_kept():
  device = jax.devices()[3]
  pair = jax.device_put(sides(np.float32), device)
  loras = jlora.extract(*pair, rank=2)
  assert all(x.devices() == {device} for x in jax.tree.leaves(loras))


def test_a_traced_key_is_no_obstacle():
  """Parameters that a jitted function closes over are concrete."""
  base, finetuned = sides(np.float32, jnp.asarray)
  run = lambda key: jlora.extract(base, finetuned, rank=2, key=key)  # noqa: E731
  found, wanted = jax.jit(run)(jax.random.key(1)), run(jax.random.key(1))
  for path, lora in found.items():
    np.testing.assert_allclose(
      np.linalg.norm(dense(lora)),
      np.linalg.norm(dense(wanted[path])),
      rtol=0.02,
    )
