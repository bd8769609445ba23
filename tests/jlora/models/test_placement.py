# SPDX-License-Identifier: Apache-2.0
"""Parameters on 8 virtual devices: where they lie, and what was read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora import models
from jlora.checkpoints import checkpoint
from jlora.paths import flatten
from tests.helpers import tiny_models

CASES = {
  "llama-biases": {},
  "mixtral": {"save_original_format": False},
  "gpt2": {},
}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit])
def mesh(request):
  return jax.make_mesh(
    (2, 4), ("data", "model"), axis_types=(request.param,) * 2
  )


def _mesh():
  return jax.make_mesh((2, 4), ("data", "model"))


@pytest.mark.parametrize("case", CASES)
def test_shards_are_read_one_by_one(tmp_path, monkeypatch, case):
  tiny_models.write_model(tmp_path, case, **CASES[case])
  _, whole = models.load(tmp_path)
  sizes = []
  read = checkpoint.Checkpoint.read

  def spy(self, name, index=()):
    array = read(self, name, index)
    sizes.append(array.size)
    return array

  monkeypatch.setattr(checkpoint.Checkpoint, "read", spy)
  _, params = models.load(tmp_path, mesh=_mesh())
  leaves, expected = flatten(params), flatten(whole)
  pieces = {}
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, expected[path])
    pieces[path] = 4 if any(leaf.sharding.spec) else 1
    (size,) = {shard.data.size for shard in leaf.addressable_shards}
    assert size == leaf.size // pieces[path], path
  # Never more than a shard is read, and once, though two devices hold it.
  assert sorted(sizes) == sorted(
    leaf.size // pieces[path]
    for path, leaf in leaves.items()
    for _ in range(pieces[path])
  )
  total = sum(leaf.size for leaf in leaves.values())
  cut = sum(leaf.size for path, leaf in leaves.items() if pieces[path] == 4)
  assert cut > 0.9 * total


@pytest.mark.parametrize("case", CASES)
def test_sharded_models_compute_the_same(tmp_path, mesh, case):
  tiny_models.write_model(tmp_path, case, **CASES[case])
  apply, whole = models.load(tmp_path)
  _, params = models.load(tmp_path, mesh=mesh)
  tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
  expected = jax.jit(apply)(whole, tokens)
  auto = jax.tree.leaves(params)[0].sharding.mesh
  rows = jax.device_put(tokens, NamedSharding(auto, PartitionSpec("data")))
  logits = jax.jit(apply)(params, rows)
  assert len(logits.sharding.device_set) == 8
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_generation_on_a_mesh(tmp_path):
  tiny_models.write_model(tmp_path, "llama")
  _, apply, whole = tiny_models.load_model("llama")
  _, params = models.load(tmp_path, mesh=_mesh())
  prompts = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
  found = models.generate(apply, params, prompts, 5)
  expected = models.generate(apply, whole, prompts, 5)
  np.testing.assert_array_equal(found, expected)


def test_the_first_rule_that_matches_a_whole_path_decides(tmp_path):
  tiny_models.write_model(tmp_path, "llama")
  both = PartitionSpec(("data", "model"))
  rules = [
    ("layers/0/.*", PartitionSpec("data")),
    (".*/kernel", both),
  ]
  _, params = models.load(tmp_path, mesh=_mesh(), rules=rules)
  layers = params["layers"]
  assert layers["0"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(
    "data"
  )
  assert layers["1"]["mlp"]["up"]["kernel"].sharding.spec == both
  assert layers["1"]["mlp_norm"]["scale"].sharding.is_fully_replicated
  assert params["embed"]["embedding"].sharding.is_fully_replicated


def test_a_rule_that_matches_nothing_is_an_error(tmp_path):
  tiny_models.write_model(tmp_path, "llama")
  rules = [("embed", PartitionSpec("model"))]  # no whole path
  with pytest.raises(ValueError, match="1 rules match no path: embed; there"):
    models.load(tmp_path, mesh=_mesh(), rules=rules)
